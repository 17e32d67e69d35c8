"""Dialogues to ids and labels: golden loss masks, and a second, plain implementation of the rules."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest

from tessel.data.instruct.dialogue import Dialogue, Example, Message
from tessel.data.instruct.pieces import Pieces
from tessel.data.instruct.render import SlotRenderer, render_prompt, renderer_for
from tessel.data.instruct.rendering import Renderer, RenderOptions
from tessel.data.instruct.templates import Special, Template, Token, known_templates
from tessel.data.instruct.vocabulary import Vocabulary, vocabulary_for
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError
from tests.data.instruct.conftest import HELLO

Make = Callable[..., HuggingFaceTokenizer]


def trained_text(renderer: Renderer, tokenizer: HuggingFaceTokenizer, dialogue: Dialogue) -> list[str]:
    """The stretches of text that have loss."""
    (rendered,) = renderer.dialogues([dialogue])
    pieces, runs, run = Pieces(tokenizer, renderer.vocabulary.added), [], []
    for i, label in zip(rendered.ids.tolist(), rendered.labels.tolist(), strict=True):
        if label != -100:
            assert label == i
            run.append(i)
        elif run:
            runs, run = [*runs, run], []
    runs += [run] if run else []
    return ["".join(text for text, _ in pieces.of(run)).replace("↵\n", "\n") for run in runs]


def whole_text(renderer: Renderer, tokenizer: HuggingFaceTokenizer, dialogue: Dialogue) -> str:
    (rendered,) = renderer.dialogues([dialogue])
    pieces = Pieces(tokenizer, renderer.vocabulary.added)
    return "".join(text for text, _ in pieces.of(rendered.ids.tolist())).replace("↵\n", "\n")


# What MindSpeed-LLM's templates train of [user hi, assistant hello, user bye, assistant ok].
@pytest.mark.parametrize(
    "name, trained",
    [
        ("qwen", ["hello<|im_end|>", "ok<|im_end|>"]),
        ("qwen_lf", ["hello<|im_end|>\n", "ok<|im_end|>\n"]),
        ("qwen3", ["hello<|im_end|>\n", "ok<|im_end|>\n"]),
        ("alpaca", ["hello<|endoftext|>", "ok<|endoftext|>"]),
        ("default", ["hello<|endoftext|>", "ok<|endoftext|>"]),
        ("llama2", ["hello<|endoftext|>", "ok<|endoftext|>"]),
        ("empty", ["hello", "ok"]),
        ("hf", ["hello<|im_end|>\n", "ok<|im_end|>\n"]),
    ],
)
def test_golden_loss_masks(chat_tokenizer: Make, name: str, trained: list[str]) -> None:
    tokenizer = chat_tokenizer()
    assert trained_text(renderer_for(tokenizer, name), tokenizer, HELLO) == trained


@pytest.mark.parametrize(
    "name, text",
    [
        (
            "qwen",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nok<|im_end|>",
        ),
        ("llama2", "[INST] hi [/INST]hello<|endoftext|>[INST] bye [/INST]ok<|endoftext|>"),
        ("default", "Human: hi\nAssistant:hello<|endoftext|>\nHuman: bye\nAssistant:ok<|endoftext|>"),
        ("empty", "hihellobyeok"),
        (
            "qwen3",
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nhello<|im_end|>\n"
            "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nok<|im_end|>\n",
        ),
        (
            "gemma",
            "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nhello<end_of_turn>\n"
            "<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>model\nok<|endoftext|>",
        ),
    ],
)
def test_text(chat_tokenizer: Make, name: str, text: str) -> None:
    tokenizer = chat_tokenizer()
    assert whole_text(renderer_for(tokenizer, name), tokenizer, HELLO) == text


def test_a_system_text_replaces_the_default(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    dialogue = HELLO._replace(system="you are ok")
    assert whole_text(renderer_for(tokenizer, "qwen"), tokenizer, dialogue).startswith(
        "<|im_start|>system\nyou are ok<"
    )
    assert whole_text(renderer_for(tokenizer, "llama2"), tokenizer, dialogue).startswith(
        "[INST] <<SYS>>\nyou are ok\n<</SYS>>\n\nhi [/INST]hello"
    )


def test_begin_of_sequence_where_the_tokenizer_has_one(chat_tokenizer: Make) -> None:
    with_bos = chat_tokenizer(bos=True)
    text = whole_text(renderer_for(with_bos, "llama2"), with_bos, HELLO)
    assert text.count("<s>[INST]") == 2
    text = whole_text(renderer_for(with_bos, "mistral"), with_bos, HELLO)
    assert text.startswith("<s>[INST] hi") and text.count("<s>") == 1


def test_what_follows_an_answer_is_trained_as_the_end_of_sequence(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    renderer = renderer_for(tokenizer, "baichuan2")
    (rendered,) = renderer.dialogues([HELLO])
    eos = tokenizer.hf.eos_token_id
    ends = np.flatnonzero(rendered.labels == eos).tolist()
    assert len(ends) == 2 and ends[1] == len(rendered.ids) - 1
    assert rendered.ids[ends[1]] == eos and rendered.ids[ends[0]] != eos


def test_thoughts(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    thinking = Dialogue((Message("user", "hi"), Message("assistant", "<think>\nhm\n</think>\n\nhello")))
    apart = Dialogue((Message("user", "hi"), Message("assistant", "hello", thought="hm")))

    def trained(value: bool | None, dialogue: Dialogue) -> list[str]:
        return trained_text(renderer_for(tokenizer, "qwen3", None, RenderOptions(thinking=value)), tokenizer, dialogue)

    empty = "<think>\n\n</think>\n\n"
    assert trained(True, HELLO) == [f"{empty}hello<|im_end|>\n", f"{empty}ok<|im_end|>\n"]
    assert trained(None, HELLO) == trained(False, HELLO) == ["hello<|im_end|>\n", "ok<|im_end|>\n"]
    for dialogue in (thinking, apart):
        assert trained(None, dialogue) == trained(True, dialogue) == ["<think>\nhm\n</think>\n\nhello<|im_end|>\n"]
        assert trained(False, dialogue) == ["hello<|im_end|>\n"]


def test_thoughts_of_earlier_answers(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    messages = [message._replace(thought="hm" if message.role == "assistant" else "") for message in HELLO.messages]
    dialogue = Dialogue(tuple(messages))
    thought = "<think>\nhm\n</think>\n\n"
    kept = renderer_for(tokenizer, "qwen3")
    assert trained_text(kept, tokenizer, dialogue) == [f"{thought}hello<|im_end|>\n", f"{thought}ok<|im_end|>\n"]
    dropped = renderer_for(tokenizer, "qwen3", None, RenderOptions(drop_thinking=True))
    assert trained_text(dropped, tokenizer, dialogue) == ["hello<|im_end|>\n", f"{thought}ok<|im_end|>\n"]


def test_options(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()

    def trained(**options: bool) -> list[str]:
        return trained_text(renderer_for(tokenizer, "qwen", None, RenderOptions(**options)), tokenizer, HELLO)

    assert trained(mask_history=True) == ["ok<|im_end|>"]
    assert trained(append_eod=True) == ["hello<|im_end|>", "ok<|im_end|><|im_end|>"]
    (everything,) = trained(train_on_prompt=True)
    assert everything.startswith("<|im_start|>system") and everything.endswith("ok<|im_end|>")


def test_tools(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    call = '{"name": "add", "arguments": {"a": 1}}'
    messages = (
        Message("user", "hi"),
        Message("function", call),
        Message("observation", "2"),
        Message("assistant", "ok"),
    )
    tools = '[{"name": "add", "parameters": {"properties": {"a": {"type": "int", "enum": ["1"]}}, "required": ["a"]}}]'
    dialogue = Dialogue(messages, "", tools)
    text = whole_text(renderer_for(tokenizer, "qwen"), tokenizer, dialogue)
    assert "You are a helpful assistant.You have access to the following tools:\n> Tool Name: add\n" in text
    assert "  - a (int, required): , should be one of [1]\n" in text
    assert trained_text(renderer_for(tokenizer, "qwen"), tokenizer, dialogue) == [
        'Action: add\nAction Input: {"a": 1}<|im_end|>', "ok<|im_end|>",
    ]  # fmt: skip
    text = whole_text(renderer_for(tokenizer, "qwen3"), tokenizer, dialogue)
    assert (
        f"<tool_call>\n{call}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n2\n</tool_response>" in text
    )


def test_prompts(chat_tokenizer: Make) -> None:
    """What is served is what was trained, up to the answer; without thinking with an empty thought."""
    tokenizer = chat_tokenizer()
    question = HELLO._replace(messages=HELLO.messages[:-1])
    for name, thinking in (("qwen", None), ("qwen_lf", None), ("qwen3", False), ("llama2", None), ("hf", None)):
        renderer = renderer_for(tokenizer, name, None, RenderOptions(thinking=thinking))
        prompt = render_prompt(question, renderer)
        (whole,) = renderer.dialogues([HELLO])
        first_trained = max(np.flatnonzero(whole.labels == -100)) + 1
        if name == "qwen3":  # only the last of its answers has an empty thought
            empty = renderer.vocabulary.encoder(["<think>\n\n</think>\n\n"])[0]
            assert prompt[-len(empty) :] == empty
        else:
            assert prompt == whole.ids[:first_trained].tolist()
    with pytest.raises(ValueError, match="question"):
        render_prompt(HELLO, renderer_for(tokenizer, "qwen"))


def test_messages_that_take_no_turns(chat_tokenizer: Make) -> None:
    renderer = renderer_for(chat_tokenizer(), "qwen")
    ask, answer = HELLO.messages[:2]
    with pytest.raises(
        TesselError, match="message 2 is of 'user', where an answer is due .roles: user, user, assistant"
    ):
        renderer.dialogues([HELLO, Dialogue((ask, ask, answer))])
    with pytest.raises(TesselError, match="an answer must be last"):
        renderer.dialogues([Dialogue((ask, answer, ask))])
    with pytest.raises(TesselError, match="a question must be last"):
        renderer.prompts([HELLO])
    tokenizer = chat_tokenizer()
    assert trained_text(renderer_for(tokenizer, "hf"), tokenizer, Dialogue((ask, ask, answer))) == ["hello<|im_end|>\n"]


def test_preferences(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    example = Example(HELLO.messages[:-1], (Message("assistant", "ok"), Message("assistant", "what")))
    for name in ("qwen", "qwen3", "hf"):
        renderer = renderer_for(tokenizer, name)
        chosen, rejected = renderer.preferences([example])
        first = int(np.flatnonzero(chosen.labels != -100)[0])
        assert np.array_equal(chosen.ids[:first], rejected.ids[:first])
        assert (rejected.labels[:first] == -100).all() and (rejected.labels[first:] != -100).all()
        assert tokenizer.decode(rejected.ids[first:].tolist()).startswith("what")


def test_tokens_that_are_missing_get_new_ids(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    vocabulary = vocabulary_for(tokenizer, known_templates()["llama3"])
    assert vocabulary.added == {"<|eot_id|>": tokenizer.vocab_size}
    assert vocabulary.eos == vocabulary.eod == tokenizer.vocab_size
    assert vocabulary.encoder(["a<|eot_id|>"])[0][-1] == tokenizer.vocab_size
    again = pickle.loads(pickle.dumps(vocabulary))
    assert again.encoder(["a<|eot_id|>"]) == vocabulary.encoder(["a<|eot_id|>"])
    # The tokenizer itself is as it was.
    assert tokenizer.hf.eos_token == "<|endoftext|>" and len(tokenizer.hf) == tokenizer.vocab_size


def test_a_renderer_can_be_sent_to_a_worker(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    for name in ("qwen", "llama3", "hf"):
        renderer = renderer_for(tokenizer, name)
        again = pickle.loads(pickle.dumps(renderer))
        for a, b in zip(renderer.dialogues([HELLO]), again.dialogues([HELLO]), strict=True):
            assert np.array_equal(a.ids, b.ids) and np.array_equal(a.labels, b.labels)


def plainly(template: Template, vocabulary: Vocabulary, dialogue: Dialogue, most: int) -> tuple[list[int], list[int]]:
    """LLaMA-Factory's rules once more, message by message, with lists."""

    def encode(slots: tuple[str | Token | Special, ...], content: str = "") -> list[int]:
        ids: list[int] = []
        for slot in slots:
            if isinstance(slot, str):
                ids += vocabulary.encoder([slot.replace("{{content}}", content)])[0]
            elif isinstance(slot, Special):
                found = vocabulary.eos if slot.name == "eos" else vocabulary.bos
                ids += [found] if found is not None else []
        return ids

    modern = template.kind in ("modern", "reasoning")
    encoded = []
    for i, message in enumerate(dialogue.messages):
        ids = []
        if i == 0:
            ids += encode(template.prefix)
            if system := dialogue.system or template.default_system:
                ids += encode(template.system, system)
        elif i % 2 == 0 and not modern:
            ids += encode(template.separator)
        encoded.append(ids + encode(getattr(template, message.role), message.content))
    ids, labels = [], []
    total = int(modern)
    for question, answer in zip(encoded[::2], encoded[1::2], strict=True):
        if total >= most:
            break
        room, q, a = most - total, len(question), len(answer)
        if not modern:
            most_answer = max(int(room * (a / (q + a))), 1)
            most_question = room - min(most_answer, a)
        elif a * 2 < room:
            most_answer, most_question = a, room - a
        elif q * 2 < room:
            most_question, most_answer = q, room - q
        else:
            most_answer = int(room * (a / (q + a)))
            most_question = room - min(most_answer, a)
        question, answer = question[:most_question], answer[:most_answer]
        total += len(question) + len(answer)
        marks = [-100] * len(question)
        if ids and template.efficient_eos and marks:
            marks[0] = vocabulary.eos or 0
        ids, labels = ids + question + answer, labels + marks + answer
    if template.efficient_eos:
        ids, labels = [*ids, vocabulary.eos or 0], [*labels, vocabulary.eos or 0]
    return ids, labels


@pytest.mark.parametrize("name", ["qwen", "qwen_lf", "chatml", "alpaca", "gemma", "baichuan2", "deepseek2", "default"])
def test_against_a_plain_implementation(chat_tokenizer: Make, name: str) -> None:
    """Random dialogues, long ones cut, and all of them at once."""
    tokenizer, template = chat_tokenizer(), known_templates()[name]
    vocabulary = vocabulary_for(tokenizer, template)
    generator = random.Random(name)
    words = ["hello", " there", "\n", "<|im_end|>", "é", "", " you are", "{{content}}", "ok"]
    dialogues = []
    for _ in range(60):
        texts = [
            "".join(generator.choices(words, k=generator.randrange(12))) for _ in range(generator.randrange(2, 8, 2))
        ]
        messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
        dialogues.append(Dialogue(tuple(messages), generator.choice(["", "you are ok"])))
    for most in (10_000, 120, 60, 21):
        renderer = SlotRenderer(template, vocabulary, RenderOptions(max_tokens=most))
        for dialogue, rendered in zip(dialogues, renderer.dialogues(dialogues), strict=True):
            ids, labels = plainly(template, vocabulary, dialogue, most)
            assert rendered.ids.tolist() == ids
            assert rendered.labels.tolist() == labels
            assert rendered.ids.dtype == rendered.labels.dtype == np.int32
