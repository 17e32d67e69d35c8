"""Hunyuan-Large's dialogues, with a small tokenizer that has its marks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel.config.preprocess import PreprocessConfig
from tessel.data.encoding import Encoded, RowError
from tessel.data.instruct.handlers import instruction_encoder
from tessel.data.rows import Row
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError, UsageError

TEMPLATE = (
    "{% for message in messages %}{% if message.role in ['user', 'observation'] %}{{ message.content }}<|extra_0|>"
    "{% elif message.role == 'system' %}{{ message.content }}<|extra_4|>"
    "{% else %}{{ message.content }}<|eos|>{% endif %}{% endfor %}"
)
CFG = PreprocessConfig(
    input=("unread.jsonl",), output_prefix="out", handler_name="HunyuanInstructionHandler", prompt_type="hunyuan"
)
AS_MINDSPEED = replace(CFG, compatible="mindspeed")
ROUND = [("system", "be kind"), ("human", "hi"), ("gpt", "hello")]
Make = Callable[..., HuggingFaceTokenizer]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Make) -> HuggingFaceTokenizer:
    from transformers import AutoTokenizer

    hf: Any = AutoTokenizer.from_pretrained(chat_tokenizer().source)
    hf.add_special_tokens({"eos_token": "<|eos|>", "pad_token": "<|pad|>"})
    hf.add_tokens(["<|extra_0|>", "<|extra_4|>"], special_tokens=True)
    hf.chat_template = TEMPLATE
    folder: Path = tmp_path_factory.mktemp("hunyuan")
    hf.save_pretrained(folder)
    return HuggingFaceTokenizer(folder)


def row(*messages: tuple[str, str], number: int = 1) -> Row:
    return Row(number, {"conversations": [{"from": role, "value": text} for role, text in messages]})


def text_of(tokenizer: HuggingFaceTokenizer, part: Encoded) -> str:
    return "".join(tokenizer.hf.convert_ids_to_tokens([i for i in part.tokens.tolist() if i != -100])).replace("Ġ", " ")


def test_answers_are_trained_with_their_marks(tokenizer: HuggingFaceTokenizer) -> None:
    encoder = instruction_encoder(CFG, tokenizer)
    assert encoder.columns == ("conversations",)
    second = [("system", "be"), ("observation", "<|pad|>bye"), ("function_call", "ok")]
    ids, mask, labels = encoder([row(*ROUND, *second)], "a.jsonl")
    assert text_of(tokenizer, ids) == (
        "be kind<|extra_4|>hi<|extra_0|>hello<|eos|>be<|extra_4|><|pad|>bye<|extra_0|>ok<|eos|>"
    )
    assert text_of(tokenizer, labels) == "<|extra_0|>hello<|eos|><|extra_0|>ok<|eos|>"
    trained = labels.tokens != -100
    assert np.array_equal(labels.tokens[trained], ids.tokens[trained])
    pad = tokenizer.hf.pad_token_id
    assert np.array_equal(mask.tokens, ids.tokens != pad) and (mask.tokens == 0).sum() == 1
    assert ids.tokens.dtype == mask.tokens.dtype == np.int32


def test_long_ones_are_cut_for_mindspeed(tokenizer: HuggingFaceTokenizer) -> None:
    whole = instruction_encoder(CFG, tokenizer)([row(*ROUND)], "a.jsonl")
    cut = instruction_encoder(replace(AS_MINDSPEED, seq_length=5), tokenizer)([row(*ROUND)], "a.jsonl")
    assert all(np.array_equal(short.tokens, long.tokens[:5]) for short, long in zip(cut, whole, strict=True))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (ROUND[1:], "message 1 is of 'user'; the system, a question and an answer must take turns"),
        ([*ROUND, ROUND[0]], "there are 4 messages: rounds of the system"),
        ([], "there are 0 messages"),
        ([("someone", "a")], "message 1 is of 'someone'"),
    ],
)
def test_what_are_no_rounds(tokenizer: HuggingFaceTokenizer, messages: list[tuple[str, str]], problem: str) -> None:
    with pytest.raises(RowError, match=problem):
        instruction_encoder(CFG, tokenizer)([row(*ROUND), row(*messages, number=2)], "a.jsonl")
    lenient: Any = instruction_encoder(AS_MINDSPEED, tokenizer)
    ids, *_ = lenient([row(*ROUND), row(*messages, number=2)], "a.jsonl")
    assert len(ids.lengths) == 1
    assert [bad.number for bad in lenient.left_out] == [2] and problem in lenient.left_out[0].reason


def test_what_is_refused(tokenizer: HuggingFaceTokenizer, chat_tokenizer: Make) -> None:
    for change in ({"prompt_type": "qwen"}, {"append_eod": True}, {"mask_history": True}):
        with pytest.raises(UsageError, match="leave --prompt-type"):
            instruction_encoder(replace(CFG, **change), tokenizer)
    with pytest.raises(TesselError, match=r"has no <\|extra_0\|> and no <\|eos\|> and no padding, which Hunyuan"):
        instruction_encoder(CFG, chat_tokenizer())
    with pytest.raises(TesselError, match="no chat template"):
        instruction_encoder(CFG, chat_tokenizer(None))
    mapped = replace(CFG, map_keys='{"messages": "chat"}')
    with pytest.raises(RowError, match="there is no 'chat'"):
        instruction_encoder(mapped, tokenizer)([row(*ROUND)], "a.jsonl")
