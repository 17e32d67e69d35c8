"""Every layout trains as one process does: loss, gradient norm, weights and samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layouts.harness import Outcome, compare, forget, read, train
from tests.layouts.layouts import CASES, Case, arguments

LARGEST_DEVIATION = 1e-5
SMALLEST_SHARE = 0.999

Reference = Callable[[str, str], Outcome]


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="session")
def reference(work: Path) -> Reference:
    """The run of one process, once for each family and variant."""
    known: dict[tuple[str, str], Outcome] = {}

    def of(family: str, variant: str) -> Outcome:
        if (family, variant) not in known:
            save = work / f"one-{family}-{variant}"
            train(1, arguments("", family, variant, work), save)
            known[family, variant] = read(save, 1)
        return known[family, variant]

    return of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_trains_as_one_process(case: Case, work: Path, reference: Reference) -> None:
    expected = reference(*case.reference)
    save = work / case.name.replace(" ", "-")
    train(case.num_processes, arguments(case.flags, case.family, case.variant, work), save)
    outcome = read(save, case.num_processes)
    forget(save)
    assert outcome.samples == expected.samples
    deviation = compare(outcome, expected)
    assert deviation.loss <= LARGEST_DEVIATION
    assert deviation.grad_norm <= LARGEST_DEVIATION
    assert deviation.weights_within >= SMALLEST_SHARE
    assert outcome.evaluations == pytest.approx(expected.evaluations, rel=LARGEST_DEVIATION)
    assert expected.evaluations
