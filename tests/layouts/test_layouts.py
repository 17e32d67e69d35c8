"""Every layout trains as one process does: loss, gradient norm, weights and samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layouts.conftest import DEVIATION, Reference
from tests.layouts.harness import Deviation, compare, forget, read, train
from tests.layouts.layouts import CASES, QUICK, Case, arguments, marked

LARGEST_DEVIATION = 1e-5
SMALLEST_SHARE = 0.999


def row(case: Case, deviation: Deviation) -> str:
    """A line of the table."""
    cells = (
        case.name,
        case.num_processes,
        f"{case.family}, {case.variant}",
        f"{deviation.loss:.0e}",
        f"{deviation.grad_norm:.0e}",
        f"{100 * deviation.weights_within:.3f} %",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


@pytest.mark.parametrize("case", marked(CASES, QUICK, key=lambda case: case.name))
def test_a_layout_trains_as_one_process(
    case: Case, work: Path, reference: Reference, record_property: Callable[[str, object], None]
) -> None:
    expected = reference(*case.reference)
    save = work / case.name.replace(" ", "-")
    train(case.num_processes, arguments(case.flags, case.family, case.variant, work), save)
    outcome = read(save, case.num_processes)
    forget(save)
    assert outcome.samples == expected.samples
    deviation = compare(outcome, expected)
    record_property(DEVIATION, (case.name, row(case, deviation)))
    assert deviation.loss <= LARGEST_DEVIATION
    assert deviation.grad_norm <= LARGEST_DEVIATION
    assert deviation.weights_within >= SMALLEST_SHARE
    assert outcome.evaluations == pytest.approx(expected.evaluations, rel=LARGEST_DEVIATION)
    assert expected.evaluations
