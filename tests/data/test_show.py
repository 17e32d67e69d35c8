"""`tessel samples`, from the command line to its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel.cli import main
from tessel.data.indexed import IndexedDataset
from tessel.data.samples import GPTDataset, SampleOptions
from tessel.data.show import parse_num_samples, parse_range
from tessel.errors import UsageError

from .datasets import EOD, write_random
from .test_oracle_samples import CASES, boundaries, dense_mask

Arguments = list[str]


def run(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> str:
    status = main(["samples", *arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def objects(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run([*arguments, "--json"], capsys).splitlines()]


def refused(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["samples", *arguments]) in (1, 2)
    return capsys.readouterr().err


@pytest.fixture
def data(tmp_path: Path) -> Arguments:
    prefix = write_random(tmp_path / "data", [21] * 60)
    return ["--data-path", prefix, "--seq-length", "8", "--split", "80,20,0", "--seed", "5"]


def test_a_sample_as_json(data: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--eod-mask-loss", "--reset-position-ids", "--reset-attention-mask", "--eod-id", str(EOD), "--pad-id", "3"]
    indexed = IndexedDataset(data[1])
    options = SampleOptions(
        8, seed=5, eod_id=EOD, pad_id=3, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True
    )
    dataset = GPTDataset(indexed, np.arange(48, dtype=np.int32), 200, options)
    shown = objects([*data, *flags, "--num-samples", "200,None,0", "--index", "4:9"], capsys)
    assert [line["index"] for line in shown] == [4, 5, 6, 7, 8]
    for line in shown:
        sample = dataset[line["index"]]
        for key in ("tokens", "labels", "loss_mask", "position_ids", "segments"):
            assert line[key] == list(sample[key])  # type: ignore[literal-required, call-overload]
        assert line["pieces"] == [[0, *piece] for piece in dataset.pieces(line["index"])]
        text = np.concatenate([indexed.get(*piece) for _, *piece in line["pieces"]])
        assert len(text) == 9
        assert (line["epochs"], line["epoch"]) == (2, list(dataset.epochs_of(line["index"])))


def test_defaults(data: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line["index"] for line in objects(data, capsys)] == list(range(8))
    (line,) = objects([*data, "--split-name", "valid", "--index", "30"], capsys)
    assert all(48 <= document < 60 for _, document, _, _ in line["pieces"])


def test_a_step_takes_what_the_run_consumes(data: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--global-batch-size", "6", "--micro-batch-size", "2", "--train-iters", "10", "--eval-iters", "1"]
    shown = objects([*data, *sizes, "--step", "3:5"], capsys)
    assert [(line["step"], line["index"]) for line in shown] == [(i // 6 + 1, i) for i in range(12, 24)]
    shown = objects([*data, *sizes, "--step", "1", "--dataloader-type", "cyclic"], capsys)
    assert sorted(line["index"] for line in shown) != list(range(6))


def test_a_step_of_a_batch_ramp(data: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--global-batch-size", "6", "--train-samples", "60", "--rampup-batch-size", "2", "2", "12"]
    # Two steps to 4 samples within 12, each for 6: 2 2 2, 4 4, then 6.
    shown = objects([*data, *sizes, "--eval-iters", "1", "--step", "3:7"], capsys)
    assert [line["step"] for line in shown] == [3] * 2 + [4] * 4 + [5] * 4 + [6] * 6
    assert [line["index"] for line in shown] == list(range(4, 20))


def test_text(data: Arguments, tiny_tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*data, "--num-samples", "200,0,0", "--index", "1"]
    lines = run([*flags, "--tokenizer-model", str(tiny_tokenizer_folder)], capsys).splitlines()
    assert lines[0].startswith("train: 251 samples of 8 tokens from ")
    assert lines[1].startswith("sample 1: epoch ")
    assert "of 2, loss on 8 tokens" in lines[1]
    (line,) = objects(flags, capsys)
    _, document, offset, length = line["pieces"][0]
    assert lines[2] == f"  dataset 0 ({data[1]}), document {document}, tokens {offset} to {offset + length} of 21"
    # Ids under 256 are bytes in this tokenizer, so the text is shorter than the ids that stand in without one.
    without = run(flags, capsys).splitlines()
    assert without[:3] == lines[:3]
    assert without[3].split()[:3] == [str(token) for token in line["tokens"][:3]]
    assert without[3] != lines[3]


def test_a_blend_names_its_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [write_random(tmp_path / name, [21] * 60, seed) for seed, name in enumerate("ab")]
    words = ["--data-path", "1", names[0], "3", names[1], "--seq-length", "8", "--split", "1"]
    shown = objects([*words, "--num-samples", "8,0,0"], capsys)
    assert [line["pieces"][0][0] for line in shown] == [1, 0, 1, 1, 0, 1, 1, 1]
    assert all(line["path"] == names[line["pieces"][0][0]] for line in shown)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--index", "999"], "has 125 samples"),
        (["--index", "3:3"], "range is empty"),
        (["--index", "a:b"], "FIRST:END"),
        (["--step", "0:2"], "steps count from 1"),
        (["--step", "1", "--index", "1"], "leave out --index"),
        (["--step", "1", "--split-name", "valid"], "leave out --index"),
        (["--step", "126"], "used up"),
        (["--split-name", "test"], "gives it no sample"),
        (["--num-samples", "1,2"], "three numbers"),
        (["--eod-mask-loss"], "--eod-id"),
        (["--load", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_cannot_be_shown(
    data: Arguments, flags: Arguments, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused([*data, *flags], capsys)
    assert message in error
    assert "Traceback" not in error


def test_the_sequence_length_must_be_given(data: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--seq-length" in refused(data[:2], capsys)


def test_ranges() -> None:
    assert parse_range("3", "--index") == (3, 4)
    assert parse_range("0:8", "--index") == (0, 8)
    assert parse_num_samples("600, None,2") == [600, None, 2]
    for text in ("1:2:3", "-1", ":", ""):
        with pytest.raises(UsageError):
            parse_range(text, "--index")


SWITCHES = {
    "eod_mask_loss": "--eod-mask-loss",
    "reset_position_ids": "--reset-position-ids",
    "reset_attention_mask": "--reset-attention-mask",
    "no_extra": "--no-add-extra-token-to-sequence",
    "keep_last_valid": "--no-drop-last-partial-validation-sequence",
    "inter_doc": "--dataloader-inter-document-masking",
}


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_same_as_megatron_from_the_command_line(shared: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared / "oracle" / "samples"
    expected = json.loads((folder / f"{case}.json").read_text())
    given = expected["args"]
    files = shared / "oracle" / "preprocess" / "files"
    flags = [switch for name, switch in SWITCHES.items() if given[name]]
    flags += ["--seq-length", str(given["seq"]), "--seed", str(given["seed"]), "--num-samples", given["samples"]]
    flags += ["--eod-id", str(given["eod"]), "--pad-id", str(given["pad"])]
    for name in ("prefix", "train", "valid", "test"):
        if given[name]:
            flag = "--data-path" if name == "prefix" else f"--{name}-data-path"
            flags += [flag, *(str(files / word) if "_" in word else word for word in given[name])]
    if given["prefix"]:
        flags += ["--split", given["split"]]
    with np.load(folder / f"{case}.npz") as arrays:
        for name in ("train", "valid", "test"):
            if expected[name] is None:
                continue
            shown = objects([*flags, "--split-name", name, "--index", "0:4"], capsys)
            assert len(shown) == min(4, expected[name]["len"])
            for row, line in enumerate(shown):
                for key in ("tokens", "labels", "loss_mask", "position_ids"):
                    assert line[key] == arrays[f"{name}/samples/{key}"][row].tolist(), (name, row, key)
                sample: Any = {"segments": np.array(line.get("segments", []))}
                if (key := f"{name}/samples/cu_seqlens") in arrays:
                    assert np.array_equal(boundaries(sample, given["seq"]), arrays[key][row])
                if (key := f"{name}/samples/attention_mask") in arrays:
                    assert np.array_equal(np.packbits(dense_mask(sample, given["seq"])), arrays[key][row])
