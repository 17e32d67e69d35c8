"""Every layout trains as one process does: loss, gradient norm, weights and samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.layouts.conftest import Reference
from tests.layouts.harness import compare, forget, read, train
from tests.layouts.layouts import CASES, Case, arguments

LARGEST_DEVIATION = 1e-5
SMALLEST_SHARE = 0.999


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
