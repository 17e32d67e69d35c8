"""A small tokenizer with ChatML's tokens and a chat template, and dialogues to write with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.data.instruct.dialogue import Dialogue, Message
from tessel.data.tokenizer import HuggingFaceTokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

HELLO = Dialogue(
    (Message("user", "hi"), Message("assistant", "hello"), Message("user", "bye"), Message("assistant", "ok"))
)


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HuggingFaceTokenizer]:
    """`chat_tokenizer(chat_template=None, bos=False)`: bytes with some merges, and ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made: dict[tuple[str | None, bool], HuggingFaceTokenizer] = {}

    def make(chat_template: str | None = CHATML, bos: bool = False) -> HuggingFaceTokenizer:
        if (chat_template, bos) in made:
            return made[chat_template, bos]
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        model.train_from_iterator(
            ["user assistant system you are a helpful hello there ok bye what it is"] * 4, trainer
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=model,
            eos_token="<|endoftext|>",
            bos_token="<s>" if bos else None,
            additional_special_tokens=["<|im_start|>", "<|im_end|>"],
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = chat_template
        folder: Path = tmp_path_factory.mktemp("chat_tokenizer")
        tokenizer.save_pretrained(folder)
        made[chat_template, bos] = HuggingFaceTokenizer(folder)
        return made[chat_template, bos]

    return make
