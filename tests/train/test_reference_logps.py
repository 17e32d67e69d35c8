"""Reference log-probabilities that were computed before: the same run, from a file that is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel.cli import main
from tests.data.instruct.dialogues import write_pairs
from tests.train.runs import NULL_TOKENIZER, tessel

MakeFolder = Callable[..., Path]
BEFORE = "--precompute-ref-log-probs"


@pytest.fixture
def flags(tiny_hf_folder: MakeFolder, tmp_path: Path) -> list[str]:
    data = write_pairs(tmp_path / "pairs", 7)
    run = ["dpo", "--load", str(tiny_hf_folder("qwen2")), "--data", str(data), *NULL_TOKENIZER, "--device", "cpu"]
    run += "--split 100,0,0 --lr 1e-2 --lr-decay-style constant --lr-warmup-fraction 0 --weight-decay 0".split()
    return [*run, *"--train-iters 3 --global-batch-size 4 --micro-batch-size 2 --seq-length 64".split()]


def rows(save: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "loss" in k or "/" in k} for line in lines if line["kind"] == "train"]


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("**/*_ref_log_probs_*.npz")
    return path


def same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("more", [[], ["--lora-r", "4", "--qlora"]])
def test_the_same_run(more: list[str], flags: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main([*flags, *more, "--save", str(tmp_path / "plain")]) == 0
    assert main([*flags, *more, BEFORE, "--save", str(tmp_path / "first")]) == 0
    assert "wrote the reference log-probabilities" in capsys.readouterr().out
    assert main([*flags, *more, BEFORE, "--save", str(tmp_path / "second")]) == 0
    told = capsys.readouterr().out
    assert "reference log-probabilities: " in told and "computing the reference" not in told
    assert "reference: " not in told.replace("reference log-probabilities: ", ""), "no second model is read"
    plain = rows(tmp_path / "plain")
    same(rows(tmp_path / "first"), plain)
    same(rows(tmp_path / "second"), plain)
    with np.load(the_file(tmp_path)) as file:
        assert len(file["digests"]) == 14, "two answers of 7 pairs"


def test_on_two_replicas(flags: list[str], tmp_path: Path) -> None:
    assert main([*flags, "--save", str(tmp_path / "one")]) == 0
    tessel([*flags, BEFORE, "--save", str(tmp_path / "two"), "--nproc-per-node", "2"])
    same(rows(tmp_path / "two"), rows(tmp_path / "one"))


def test_another_model_has_another_file(flags: list[str], tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    assert main([*flags, BEFORE]) == 0
    first = the_file(tmp_path)
    other = tiny_hf_folder("qwen2", seed=1)
    assert main([*flags, BEFORE, "--ref-model", str(other)]) == 0
    assert len(list(first.parent.glob("*_ref_log_probs_*.npz"))) == 2


def test_files_that_are_refused(flags: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main([*flags, BEFORE]) == 0
    path = the_file(tmp_path)
    with np.load(path) as file:
        digests, logps, num_pairs = file["digests"], file["logps"], file["num_pairs"]
    for changed, match in (
        ({"digests": digests + 1, "logps": logps, "num_pairs": num_pairs}, "lacks an answer of the data"),
        ({"digests": digests, "logps": logps, "num_pairs": num_pairs + 1}, "is of 8 pairs, and the run's data has 7"),
        ({"digests": digests}, "is damaged"),
    ):
        np.savez(path, **changed)
        capsys.readouterr()
        assert main([*flags, BEFORE]) == 1
        assert match in "".join(capsys.readouterr())


def test_only_for_preferences(flags: list[str], capsys: Any) -> None:
    assert main(["sft", *flags[1:], BEFORE]) == 2
    assert f"{BEFORE} is for preferences" in capsys.readouterr().err
