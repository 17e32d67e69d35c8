"""Options of training under layouts: all that is logged of a run is what one process logs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.layouts.harness import forget, train
from tests.layouts.layouts import arguments, marked

# What differs from run to run.
_CLOCKS = ("time", "iteration_time", "tokens_per_s", "loader_stall_s", "peak_memory_bytes", "throughput")
_TP2, _SP, _PP2 = "--tensor-model-parallel-size 2 ", "--sequence-parallel ", "--pipeline-model-parallel-size 2 "
_CP2, _EP2 = "--context-parallel-size 2 ", "--expert-model-parallel-size 2 "
_VPP = _PP2 + "--num-layers-per-virtual-pipeline-stage 1 "
_NORMS = "--log-num-zeros-in-grad --log-params-norm "
_ROUNDED = "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 "


@dataclass(frozen=True)
class Case:
    """`flags` are of the layout, `options` of one process, too. `tolerance` is relative."""

    name: str
    num_processes: int
    flags: str
    options: str
    family: str = "qwen2"
    variant: str = "plain"
    tolerance: float = 1e-5


CASES = (
    Case("stages by a list, rates of their own", 2, _PP2 + "--num-layer-list 0,4",
         _NORMS + "--decoupled-lr 1e-2 --z-loss-coeff 0.01 --full-validation --micro-batch-size 2"),
    Case("places without layers", 2, _PP2 + "--noop-layers 0,7,2,4 --num-layers-per-virtual-pipeline-stage 2",
         _NORMS, "qwen2-tied"),
    Case("SGD on shards", 4, _PP2 + "--use-distributed-optimizer", _NORMS + "--optimizer sgd", "qwen2-tied"),
    Case("rounded state, tied", 2, _VPP, _ROUNDED, "qwen2-tied", tolerance=3e-5),
    Case("rests of the validation set", 4, _PP2 + "--data-parallel-sharding-strategy optim_grads_params",
         "--full-validation --micro-batch-size 2", variant="documents"),
    Case("fp16 that overflows", 4, _TP2 + _SP + _PP2,
         "--log-params-norm --fp16 --initial-loss-scale 1048576 --hysteresis 1 --eval-iters 0", "qwen2-tied",
         tolerance=1e-3),
    Case("z-loss on every axis", 8, _TP2 + _PP2 + _CP2, "--z-loss-coeff 0.01"),
    Case("z-loss, split backward", 2, _PP2 + "--pipeline-schedule zbv", "--z-loss-coeff 0.01"),
    Case("mixture, split backward", 4, _VPP + _EP2 + "--pipeline-schedule interleaved-zero-bubble", _NORMS,
         "qwen2-moe"),
    Case("mixture, experts on more replicas than others", 2, _TP2 + _SP + "--expert-tensor-parallel-size 1", _NORMS,
         "qwen3-moe"),
    Case("mixture, balanced by the global batch", 2, _TP2 + _SP + _EP2 + "--expert-tensor-parallel-size 1",
         "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.5", "qwen3-moe"),
    Case("mixture, balanced by sequence and bias", 2, _CP2 + _EP2,
         "--moe-router-load-balancing-type seq_aux_loss --moe-router-score-function sigmoid "
         "--moe-router-enable-expert-bias", "qwen3-moe"),
    Case("mixture, loss by token", 2, _EP2, _NORMS + "--moe-aux-loss-coeff 0.5", "mixtral", "per-token"),
)  # fmt: skip
QUICK = frozenset({"stages by a list, rates of their own"})


def rows(save: Path) -> list[dict[str, Any]]:
    """All that a run logged, without its clocks."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _CLOCKS} for line in lines]


@pytest.mark.parametrize("case", marked(CASES, QUICK, key=lambda case: case.name))
def test_a_layout_logs_what_one_process_does(case: Case, work: Path) -> None:
    logged = []
    for num_processes, flags in ((1, ""), (case.num_processes, case.flags)):
        save = work / f"options-{num_processes}"
        line = arguments(f"{flags} --train-iters 4 {case.options}", case.family, case.variant, work)
        train(num_processes, line, save)
        logged.append(rows(save))
        forget(save)
    expected, found = logged
    assert len(expected) == len(found) >= 4
    for row, other in zip(found, expected, strict=True):
        assert row.pop("kind") == other.pop("kind")
        assert row == pytest.approx(other, rel=case.tolerance)


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


@pytest.mark.layouts
def test_other_replicas_of_shuffled_data_are_told_of(work: Path) -> None:
    flags = arguments("--dataloader-type cyclic --train-iters 4", "qwen2", "plain", work)
    save = work / "cyclic"
    train(1, [*flags, "--exit-interval", "2"], save)
    train(2, flags, save)
    said = (work / "cyclic.ranks" / "0.err").read_text()
    assert "cyclic deals samples out by data-parallel replicas, as Megatron does, and there were 1:" in said
    forget(save)
