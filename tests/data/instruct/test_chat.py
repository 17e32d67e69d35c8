"""The tokenizer's own chat template: what is trained, and what it cannot write."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tessel.data.instruct.dialogue import Dialogue, Message
from tessel.data.instruct.render import renderer_for
from tessel.data.instruct.rendering import RenderOptions
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError
from tests.data.instruct.conftest import CHATML, HELLO, MARKED
from tests.data.instruct.test_render import trained_text, whole_text

Make = Callable[..., HuggingFaceTokenizer]
# As Qwen3's: thoughts of all answers but the last are left out, and an answer without one gets an empty one.
FORGETFUL = CHATML.replace(
    "{{ message.content }}",
    "{% if message.role == 'assistant' and loop.last %}<think>\n{{ message.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ message.content }}",
)
CALLS = CHATML.replace(
    "{{ message.content }}",
    "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}",
).replace("{% for", "{{ tools | tojson if tools else '' }}{% for", 1)
THOUGHT = Dialogue((Message("user", "hi"), Message("assistant", "hello", "hm")))
CALL = Dialogue(
    (
        Message("user", "hi"),
        Message("function", '{"name": "add", "arguments": {"a": 1}}', said="wait: "),
        Message("observation", "2"),
        Message("assistant", "ok"),
    ),
    "",
    '[{"name": "add"}]',
)


def encoded(tokenizer: HuggingFaceTokenizer, *texts: str) -> list[int]:
    return [i for text in texts for i in tokenizer.encode(text)]


def test_the_text_is_tokenized_whole(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    (rendered,) = renderer_for(tokenizer, "hf").dialogues([HELLO._replace(system="you are ok")])
    messages = [{"role": "system", "content": "you are ok"}]
    messages += [{"role": message.role, "content": message.content} for message in HELLO.messages]
    assert rendered.ids.tolist() == tokenizer.hf.apply_chat_template(messages, return_dict=False)


def test_an_answer_that_grows_together_with_its_prompt(chat_tokenizer: Make) -> None:
    """A token across the border, as of "a" and "b" merged, is not trained."""
    joined = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = chat_tokenizer(joined)
    whole = "x hello there"
    border = next(
        i for i in range(1, len(whole)) if encoded(tokenizer, whole[:i], whole[i:]) != encoded(tokenizer, whole)
    )
    dialogue = Dialogue((Message("user", whole[:border]), Message("assistant", whole[border:])))
    (rendered,) = renderer_for(tokenizer, "hf").dialogues([dialogue])
    assert rendered.ids.tolist() == encoded(tokenizer, whole)
    trained = tokenizer.decode([i for i in rendered.labels.tolist() if i != -100])
    assert trained and whole[border:].endswith(trained) and trained != whole[border:]


def test_what_the_template_marks_is_trained(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer(MARKED)
    renderer = renderer_for(tokenizer, "hf")
    assert trained_text(renderer, tokenizer, HELLO) == ["hello<|im_end|>", "ok<|im_end|>"]
    last = renderer_for(tokenizer, "hf", None, RenderOptions(mask_history=True))
    assert trained_text(last, tokenizer, HELLO) == ["ok<|im_end|>"]


def test_options(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()

    def trained(**options: bool) -> list[str]:
        return trained_text(renderer_for(tokenizer, "hf", None, RenderOptions(**options)), tokenizer, HELLO)

    assert trained(mask_history=True) == ["ok<|im_end|>\n"]
    assert trained(append_eod=True) == ["hello<|im_end|>\n", "ok<|im_end|>\n<|endoftext|>"]
    assert trained(train_on_prompt=True)[0].startswith("<|im_start|>user\nhi")
    (cut,) = renderer_for(tokenizer, "hf", None, RenderOptions(max_tokens=5)).dialogues([HELLO])
    assert len(cut.ids) == 5 and (cut.labels == -100).all()


def test_a_template_that_changes_what_came_before(chat_tokenizer: Make) -> None:
    """Thoughts are left out of earlier answers: only the last answer can be trained."""
    tokenizer = chat_tokenizer(FORGETFUL)
    with pytest.raises(TesselError, match="writes message 2 otherwise when more follows.*--mask-history"):
        renderer_for(tokenizer, "hf").dialogues([HELLO])
    last = renderer_for(tokenizer, "hf", None, RenderOptions(mask_history=True))
    assert trained_text(last, tokenizer, HELLO) == ["<think>\n\n</think>\n\nok<|im_end|>\n"]
    assert trained_text(renderer_for(tokenizer, "hf"), tokenizer, THOUGHT) == [
        "<think>\nhm\n</think>\n\nhello<|im_end|>\n"
    ]


def test_what_a_template_leaves_out_is_not_trained_without_a_word(chat_tokenizer: Make) -> None:
    plain = renderer_for(chat_tokenizer(), "hf")
    with pytest.raises(TesselError, match="leaves out the thought of the last answer"):
        plain.dialogues([THOUGHT])
    with pytest.raises(TesselError, match="leaves out the function call 'add'"):
        plain.dialogues([CALL])
    tokenizer = chat_tokenizer(CALLS)
    renderer = renderer_for(tokenizer, "hf")
    assert whole_text(renderer, tokenizer, CALL).startswith('[{"type": "function", "function": {"name": "add"}}]')
    assert trained_text(renderer, tokenizer, CALL) == [
        'wait: {"name": "add", "arguments": {"a": 1}}<|im_end|>\n', "ok<|im_end|>\n",
    ]  # fmt: skip


def test_tokenizers_that_will_not_do(chat_tokenizer: Make) -> None:
    with pytest.raises(TesselError, match="has no chat template, which --prompt-type hf is"):
        renderer_for(chat_tokenizer(None), "hf")
    picky = chat_tokenizer("{{ raise_exception('no system text, please') }}")
    with pytest.raises(TesselError, match="the chat template refuses the dialogue: no system text, please"):
        renderer_for(picky, "hf").dialogues([HELLO])


def test_prompts_are_asked_with_the_options(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer(CHATML + "{{ enable_thinking }} {{ reasoning_effort }}")
    renderer = renderer_for(tokenizer, "hf", None, RenderOptions(thinking=False, effort="high"))
    (ids,) = renderer.prompts([HELLO._replace(messages=HELLO.messages[:-1])])
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids.tolist()).endswith("<|im_start|>assistant\nFalse high")
