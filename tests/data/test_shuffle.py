"""The fast shuffle is numpy's own, and so are the numbers that come after it."""

from __future__ import annotations

import numpy as np
import pytest

from tessel.data.shuffle import shuffle


@pytest.mark.parametrize("num", [0, 1, 2, 3, 100, 4095, 4096, 4097, 70_001, (1 << 17) - 1, 1 << 17, (1 << 17) + 1])
@pytest.mark.parametrize("bulk_from", [2, 50, 1000])
def test_as_numpy_shuffles(num: int, bulk_from: int) -> None:
    for seed, dtype in enumerate((np.int32, np.uint32, np.int64)):
        expected = np.arange(num, dtype=dtype)
        ours, theirs = np.random.RandomState(seed), np.random.RandomState(seed)
        theirs.shuffle(expected)
        values = np.arange(num, dtype=dtype)
        shuffle(values, ours, bulk_from=bulk_from)
        assert np.array_equal(values, expected)
        assert ours.randint(0, 1 << 30, 5).tolist() == theirs.randint(0, 1 << 30, 5).tolist()


def test_values_that_repeat_and_a_part_of_an_array() -> None:
    values = np.tile(np.arange(7, dtype=np.int32), 20_000)
    expected = values.copy()
    np.random.RandomState(3).shuffle(expected[11:100_000])
    shuffle(values[11:100_000], np.random.RandomState(3), bulk_from=500)
    assert np.array_equal(values, expected)


@pytest.mark.slow
def test_as_numpy_shuffles_at_its_own_size() -> None:
    values, expected = np.arange(12_000_000, dtype=np.int32), np.arange(12_000_000, dtype=np.int32)
    shuffle(values, np.random.RandomState(5))
    np.random.RandomState(5).shuffle(expected)
    assert np.array_equal(values, expected)
