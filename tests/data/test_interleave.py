"""The greedy rule side by side is the greedy rule step by step, whatever the weights."""

from __future__ import annotations

import numpy as np
import pytest

from tessel.data.blend import normalize
from tessel.data.interleave import interleave


def step_by_step(weights: np.ndarray, size: int, limits: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The rule as it is written in helpers.cpp."""
    taken = np.zeros(len(weights))
    datasets, samples = np.empty(size, np.int16), np.empty(size, np.int64)
    for step in range(size):
        errors = weights * float(max(step, 1)) - taken
        if limits is not None:
            errors[taken >= limits] = -np.inf
        datasets[step] = errors.argmax()
        samples[step] = taken[datasets[step]]
        taken[datasets[step]] += 1
    return datasets, samples


def assert_greedy(weights: np.ndarray, size: int, limits: np.ndarray | None = None) -> None:
    expected = step_by_step(weights, size, limits)
    ours = interleave(weights, size, limits)
    assert (ours[0].dtype, ours[1].dtype) == (np.int16, np.int64)
    for mine, other in zip(ours, expected, strict=True):
        assert np.array_equal(mine, other)


def random_weights(rng: np.random.Generator, kind: str, num: int) -> np.ndarray:
    drawn = {
        "even": lambda: rng.random(num) + 1e-3,
        "uneven": lambda: rng.dirichlet(np.full(num, 0.2)) + 1e-6,
        "one large": lambda: np.where(np.arange(num) == num // 2, 1.0, rng.random(num) * 1e-3 + 1e-7),
        "whole numbers": lambda: rng.integers(1, 9, num).astype(float),
        "counted": lambda: np.arange(1.0, num + 1),
        "two decimals": lambda: rng.integers(1, 100, num) / 100,
        "equal": lambda: np.ones(num),
        "powers of two": lambda: 2.0 ** -rng.integers(0, 9, num),
        "pairs": lambda: np.repeat(rng.random(-(-num // 2)) + 0.01, 2)[:num],
    }[kind]()
    return np.array(normalize(drawn.tolist()))


KINDS = ("even", "uneven", "one large", "whole numbers", "counted", "two decimals", "equal", "powers of two", "pairs")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [1, 2, 3, 11, 60])
def test_weights_of_every_kind(kind: str, num: int) -> None:
    rng = np.random.default_rng(num)
    assert_greedy(random_weights(rng, kind, num), 20_011)


@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 1087, 1088, 1089, 5000])
def test_sizes_at_the_edges(size: int) -> None:
    assert_greedy(random_weights(np.random.default_rng(1), "even", 5), size)


@pytest.mark.parametrize("seed", range(8))
def test_until_all_are_spent(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 30))
    sizes = (
        rng.choice([3, 700, 701, 1500], num) if seed % 2 else np.maximum(rng.lognormal(5, 2, num).astype(int), 1)
    ).astype(float)
    total = int(sizes.sum())
    assert_greedy(sizes / float(total), total, sizes)


def test_many_small_ones_beside_a_large_one() -> None:
    """The large one falls far behind while the small ones take turns, and catches up when they are spent."""
    sizes = np.array([1.0] * 400 + [30_000.0])
    assert_greedy(sizes / sizes.sum(), int(sizes.sum()), sizes)


def test_more_than_256_weights() -> None:
    assert_greedy(random_weights(np.random.default_rng(2), "even", 300), 12_000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_as_megatrons_helper_over_many_steps(seed: int) -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers", reason="megatron-core is not installed")
    rng = np.random.default_rng(seed)
    weights = random_weights(rng, KINDS[seed % len(KINDS)], int(rng.integers(1, 80)))
    size = int(rng.integers(500_000, 3_000_000))
    theirs = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(*theirs, weights, len(weights), size, False)
    for mine, other in zip(interleave(weights, size, None), theirs, strict=True):
        assert np.array_equal(mine, other)
    sizes = rng.integers(1, 40_000, len(weights))
    total = int(sizes.sum())
    theirs = np.zeros(total, np.int16), np.zeros(total, np.int64)
    helpers.build_exhaustive_blending_indices(*theirs, sizes, len(sizes))
    limits = sizes.astype(float)
    for mine, other in zip(interleave(limits / float(total), total, limits), theirs, strict=True):
        assert np.array_equal(mine, other)
