"""Options of training under layouts: what they log is what one process logs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.layouts.harness import forget, train
from tests.layouts.layouts import arguments

# What differs from run to run, or is a place.
_CLOCKS = ("time", "iteration_time", "tokens_per_s", "loader_stall_s", "peak_memory_bytes", "throughput")
_TP2, _SP, _PP2 = "--tensor-model-parallel-size 2 ", "--sequence-parallel ", "--pipeline-model-parallel-size 2 "


def rows(save: Path) -> list[dict[str, Any]]:
    """All that a run logged, without its clocks."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _CLOCKS} for line in lines]


def test_padding_does_not_come_back_from_a_checkpoint(work: Path) -> None:
    """67 rows on two processes: one of padding, which a checkpoint does not hold. Memory is NaN until it is written."""
    flags = arguments(_TP2 + "--deterministic-mode --log-params-norm --train-iters 4", "qwen2", "plain", work)
    save = work / "padding"
    train(2, flags, save)
    whole = rows(save)
    forget(save)
    train(2, [*flags, "--exit-interval", "2"], save)
    train(2, flags, save)
    assert rows(save) == whole
    forget(save)
