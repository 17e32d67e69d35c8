"""Documents of one dataset written to another, in any order, in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter

# About so many tokens, and at most so many documents, are in memory at a time.
_CHUNK_TOKENS = 1 << 20
_CHUNK_DOCUMENTS = 1 << 16


class Documents(NamedTuple):
    """tokens [N], of the stored type; lengths i32[S]; sequences_per_document i64[D]; modes i8[S] or None."""

    tokens: np.ndarray
    lengths: np.ndarray
    sequences_per_document: np.ndarray
    modes: np.ndarray | None


def copy_documents(source: IndexedDataset, order: np.ndarray, writer: IndexedDatasetWriter) -> None:
    """Append the documents `order` [any integers] of a dataset, in that order.

    Raises:
        TesselError: an id does not fit the writer's type, or the disk is full.
    """
    for documents in read_documents(source, order):
        writer.add_documents(*documents)


def copy_all(source: IndexedDataset, writer: IndexedDatasetWriter) -> None:
    """Append all documents of a dataset."""
    for start in range(0, source.num_documents, _CHUNK_DOCUMENTS):
        copy_documents(source, np.arange(start, min(start + _CHUNK_DOCUMENTS, source.num_documents)), writer)


def read_documents(source: IndexedDataset, order: np.ndarray) -> Iterator[Documents]:
    """The documents `order`, a few at a time."""
    for start in range(0, len(order), _CHUNK_DOCUMENTS):
        chosen = order[start : start + _CHUNK_DOCUMENTS].astype(np.int64)
        firsts, stops = source.document_indices[chosen], source.document_indices[chosen + 1]
        sequences = _ranges(firsts, stops - firsts)
        lengths = source.lengths[sequences]
        # Cut where documents end, so that each piece has about as many tokens.
        tokens_before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        sequences_before = np.concatenate([[0], np.cumsum(stops - firsts)])
        pieces = tokens_before[sequences_before[:-1]] // _CHUNK_TOKENS
        for piece in np.unique(pieces):
            low, high = np.searchsorted(pieces, piece), np.searchsorted(pieces, piece, side="right")
            own = slice(int(sequences_before[low]), int(sequences_before[high]))
            yield Documents(
                _tokens(source, sequences[own], lengths[own]),
                lengths[own],
                (stops - firsts)[low:high],
                source.modes[sequences[own]] if source.modes is not None else None,
            )


def _tokens(source: IndexedDataset, sequences: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The tokens of some sequences, back to back."""
    if not len(sequences):
        return np.zeros(0, source.dtype)
    starts = source.pointers[sequences] // source.dtype.itemsize
    if (starts[1:] == starts[:-1] + lengths[:-1]).all():
        return source.span(int(sequences[0]), int(lengths.sum(dtype=np.int64)))
    return source.tokens[_ranges(starts, lengths)]


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., `count` numbers for each start, one after another: i64."""
    counts = counts.astype(np.int64)
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts.astype(np.int64) - before, counts)
