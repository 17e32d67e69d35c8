"""Raw dialogues given straight to training: the same samples as preprocessed ones, made once."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tessel.cli import main
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.data.build import splits_of
from tessel.data.indexed import IndexedDataset
from tessel.data.instruct.samples import PairSample
from tessel.data.tokenizer import load_tokenizer
from tessel.errors import TesselError

TEMPLATE = "{% for message in messages %}{{ '<' + message.role + '>' + message.content + '<|endoftext|>' }}{% endfor %}"
ROWS = [
    {"instruction": "the quick brown fox ", "input": "jumps", "output": "over the lazy dog"},
    {"instruction": "the model reads", "input": "", "output": "one more line"},
    {"instruction": "x" * 90, "input": "", "output": "never"},
    {"instruction": "read", "input": "", "output": "y" * 90},
]
PAIRS = [{"instruction": "the fox", "input": "", "chosen": "over", "rejected": "under"}]


@pytest.fixture
def tokenizer(tiny_tokenizer_folder: Path, tmp_path: Path) -> Path:
    """The tiny tokenizer, with a chat template."""
    hf = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    hf.chat_template = TEMPLATE
    hf.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def datasets(tokenizer: Path, cache: Path, *more: str):
    argv = ["--seq-length", "64", "--tokenizer-name-or-path", str(tokenizer), "--data-cache-path", str(cache), *more]
    cfg = parse(RunConfig, argv, "x").value
    return splits_of(cfg, load_tokenizer(cfg.tokenizer, None, None), (4, 0, 0))


def text_of(tokenizer: Path, sample) -> tuple[str, str]:
    """What a sample holds, and what of it is trained."""
    hf = AutoTokenizer.from_pretrained(tokenizer)
    trained = sample["labels"][sample["loss_mask"] > 0]
    return hf.decode(sample["tokens"].tolist()), hf.decode(trained.tolist())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_raw_instructions_are_those_that_preprocessing_writes(
    tokenizer: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / name, ROWS)
    flags = ["--is-instruction-dataset", "--data-path", str(data), "--prompt-type", "default", "--split", "1"]
    train = datasets(tokenizer, tmp_path / "cache", *flags, "--no-shuffle").train
    argv = ["preprocess", "--input", str(data), "--output-prefix", str(tmp_path / "p"), "--seq-length", "64"]
    assert main([*argv, "--prompt-type", "default", "--tokenizer-name-or-path", str(tokenizer)]) == 0
    assert train is not None
    expected = IndexedDataset(tmp_path / "p_packed_input_ids_document")
    assert np.array_equal(train.indexed.lengths, expected.lengths)
    assert np.array_equal(train.indexed.span(0, expected.total_tokens), expected.span(0, expected.total_tokens))
    assert train[1]["tokens"].tolist() == expected.get(1).tolist()
    capsys.readouterr()
    datasets(tokenizer, tmp_path / "cache", *flags)
    assert "preprocessed before, reused" in capsys.readouterr().out
    for more in (["--train-on-prompt"], ["--seq-length", "48"], ["--prompt-type", "hf"]):
        datasets(tokenizer, tmp_path / "cache", *flags, *more)
        assert "dialogues kept in" in capsys.readouterr().out
    write(tmp_path / name, ROWS[:2])
    again = datasets(tokenizer, tmp_path / "cache", *flags).train
    assert again is not None and len(again.indexed) == 2


def test_without_a_prompt_type_the_chat_template_writes(tokenizer: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.json", ROWS[:2])
    flags = ["--is-instruction-dataset", "--data-path", str(data), "--split", "1", "--no-shuffle"]
    train = datasets(tokenizer, tmp_path / "cache", *flags).train
    assert train is not None
    text, trained = text_of(tokenizer, train[1])
    assert text == "<user>the model reads<|endoftext|><assistant>one more line<|endoftext|>"
    assert "one more line" in trained and "reads" not in trained
    packed = datasets(tokenizer, tmp_path / "cache", *flags, "--pack").train
    assert packed is not None and packed[0]["segments"] is not None


def test_raw_pairs(tokenizer: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.json", PAIRS)
    flags = ["--is-pairwise-dataset", "--data-path", str(data), "--prompt-type", "default", "--split", "1"]
    flags += ["--handler-name", "AlpacaStylePairwiseHandler"]
    train = datasets(tokenizer, tmp_path / "cache", *flags).train
    assert train is not None
    pair = train[0]
    assert isinstance(pair, PairSample)
    assert "over" in text_of(tokenizer, pair.chosen)[1] and "under" in text_of(tokenizer, pair.rejected)[1]


def test_raw_json_of_pai(tokenizer: Path, tmp_path: Path) -> None:
    """A question that leaves no room is left out, a longer answer cut; each dialogue counts one, in its order."""
    rows = [{"query": row["instruction"], "input": row["input"], "response": row["output"]} for row in ROWS]
    data = write(tmp_path / "rows.json", rows)
    flags = ["--dataset", "JSON-SFT", "--train-data-path", str(data), "--dataloader-type", "cyclic"]
    train = datasets(tokenizer, tmp_path / "cache", *flags, "--max-padding-length", "60").train
    assert train is not None and len(train) == 3
    assert text_of(tokenizer, train[0]) == (
        "<user>the quick brown fox jumps<|endoftext|><assistant>over the lazy dog<|endoftext|>",
        "<assistant>over the lazy dog<|endoftext|>",
    )
    assert [len(train[i]["tokens"]) for i in range(3)][2] == 60
    assert np.allclose([train[i]["loss_mask"].sum() for i in range(3)], 1)
    assert train.config.padding.length_of(12) == 60
    write(data, [{"query": "no answer"}])
    with pytest.raises(TesselError, match="has none of output, content, response"):
        datasets(tokenizer, tmp_path / "cache", *flags)
