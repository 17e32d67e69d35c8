"""What happens to encoded rows in the order of the input, after the workers and before the writer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tessel.data.encoding import Encoded, join

# MindSpeed-LLM's tool looks for long sequences in so many rows at a time.
MINDSPEED_ROWS = 50

Parts = tuple[Encoded, ...]


class KeepAll:
    """Nothing is left out: Megatron-LM's and Pai's tools, and texts of tessel's own.

    Attributes:
        num_long: what was left out for its length, so far.
    """

    num_long = 0

    def add(self, parts: Parts) -> Iterator[Parts]:
        """The rows that follow; yields those that are ready."""
        yield parts

    def end(self) -> Iterator[Parts]:
        """The rows that are left."""
        return iter(())


class DropLongRows(KeepAll):
    """A row is left out, with its document, where any of its sequences has more than `most` tokens."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.num_long = 0

    def add(self, parts: Parts) -> Iterator[Parts]:
        """See `KeepAll`."""
        is_long = np.zeros(len(parts[0].sequences_per_document), bool)
        for part in parts:
            rows = np.repeat(np.arange(len(is_long)), part.sequences_per_document)
            is_long[rows[part.lengths > self._most]] = True
        self.num_long += int(is_long.sum())
        yield tuple(_without_documents(part, is_long) for part in parts) if is_long.any() else parts


class MindSpeedRows(KeepAll):
    """As MindSpeed-LLM's tool: documents of no sequence go, and so do sequences of `seq_length` tokens or more.

    A document whose sequences go that way stays in the index. Where one of several outputs has a long
    sequence, those of the others at the same place go, too; places are counted within 50 rows, empty
    documents aside.
    """

    def __init__(self, seq_length: int | None) -> None:
        self._seq_length = seq_length
        self._pending: list[Parts] = []
        self._num_pending = 0
        self.num_long = 0

    def add(self, parts: Parts) -> Iterator[Parts]:
        """See `KeepAll`."""
        if self._seq_length is None or len(parts) == 1:
            yield self._finished(parts)
            return
        self._pending.append(parts)
        self._num_pending += len(parts[0].sequences_per_document)
        num_whole = self._num_pending // MINDSPEED_ROWS * MINDSPEED_ROWS
        if num_whole:
            rows = join(self._pending)
            self._pending = [_rows(rows, num_whole, self._num_pending)]
            self._num_pending -= num_whole
            for start in range(0, num_whole, MINDSPEED_ROWS):
                yield self._finished(_rows(rows, start, start + MINDSPEED_ROWS))

    def end(self) -> Iterator[Parts]:
        """See `KeepAll`."""
        if self._num_pending:
            yield self._finished(join(self._pending))
        self._pending, self._num_pending = [], 0

    def _finished(self, parts: Parts) -> Parts:
        kept = tuple(_without_documents(part, part.sequences_per_document == 0) for part in parts)
        limit = self._seq_length
        if limit is None or all(not len(part.lengths) or int(part.lengths.max()) < limit for part in kept):
            return kept
        places = [_places(part) for part in kept]
        long = np.unique(
            np.concatenate([place[part.lengths >= limit] for place, part in zip(places, kept, strict=True)])
        )
        goes = [np.isin(place, long) for place in places]
        self.num_long += int(goes[0].sum())
        return tuple(_without_sequences(part, gone) for part, gone in zip(kept, goes, strict=True))


def _places(part: Encoded) -> np.ndarray:
    """For each sequence, one number of its document and its place in it."""
    counts = part.sequences_per_document.astype(np.int64)
    documents = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    return documents << 32 | (np.arange(len(documents)) - firsts[documents])


def _rows(parts: Parts, start: int, stop: int) -> Parts:
    """Documents `start` to `stop` of each part."""
    return tuple(_documents(part, start, stop) for part in parts)


def _documents(part: Encoded, start: int, stop: int) -> Encoded:
    sequences = np.concatenate([[0], np.cumsum(part.sequences_per_document, dtype=np.int64)])
    first, last = int(sequences[start]), int(sequences[stop])
    tokens = np.concatenate([[0], np.cumsum(part.lengths, dtype=np.int64)])
    return Encoded(
        part.tokens[int(tokens[first]) : int(tokens[last])],
        part.lengths[first:last],
        part.sequences_per_document[start:stop],
    )


def _without_documents(part: Encoded, goes: np.ndarray) -> Encoded:
    """All but the documents [D] that go."""
    if not goes.any():
        return part
    kept = _without_sequences(part, np.repeat(goes, part.sequences_per_document))
    return kept._replace(sequences_per_document=part.sequences_per_document[~goes])


def _without_sequences(part: Encoded, goes: np.ndarray) -> Encoded:
    """All but the sequences [S] that go; their documents stay."""
    if not goes.any():
        return part
    documents = np.repeat(np.arange(len(part.sequences_per_document)), part.sequences_per_document)
    counts = np.bincount(documents[~goes], minlength=len(part.sequences_per_document)).astype(np.int32)
    return Encoded(part.tokens[~np.repeat(goes, part.lengths)], part.lengths[~goes], counts)
