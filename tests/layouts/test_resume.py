"""A run goes on from any layout on any other: optimizer, schedule and data position with it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.layouts.conftest import Reference
from tests.layouts.harness import compare, forget, read, train
from tests.layouts.layouts import arguments, marked

FAMILY, VARIANT = "qwen2-tied", "documents"
MOE_FAMILY, MOE_VARIANT = "qwen3-moe", "plain"
HALF = 5

_TP2, _SP, _PP2 = "--tensor-model-parallel-size 2 ", "--sequence-parallel ", "--pipeline-model-parallel-size 2 "
LAYOUTS: dict[str, tuple[int, str]] = {
    "one process": (1, ""),
    "TP2 PP2": (4, _TP2 + _SP + _PP2),
    "DP4 sharded": (4, "--data-parallel-sharding-strategy optim_grads_params"),
    "CP2 DP2": (4, "--context-parallel-size 2 --use-distributed-optimizer"),
    "PP2 VPP2": (2, _PP2 + "--num-layers-per-virtual-pipeline-stage 1"),
    "TP4": (4, "--tensor-model-parallel-size 4"),
}
MOE_LAYOUTS: dict[str, tuple[int, str]] = {
    "one process": (1, ""),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "EP2 ETP2": (4, "--expert-model-parallel-size 2 --expert-tensor-parallel-size 2"),
    "TP2 EP2 PP2": (4, _TP2 + _SP + _PP2 + "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
}


def half(name: str, layouts: dict[str, tuple[int, str]], family: str, variant: str, work: Path) -> Path:
    """The first half of a run on a layout; trained once."""
    save = work / f"half-{family}-{name}".replace(" ", "-")
    if not save.exists():
        num_processes, flags = layouts[name]
        train(num_processes, [*arguments(flags, family, variant, work), "--exit-interval", str(HALF)], save)
    return save


def go_on(source: str, target: str, layouts: dict[str, tuple[int, str]], family: str, variant: str, work: Path) -> Path:
    """The second half, on another layout, from a copy of the first."""
    save = work / f"{family}-{source}-to-{target}".replace(" ", "-")
    shutil.copytree(half(source, layouts, family, variant, work), save)
    num_processes, flags = layouts[target]
    train(num_processes, arguments(flags, family, variant, work), save)
    return save


def pairs(layouts: dict[str, tuple[int, str]], *quick: str) -> list[Any]:
    """Every layout with every other one, and with itself."""
    return marked(itertools.product(layouts, layouts), quick, key=" to ".join)


@pytest.mark.parametrize("pair", pairs(LAYOUTS, "TP2 PP2 to DP4 sharded", "DP4 sharded to one process"))
def test_a_run_goes_on_elsewhere(pair: tuple[str, str], work: Path, reference: Reference) -> None:
    source, target = pair
    expected = reference(FAMILY, VARIANT)
    save = go_on(source, target, LAYOUTS, FAMILY, VARIANT, work)
    outcome = read(save, LAYOUTS[target][0])
    forget(save)
    assert outcome.samples == expected.samples[HALF:]
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
    assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    assert outcome.evaluations == pytest.approx(expected.evaluations, rel=1e-5)


@pytest.mark.parametrize("pair", pairs(MOE_LAYOUTS, "EP2 to TP2 EP2 PP2"))
def test_a_mixture_goes_on_elsewhere(pair: tuple[str, str], work: Path, reference: Reference) -> None:
    source, target = pair
    expected = reference(MOE_FAMILY, MOE_VARIANT)
    save = go_on(source, target, MOE_LAYOUTS, MOE_FAMILY, MOE_VARIANT, work)
    outcome = read(save, MOE_LAYOUTS[target][0])
    forget(save)
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
    assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    assert compare(outcome, expected).weights_within >= 0.999
