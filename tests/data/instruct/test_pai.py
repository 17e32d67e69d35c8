"""Records as Pai-Megatron-Patch's tool writes them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tessel.cli import main
from tessel.data.indexed import IndexedDataset
from tessel.data.instruct.pai import pad_id_of

TEMPLATE = "{% for message in messages %}{{ '<' + message.role + '>' + message.content + '<|endoftext|>' }}{% endfor %}"
LENGTH = 40


def rows() -> list[Any]:
    """Objects and lists of objects; some are too long for a record, or for one of their own."""
    words = "the quick brown fox jumps over the lazy dog ".split()
    plain = [
        {"instruction": " ".join(words[: i % 7]), "input": words[i % 8] * (i % 3), "output": " ".join(words[i % 5 :])}
        for i in range(20)
    ]
    plain[4]["output"] = "z" * 60
    plain[9]["instruction"] = "z" * 60
    return [plain[0], plain[1:5], plain[5], plain[6:12], *plain[12:]]


def by_the_book(groups: list[Any], hf: Any, pad: int) -> list[list[int]]:
    """The tool's rule, step by step."""
    records = []
    for group in groups:
        tokens: list[int] = []
        labels: list[int] = []
        for row in [group] if isinstance(group, dict) else group:
            messages = [
                {"role": "user", "content": row["instruction"] + row["input"]},
                {"role": "assistant", "content": row["output"]},
            ]
            question = hf.apply_chat_template(messages[:1], return_dict=False)
            whole = hf.apply_chat_template(messages, return_dict=False)[:LENGTH]
            if len(question) >= LENGTH:
                continue
            shifted = [-100] * (len(question) - 1) + whole[len(question) :] + [-100]
            whole[-1] = -1 - whole[-1]
            if len(tokens) + len(whole) > LENGTH:
                records.append(tokens + [pad] * (LENGTH - len(tokens)) + labels + [-100] * (LENGTH - len(labels)))
                tokens, labels = [], []
            tokens, labels = tokens + whole, labels + shifted
        if tokens:
            records.append(tokens + [pad] * (LENGTH - len(tokens)) + labels + [-100] * (LENGTH - len(labels)))
    return records


@pytest.fixture
def tokenizer(tiny_tokenizer_folder: Path, tmp_path: Path) -> Path:
    hf = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    hf.chat_template = TEMPLATE
    hf.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("packing", [False, True])
def test_records_are_those_of_the_rule(tokenizer: Path, tmp_path: Path, suffix: str, packing: bool) -> None:
    content = json.dumps(rows()) if suffix == ".json" else "\n".join(map(json.dumps, rows()))
    (tmp_path / f"in{suffix}").write_text(content)
    argv = ["preprocess", "--compatible", "pai-sft", "--input", str(tmp_path / f"in{suffix}"), "--seq-length", "40"]
    argv += ["--output-prefix", str(tmp_path / "out"), "--patch-tokenizer-type", "Qwen2Tokenizer"]
    argv += ["--load", str(tokenizer), *["--sequence-packing"] * packing]
    assert main(argv) == 0
    hf = AutoTokenizer.from_pretrained(tokenizer)
    flat = [row for group in rows() for row in (group if isinstance(group, list) else [group])]
    expected = by_the_book([flat] if packing else rows(), hf, len(hf))
    records = IndexedDataset(tmp_path / "out_text_document")
    assert [records.get(i).tolist() for i in range(len(records))] == expected
    assert records.num_documents == len(expected)


def test_what_fills_a_record(tiny_tokenizer_folder: Path) -> None:
    hf = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    assert pad_id_of(hf, "Qwen2Tokenizer") == len(hf)
    assert pad_id_of(hf, "LLama3Tokenizer") == hf.pad_token_id
    hf.pad_token = None
    assert pad_id_of(hf, "LLama3Tokenizer") == len(hf)
    assert pad_id_of(hf, "DeepSeekV2Tokenizer") == hf.eos_token_id


def test_rows_that_are_no_dialogues_are_named(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["preprocess", "--compatible", "pai-sft", "--input", str(tmp_path / "in.jsonl"), "--load", str(tokenizer)]
    argv += ["--output-prefix", str(tmp_path / "out")]
    good = {"instruction": "a", "input": "", "output": "b"}
    for bad, message in (
        ({"instruction": "a", "output": "b"}, "'input' is missing, where text is expected"),
        (good | {"output": None}, "'output' is null, where text is expected"),
        ([good, 3], "a pack holds objects, and here is a number"),
    ):
        (tmp_path / "in.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert "line 2" in error and message in error


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["sft256", "sft1024_jsonl"])
def test_records_have_the_bytes_of_the_tool(shared: Path, tmp_path: Path, case: str) -> None:
    folder = shared / "oracle" / "preprocess"
    (oracle,) = (each for each in json.loads((folder / "cases.json").read_text()) if each["name"] == case)
    flags = [str(folder / flag) if flag.startswith("in/") else flag for flag in oracle["flags"]]
    argv = ["preprocess", "--compatible", "pai-sft", *flags, "--output-prefix", str(tmp_path / case)]
    assert main([*argv, "--tokenizer-name-or-path", str(shared / "data" / "tokenizers" / oracle["tokenizer"])]) == 0
    for name, file in oracle["outputs"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == file["sha256"], name
