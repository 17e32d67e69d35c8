"""`tessel sft`: raw dialogues with nothing else said, epochs, and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessel.cli import main
from tests.data.instruct.dialogues import write_dialogues
from tests.train.runs import NULL_TOKENIZER

MakeFolder = Callable[..., Path]


def steps(save: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.fixture
def run(tiny_hf_folder: MakeFolder, tmp_path: Path) -> Callable[..., int]:
    data = write_dialogues(tmp_path / "data", [9, 20, 33, 12, 14, 7, 31, 28])
    common = ["sft", "--load", str(tiny_hf_folder("qwen2")), "--data", str(data), "--save", str(tmp_path / "run")]
    common += [*NULL_TOKENIZER, "--split", "100,0,0", "--eval-iters", "0", "--device", "cpu"]
    return lambda *more: main([*common, *more])


def test_epochs_say_how_long(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    assert run("--epochs", "2", "--global-batch-size", "4", "--micro-batch-size", "2") == 0
    said = capsys.readouterr()
    assert "2 epochs of 8 samples: 4 iterations" in said.out + said.err
    assert "not given, and taken to be: seq-length" in said.err
    assert [line["consumed_samples"] for line in steps(tmp_path / "run")] == [4, 8, 12, 16]
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


def test_adapters_have_a_rate_of_their_own(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    assert run("--lora-r", "2", "--train-iters", "1", "--print-config") == 0
    assert "0.0001" in capsys.readouterr().out
    assert run("--lora-r", "2", "--train-iters", "2") == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_epochs_and_iterations_contradict_each_other(run: Callable[..., int], capsys: Any) -> None:
    assert run("--epochs", "2", "--train-iters", "4") == 2
    assert "--num-train-epochs and --train-iters" in capsys.readouterr().err
    assert run("--epochs", "0") == 2
    assert "must be above 0" in capsys.readouterr().err


def test_throughput_counts_the_positions_that_there_were(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--train-iters", "4", "--global-batch-size", "2", "--micro-batch-size", "1", "--no-shuffle") == 0
    lengths = [line["tokens"] for line in steps(tmp_path / "run")]
    assert lengths == [16 + 24, 40 + 16, 16 + 8, 32 + 32]
