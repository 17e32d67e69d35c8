"""What the tokens of a dataset say: special ones, and documents that are there more than once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tessel.data.indexed import IndexedDataset

# More is not read: a look at a dataset should take seconds.
MOST_TOKENS = 300_000_000
_CHUNK_TOKENS = 1 << 20
# splitmix64, a generator of Steele, Lea and Flood, whose last steps make a good hash of a number.
_GOLDEN, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass
class Contents:
    """What was found in the first `num_documents` documents, of `num_tokens` tokens.

    `special` counts tokens by id; `num_duplicates` are documents that repeat an earlier one, token for token.
    """

    num_documents: int = 0
    num_tokens: int = 0
    num_duplicates: int = 0
    special: dict[int, int] = field(default_factory=dict)


def scan(indexed: IndexedDataset, special_ids: Sequence[int], most_tokens: int = MOST_TOKENS) -> Contents:
    """Read the documents of a dataset of ids, from the first on, up to `most_tokens` tokens."""
    found = Contents(special=dict.fromkeys(sorted(special_ids), 0))
    wanted = np.array(list(found.special), np.int64)
    hashes = []
    for tokens, ends in _documents(indexed, most_tokens):
        found.num_documents += len(ends)
        found.num_tokens += len(tokens)
        if len(wanted):
            places = np.minimum(np.searchsorted(wanted, tokens), len(wanted) - 1)
            counts = np.bincount(places[wanted[places] == tokens], minlength=len(wanted))
            for token, count in zip(wanted.tolist(), counts.tolist(), strict=True):
                found.special[token] += count
        hashes.append(document_hashes(tokens, ends))
    if hashes:
        every = np.concatenate(hashes)
        found.num_duplicates = len(every) - len(np.unique(every))
    return found


def document_hashes(tokens: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """u64[d]: a hash of each document that holds tokens; `ends` are where documents end in `tokens`."""
    starts = np.concatenate((ends[:0], [0], ends[:-1])).astype(np.int64)
    filled = ends > starts
    starts, ends = starts[filled], ends[filled]
    if not len(starts):
        return np.zeros(0, np.uint64)
    positions = np.arange(len(tokens), dtype=np.int64) - np.repeat(starts, ends - starts)
    numbers = tokens.astype(np.int64).view(np.uint64) + (positions.view(np.uint64) << np.uint64(32))
    numbers = (numbers + np.uint64(1)) * _GOLDEN
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _FIRST
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _SECOND
    numbers ^= numbers >> np.uint64(31)
    return np.add.reduceat(numbers, starts)


def _documents(indexed: IndexedDataset, most_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of whole documents: their tokens, and where each of them ends."""
    lengths = np.concatenate(([0], np.cumsum(indexed.lengths, dtype=np.int64)))
    ends = lengths[indexed.document_indices[1:]]
    first, before = 0, 0
    while first < len(ends) and before < most_tokens:
        last = max(int(np.searchsorted(ends, before + _CHUNK_TOKENS, side="right")), first + 1)
        sequences = range(int(indexed.document_indices[first]), int(indexed.document_indices[last]))
        pieces = [indexed.get(number) for number in sequences] if not _contiguous(indexed, sequences) else None
        if pieces is not None:
            tokens = np.concatenate([np.zeros(0, indexed.dtype), *pieces])
        else:
            tokens = indexed.span(sequences.start, int(ends[last - 1]) - before) if len(sequences) else np.zeros(0)
        yield tokens, ends[first:last] - before
        first, before = last, int(ends[last - 1])


def _contiguous(indexed: IndexedDataset, sequences: range) -> bool:
    pointers = indexed.pointers[sequences.start : sequences.stop]
    sizes = indexed.lengths[sequences.start : sequences.stop].astype(np.int64) * indexed.dtype.itemsize
    return bool((pointers[1:] == pointers[:-1] + sizes[:-1]).all())
