"""Handlers: by MindSpeed-LLM's names, by the first row, or a class of the user's; what they write."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel.config.preprocess import PreprocessConfig
from tessel.data.encoding import Encoded, RowError
from tessel.data.instruct.detect import detect, with_handler
from tessel.data.instruct.handlers import instruction_encoder
from tessel.data.rows import BadRow, Row
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError, UsageError

Make = Callable[..., HuggingFaceTokenizer]
ROWS = [Row(i + 1, {"instruction": "hi", "input": "", "output": f"hello {'ok ' * i}"}) for i in range(5)]
QWEN = PreprocessConfig(
    input=("unread.jsonl",), output_prefix="out", handler_name="AlpacaStyleInstructionHandler", prompt_type="qwen"
)


def written(parts: tuple[Encoded, ...]) -> list[list[list[int]]]:
    """The sequences of each output."""
    return [np.split(part.tokens, np.cumsum(part.lengths)[:-1]) for part in parts]


def text_of(tokenizer: HuggingFaceTokenizer, ids: Any) -> str:
    return tokenizer.decode([i for i in ids.tolist() if i != -100])


def test_samples(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    encoder = pickle.loads(pickle.dumps(instruction_encoder(QWEN, tokenizer)))
    assert encoder.outputs == ("packed_input_ids", "packed_attention_mask", "packed_labels")
    assert encoder.columns == ("instruction", "input", "output")
    parts = encoder(ROWS, "a.jsonl")
    assert [part.tokens.dtype for part in parts] == [np.int32] * 3
    assert [part.sequences_per_document.tolist() for part in parts] == [[1] * 5] * 3
    ids, masks, labels = written(parts)
    assert all((mask == 1).all() and len(mask) == len(i) for mask, i in zip(masks, ids, strict=True))
    assert [text_of(tokenizer, label) for label in labels] == [f"{row.values['output']}<|im_end|>" for row in ROWS]
    # However the rows come, the samples are the same.
    alone = [encoder([row], "a.jsonl") for row in ROWS]
    for whole, *pieces in zip(parts, *alone, strict=True):
        assert np.array_equal(whole.tokens, np.concatenate([piece.tokens for piece in pieces]))
    assert [len(part.tokens) for part in encoder([], "a.jsonl")] == [0, 0, 0]


def test_a_row_that_cannot_be_used_is_named(chat_tokenizer: Make) -> None:
    encoder = instruction_encoder(QWEN, chat_tokenizer())
    with pytest.raises(RowError, match="row 7: output must be text") as error:
        encoder([*ROWS, Row(7, {"instruction": "hi", "output": 3})], "a.jsonl")
    assert error.value.number == 7
    sharegpt = replace(QWEN, handler_name="SharegptStyleInstructionHandler")
    call = [{"from": "human", "value": "q"}, {"from": "function_call", "value": "no JSON"}]
    good = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]
    rows = [Row(1, {"conversations": good}), Row(2, {"conversations": call})]
    with pytest.raises(RowError, match="row 2: a function call is not JSON"):
        instruction_encoder(sharegpt, chat_tokenizer())(rows, "a.jsonl")


def test_rows_that_the_rules_leave_out_are_noted(chat_tokenizer: Make) -> None:
    encoder: Any = instruction_encoder(QWEN, chat_tokenizer())
    parts = encoder([ROWS[0], Row(9, {"instruction": "", "input": "", "output": "x"})], "a.jsonl")
    assert len(parts[0].lengths) == 1 and encoder.left_out == [BadRow(9, "the prompt is empty")]
    encoder(ROWS, "a.jsonl")
    assert encoder.left_out == []


def test_mindspeed_writes_an_empty_dialogue_for_what_is_none(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    encoder: Any = instruction_encoder(replace(QWEN, compatible="mindspeed"), tokenizer)
    two = Row(3, {"instruction": "hi", "input": "", "output": ["a", "b"]})
    ids, _, labels = written(encoder([two], "a.jsonl"))
    assert text_of(tokenizer, labels[0]) == "<|im_end|>"
    assert "hi" not in text_of(tokenizer, ids[0]) and [bad.number for bad in encoder.left_out] == [3]


def test_preferences_and_prompts(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    row = Row(1, {"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no", "output": "", "id": "x1"})
    encoder = instruction_encoder(replace(QWEN, handler_name="AlpacaStylePairwiseHandler"), tokenizer)
    assert encoder.outputs == tuple(
        f"packed_{key}" for key in ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
    )
    _, chosen, _, rejected = written(encoder([row], "a.jsonl"))
    assert text_of(tokenizer, chosen[0]) == "yes<|im_end|>" and text_of(tokenizer, rejected[0]) == "no<|im_end|>"
    cfg = replace(QWEN, handler_name="R1AlpacaStyleInstructionHandler", dataset_additional_keys=("id",))
    row = Row(1, {**row.values, "output": "r"})
    encoder = instruction_encoder(cfg, tokenizer)
    assert encoder.outputs == ("packed_input_ids", "packed_attention_mask", "packed_id")
    ids, mask, extra = written(encoder([row], "a.jsonl"))
    assert text_of(tokenizer, ids[0]).endswith("<|im_start|>assistant\n") and len(mask[0]) == len(ids[0])
    assert text_of(tokenizer, extra[0]) == "x1"
    with pytest.raises(RowError, match="--dataset-additional-keys id: the row has no text"):
        encoder([Row(2, {**row.values, "id": 5})], "a.jsonl")


def test_prompts_and_pairs_as_mindspeed_has_them(chat_tokenizer: Make) -> None:
    """PPO has the questions alone, R1 all but the last answer; neither these nor pairs end with --append-eod."""
    tokenizer = chat_tokenizer()
    history = '{"history": "history"}'
    cfg = replace(QWEN, compatible="mindspeed", map_keys=history, append_eod=True, dataset_additional_keys=("labels",))
    row = Row(1, {"instruction": "bye", "input": "", "output": "ok", "history": [["hi", "hello"]]})
    told = {}
    for name in ("PPO", "R1"):
        encoder = instruction_encoder(replace(cfg, handler_name=f"{name}AlpacaStyleInstructionHandler"), tokenizer)
        told[name] = [text_of(tokenizer, ids[0]) for ids in written(encoder([row], "a.jsonl"))]
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    end = "\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
    assert told["R1"][0] == f"{start}<|im_start|>assistant\nhello<|im_end|>{end}" and told["R1"][2] == "ok"
    assert told["PPO"][0] == f"{start}<|im_start|>assistant\n{end}" and len(told["PPO"]) == 2
    pairs = replace(cfg, handler_name="AlpacaStylePairwiseHandler", seq_length=10)
    row = Row(1, {**row.values, "chosen": "yes", "rejected": "no"})
    _, chosen, _, rejected = written(instruction_encoder(pairs, tokenizer)([row], "a.jsonl"))
    assert text_of(tokenizer, chosen[0]) == "yes<|im_end|>" and text_of(tokenizer, rejected[0]) == "no<|im_end|>"
    with pytest.raises(UsageError, match="--pack joins dialogues"):
        instruction_encoder(replace(pairs, pack=True), tokenizer)


def test_older_handlers(chat_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer()
    general = replace(QWEN, handler_name="GeneralInstructionHandler", prompt_type=None, append_eod=True)
    ids, _, labels = written(instruction_encoder(general, tokenizer)([ROWS[0]], "a.jsonl"))
    assert text_of(tokenizer, ids[0]).endswith(
        "step by step.\n### Instruction:\nhi\n\n### Response:\nhello \n<|endoftext|>"
    )
    assert text_of(tokenizer, labels[0]) == "hello \n<|endoftext|>"
    belle = replace(general, handler_name="BelleMultiTurnInstructionHandler", append_eod=False)
    row = Row(1, {"instruction": "Human:hi\nAssistant:hello\nHuman:bye\nAssistant:\n", "output": "ok"})
    ids, _, labels = written(instruction_encoder(belle, tokenizer)([row], "a.jsonl"))
    assert text_of(tokenizer, ids[0]).endswith(
        "### Instruction:\nhi\n### Response:\nhello\n### Instruction:\nbye\n### Response:\nok\n"
    )
    assert text_of(tokenizer, labels[0]) == "ok\n"
    leetcode = replace(belle, handler_name="LeetcodePythonInstructionHandler")
    code = Row(1, {"code_with_problem": "hi ```bye", "code_only": "hello", "explanation_only": "ok"})
    ids, _, labels = written(instruction_encoder(leetcode, tokenizer)([code], "a.jsonl"))
    assert text_of(tokenizer, ids[0]).endswith("### Instruction:\nhi\n### Response:\nhello\nok\n")
    assert text_of(tokenizer, labels[0]) == "hello\nok\n"
    with pytest.raises(RowError, match="row 1: 'input' must be text"):
        instruction_encoder(general, tokenizer)([row], "a.jsonl")
    with pytest.raises(UsageError, match="leave --prompt-type out"):
        instruction_encoder(replace(general, prompt_type="qwen"), tokenizer)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"handler_name": "AlpacaStyleInstructionHandlr"}, r"is not known \(MindSpeed.*Did you mean Alpaca"),
        ({"handler_name": "MOSSMultiTurnHandler"}, "leave --prompt-type out"),
        ({"handler_name": "LlamaFactoryInstructionHandler"}, "which only `tessel preprocess` does"),
        ({"prompt_type": None}, "Dialogues need a template"),
        ({"train_on_prompt": True, "mask_history": True}, "opposites"),
        ({"reasoning_effort": "max"}, "only chat templates"),
        ({"prompt_type": "deepseek4", "reasoning_effort": "max"}, "add --enable-thinking true"),
        ({"map_keys": '{"a": "b"}'}, "'a' is not a key"),
    ],
)
def test_flags_that_are_refused(chat_tokenizer: Make, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        instruction_encoder(replace(QWEN, **change), chat_tokenizer())


@pytest.mark.parametrize(
    "row, handler, mapping",
    [
        ({"instruction": "a", "input": "", "output": "b"}, "AlpacaStyleInstructionHandler", {}),
        (
            {"prompt": "a", "response": "b", "history": []},
            "AlpacaStyleInstructionHandler",
            {"prompt": "prompt", "response": "response", "history": "history"},
        ),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "AlpacaStylePairwiseHandler", {}),
        ({"conversations": [{"from": "human", "value": "a"}]}, "SharegptStyleInstructionHandler", {}),
        (
            {"conversations": [{"from": "human", "value": "a"}], "tools": ""},
            "SharegptStyleInstructionHandler",
            {"tools": "tools"},
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "OpenAIInstructionHandler", {}),
        (
            {"conversations": [{"role": "user", "content": "a"}]},
            "OpenAIInstructionHandler",
            {"messages": "conversations"},
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}], "chosen": {}, "rejected": {}},
            "SharegptStylePairwiseHandler",
            {},
        ),
    ],
)
def test_the_first_row_decides(row: dict[str, Any], handler: str, mapping: dict[str, str]) -> None:
    assert detect(row) == (handler, mapping)


def test_the_choice_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], chat_tokenizer: Make) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "hi", "answer": "hello"}) + "\n")
    cfg = replace(QWEN, input=(str(path),), handler_name=None)
    chosen = with_handler(cfg)
    mapping = '{"prompt": "question", "response": "answer"}'
    assert (chosen.handler_name, chosen.map_keys) == ("AlpacaStyleInstructionHandler", mapping)
    assert capsys.readouterr().out == (
        f"rows are read by --handler-name AlpacaStyleInstructionHandler --map-keys '{mapping}'\n"
    )
    assert len(instruction_encoder(cfg, chat_tokenizer())([Row(1, {"question": "q", "answer": "r"})], "a")) == 3
    path.write_text('{"text": "plain"}\n')
    with pytest.raises(UsageError, match="columns 'text', which is no format"):
        with_handler(cfg)
    path.write_text("\n")
    with pytest.raises(TesselError, match="holds no row"):
        with_handler(cfg)


OWN = """
class Turns:
    def convert(self, row):
        if row.get("skip"):
            return None
        return {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}],
                "system": "you are ok"}

class Ids:
    def encode(self, row, tokenizer):
        ids = tokenizer.encode(row["q"], add_special_tokens=False)
        return {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}

class Wrong:
    def encode(self, row, tokenizer):
        return {"input_ids": [1, 2], "labels": [1]}

class Neither:
    pass
"""


def test_a_class_of_the_users(tmp_path: Path, chat_tokenizer: Make) -> None:
    tokenizer, path = chat_tokenizer(), tmp_path / "own.py"
    path.write_text(OWN)

    def encoder(name: str) -> Any:
        own = instruction_encoder(replace(QWEN, handler_name=f"{path}:{name}"), tokenizer)
        return pickle.loads(pickle.dumps(own))

    turns = encoder("Turns")
    ids, _, labels = written(turns([Row(1, {"q": "hi", "a": "ok"}), Row(2, {"skip": True})], "a.jsonl"))
    assert text_of(tokenizer, labels[0]) == "ok<|im_end|>" and "you are ok" in text_of(tokenizer, ids[0])
    assert [bad.number for bad in turns.left_out] == [2]
    with pytest.raises(RowError, match="row 3: .*Turns raises KeyError: 'q'"):
        turns([Row(3, {})], "a.jsonl")
    ids, _, labels = written(encoder("Ids")([Row(1, {"q": "hello"})], "a.jsonl"))
    assert text_of(tokenizer, ids[0]) == "hello" and (labels[0][:-1] == -100).all()
    with pytest.raises(RowError, match="row 1: .*one as long as the other"):
        encoder("Wrong")([Row(1, {})], "a.jsonl")
    with pytest.raises(UsageError, match="needs a method convert"):
        encoder("Neither")
    with pytest.raises(UsageError, match="has no class Nobody; it has Turns, Ids"):
        encoder("Nobody")
    with pytest.raises(UsageError, match="there is no file"):
        instruction_encoder(replace(QWEN, handler_name="none.py:Turns"), tokenizer)
    path.write_text("1 / 0")
    with pytest.raises(TesselError, match="the file raises ZeroDivisionError"):
        instruction_encoder(replace(QWEN, handler_name=f"{path}:Turns"), tokenizer)
