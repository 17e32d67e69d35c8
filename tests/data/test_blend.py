from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tessel.data.blend import (
    Blend,
    BlendedDataset,
    blending_indices,
    exhaustive_indices,
    normalize,
    parse_blend,
    share_sizes,
)
from tessel.data.samples import GPTDataset, SampleOptions
from tessel.errors import TesselError, UsageError

from .datasets import open_random


def greedy(weights: list[float], size: int, limits: list[int] | None = None) -> tuple[list[int], list[int]]:
    """The rule, one step after another."""
    taken = [0] * len(weights)
    datasets, samples = [], []
    for step in range(size):
        best, most = -1, -float("inf")
        for d, weight in enumerate(weights):
            if limits is not None and taken[d] >= limits[d]:
                continue
            error = weight * float(max(step, 1)) - float(taken[d])
            if error > most:
                best, most = d, error
        datasets.append(best)
        samples.append(taken[best])
        taken[best] += 1
    return datasets, samples


WEIGHTS = [[0.7, 0.3], [1, 1, 1, 1], [1 / 3] * 3, [0.5, 0.25, 0.25], [1e-5, 1], [5, 4, 3, 2, 1, 0.1], [1]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 2049, 20_000])
def test_blend_is_the_greedy_rule(weights: list[float], size: int) -> None:
    weights = normalize(weights)
    datasets, samples = blending_indices(weights, size)
    assert (datasets.dtype, samples.dtype) == (np.int16, np.int64)
    assert (datasets.tolist(), samples.tolist()) == greedy(weights, size)


@pytest.mark.parametrize("seed", range(4))
def test_blend_of_random_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Weights of many sizes are the hard case: guessed starts are forgotten slowly.
    weights = normalize((rng.dirichlet(np.full(15, 0.2)) + 1e-6).tolist())
    datasets, samples = blending_indices(weights, 12_000)
    assert (datasets.tolist(), samples.tolist()) == greedy(weights, 12_000)


@pytest.mark.parametrize("sizes", [[554, 551], [1, 9000], [3, 3, 3], [2500, 1, 40, 2501, 7]], ids=str)
def test_exhaustive_blend_gives_every_sample_once(sizes: list[int]) -> None:
    datasets, samples = exhaustive_indices(sizes)
    weights = [size / float(sum(sizes)) for size in sizes]
    assert (datasets.tolist(), samples.tolist()) == greedy(weights, sum(sizes), sizes)
    assert np.bincount(datasets).tolist() == sizes


def test_blends_are_megatron_cores() -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers", reason="megatron-core is not installed")
    rng = np.random.default_rng(0)
    for num_datasets in (2, 9, 40):
        weights = normalize(rng.random(num_datasets).tolist())
        theirs = np.zeros(100_000, np.int16), np.zeros(100_000, np.int64)
        helpers.build_blending_indices(*theirs, np.array(weights), num_datasets, 100_000, False)
        assert all(np.array_equal(a, b) for a, b in zip(blending_indices(weights, 100_000), theirs, strict=True))
        sizes = rng.integers(1, 3000, num_datasets)
        theirs = np.zeros(sizes.sum(), np.int16), np.zeros(sizes.sum(), np.int64)
        helpers.build_exhaustive_blending_indices(*theirs, sizes, num_datasets)
        assert all(np.array_equal(a, b) for a, b in zip(exhaustive_indices(sizes.tolist()), theirs, strict=True))


def test_sizes_of_the_parts() -> None:
    assert share_sizes([0.7, 0.3], 600) == [420, 180]
    assert share_sizes([0.7, 0.3], 600, 0.005) == [423, 181]
    assert share_sizes(normalize([1, 1, 1]), 10) == [4, 4, 4]


def test_path_forms() -> None:
    assert parse_blend(["a"], "--data-path") == Blend(("a",), None)
    assert parse_blend(["a", "b"], "--data-path") == Blend(("a", "b"), None)
    assert parse_blend(["a", "b", "c"], "--data-path") == Blend(("a", "b", "c"), None)
    assert parse_blend(["30", "a", "7e1", "b"], "--data-path") == Blend(("a", "b"), (30.0, 70.0))
    assert parse_blend(["1", "a"], "--data-path") == Blend(("a",), (1.0,))


@pytest.mark.parametrize("items", [["1", "a", "b", "c"], ["0", "a", "1", "b"], ["-1", "a"], ["inf", "a"], ["nan", "a"]])
def test_mixed_path_forms_are_refused(items: list[str]) -> None:
    with pytest.raises(UsageError, match="--train-data-path: .* stands where a positive weight is expected"):
        parse_blend(items, "--train-data-path")


def _datasets(tmp_path: Path, num_samples: int | None) -> list[GPTDataset]:
    options = SampleOptions(8)
    parts = [open_random(tmp_path / name, [20] * 6, seed) for seed, name in enumerate("ab")]
    return [GPTDataset(part, np.arange(6, dtype=np.int32), num_samples, options) for part in parts]


def test_samples_come_from_the_parts(tmp_path: Path) -> None:
    parts = _datasets(tmp_path, None)
    blended = BlendedDataset(parts, [3, 1], 12)
    assert len(blended) == 12
    for i in range(12):
        dataset, sample = blended.locate(i)
        assert np.array_equal(blended[i]["tokens"], parts[dataset][sample]["tokens"])


def test_a_part_that_is_too_small_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TesselError, match="--mid-level-dataset-surplus"):
        BlendedDataset(_datasets(tmp_path, None), [1, 1], 40)


def test_a_part_without_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TesselError, match="holds not one sample"):
        BlendedDataset(_datasets(tmp_path, None), [14, 0], 10)
