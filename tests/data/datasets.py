"""Small random datasets for the tests of tessel.data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter

EOD = 7


def write_random(prefix: Path, lengths: list[int], seed: int = 0, vocab_size: int = 50, dtype: str = "u2") -> str:
    """One document of random ids for each length; ids reach EOD by chance, too."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for length in lengths:
            writer.add_document(rng.integers(0, vocab_size, length))
    return str(prefix)


def random_lengths(seed: int, num_documents: int, longest: int = 40) -> list[int]:
    """Document lengths with some zeros among them."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num_documents) < 0.15, 0, rng.integers(0, longest, num_documents)).tolist()


def open_random(prefix: Path, lengths: list[int], seed: int = 0, vocab_size: int = 50) -> IndexedDataset:
    """Write and open one."""
    return IndexedDataset(write_random(prefix, lengths, seed, vocab_size))
