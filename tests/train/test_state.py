"""State in fewer bits: what is lost, and that rounding at random keeps the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.train.state import BLOCK, Blockwise, _below, dynamic_values, local_state, read, write

CPU = torch.device("cpu")


@pytest.mark.parametrize("signed", [True, False])
def test_the_codes(signed: bool) -> None:
    values = dynamic_values(signed, CPU)
    assert len(values) == (255 if signed else 256)
    assert torch.equal(values, values.unique())
    assert values[-1] == 1.0 and (values == 0).sum() == 1
    assert torch.equal(values, -values.flip(0)) is signed
    assert values[values > 0].min() < 1e-5


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_found_as_by_a_search(signed: bool) -> None:
    values = dynamic_values(signed, CPU)
    numbers = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) ** 3
    numbers = torch.cat((numbers, -numbers, -values, torch.tensor([-1.0]))) if signed else numbers
    edges = [torch.nextafter(values, torch.tensor(end)) for end in (-1.0, 1.0)]
    numbers = torch.cat((numbers, values, *edges)).clamp(-1.0 if signed else 0.0, 1.0)
    expected = (torch.bucketize(numbers, values, right=True) - 1).clamp(max=len(values) - 2)
    assert torch.equal(_below(numbers, signed), expected.to(torch.int32))


def _kept(values: Tensor, signed: bool, generator: torch.Generator | None = None) -> tuple[Tensor, Blockwise]:
    kept = Blockwise.zeros(values, signed, CPU)
    whole = slice(0, values.numel())
    write(local_state(kept, signed), whole, values.clone(), generator)
    return kept.decoded(), kept


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("num", [BLOCK * 40, BLOCK * 3 + 17, 5])
def test_the_error_is_half_a_step_between_codes(signed: bool, num: int) -> None:
    generator = torch.Generator().manual_seed(num)
    values = torch.randn(num, generator=generator) * 10.0 ** torch.randint(-6, 1, (num,), generator=generator)
    values = values if signed else values.square()
    shown, _ = _kept(values, signed)
    roots, shown_roots = (values, shown) if signed else (values.sqrt(), shown.sqrt())
    for begin in range(0, num, BLOCK):
        block, found = roots[begin : begin + BLOCK], shown_roots[begin : begin + BLOCK]
        relative = block.abs() / block.abs().max()
        error = (found - block).abs() / block.abs().max()
        # In the decade of 10^-d, steps are 0.9 x 10^-d / 2^(6 - d), for the unsigned half of that.
        decade = (-relative.log10()).floor().clamp(0, 6)
        largest = 0.9 * 10.0**-decade / 2 ** (6 - decade) / 2 / (1 if signed else 2)
        # Around a power of ten, and above the last code of a decade, the step is that of two decades' ends.
        assert (error <= largest * 1.6 + 1e-6).all()
        assert (error[relative >= 0.2] <= (0.0071 if signed else 0.0036)).all()


def test_largest_of_a_block_and_zero_are_exact() -> None:
    values = torch.zeros(BLOCK * 2)
    values[3], values[BLOCK + 9] = -0.3, 7e-20
    shown, kept = _kept(values, True)
    assert torch.equal(shown, values)
    assert kept.scales.tolist() == pytest.approx([0.3, 7e-20])


def test_only_zero_becomes_zero_in_the_second_moment() -> None:
    values = torch.full((BLOCK,), 1e-20)
    values[0], values[1] = 1.0, 0.0
    shown, _ = _kept(values, False)
    assert shown[1] == 0 and shown[0] == 1.0
    assert (shown[2:] > 1e-20).all() and (shown[2:] < 1e-12).all()


@pytest.mark.parametrize("kind", ["bf16", "8bit"])
def test_rounding_at_random_keeps_the_mean(kind: str) -> None:
    """A second moment that is only ever multiplied by 0.999 falls as it should; to the nearest, it would stay."""
    num, steps = BLOCK * 64, 400
    start = torch.rand(num, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    start[::BLOCK] = 1.0

    def after(at_random: bool) -> Tensor:
        kept: Any = torch.zeros(num, dtype=torch.bfloat16) if kind == "bf16" else Blockwise.zeros(start, False, CPU)
        held, whole = local_state(kept, False), slice(0, num)
        write(held, whole, start.clone())
        # A block's largest stays, so that the others fall against it.
        for step in range(steps):
            values = read(held, whole) * 0.999
            values[::BLOCK] = 1.0
            write(held, whole, values, torch.Generator().manual_seed(step) if at_random else None)
        return read(held, whole)

    rest = torch.ones(num, dtype=torch.bool)
    rest[::BLOCK] = False
    expected = start[rest].mean() * 0.999**steps
    assert float(after(True)[rest].mean()) == pytest.approx(float(expected), rel=0.02)
    assert float(after(False)[rest].mean()) > 1.3 * expected
