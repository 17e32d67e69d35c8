"""Samples of dialogues: of unequal lengths, put on one length when a micro-batch is made of them.

Shapes: n = tokens of a sample, S = tokens of a row of a micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tessel.data.indexed import IndexedDataset
from tessel.data.instruct.shorten import IGNORED
from tessel.data.samples import Piece, Sample
from tessel.errors import TesselError


class PairSample(NamedTuple):
    """Two answers to one question. In a micro-batch of B pairs, rows 0 to B-1 are chosen, B to 2B-1 rejected."""

    chosen: Sample
    rejected: Sample


@dataclass(frozen=True)
class Padding:
    """To which length the rows of a micro-batch are padded: the next multiple of `multiple` over the longest.

    `pad_id` is what fills tokens; it is never seen by others, nor trained. `side` is right or left.
    """

    multiple: int
    pad_id: int = 0
    side: str = "right"

    def length_of(self, longest: int) -> int:
        """S for samples of up to `longest` tokens."""
        return -(-max(longest, 1) // self.multiple) * self.multiple


@dataclass(frozen=True)
class DialogueOptions:
    """What decides the samples of a dialogue dataset, besides its files.

    `segments` says what is told apart within a sample: nothing, what `eos_id` ends, or what is numbered in the
    attention mask. `cut`: turns, plain or never. `round_to`: the epoch is filled up to a multiple of so many samples.
    `in_order`: not shuffled. `per_sequence`: the loss of each dialogue counts 1, however long it is.
    """

    seq_length: int
    padding: Padding
    seed: int = 1234
    segments: str = "none"
    eos_id: int | None = None
    cut: str = "turns"
    ends_with_eos: bool = False
    in_order: bool = False
    round_to: int = 1
    shuffle_all: bool = False
    per_sequence: bool = False


class DialogueDataset(ABC):
    """What the loader, the blends and the run's identity know of a dataset of dialogues.

    Attributes:
        indexed: the file of token ids; `files`: all that samples are read from.
        config: its options. name: train, valid or test.
        sequence_ids: the samples of the files that belong to the split.
        num_epochs: how often these are gone through. tokens_per_epoch: theirs together, in the files.
    """

    indexed: IndexedDataset
    files: tuple[IndexedDataset, ...]
    config: DialogueOptions
    name: str
    sequence_ids: np.ndarray
    num_epochs: int
    tokens_per_epoch: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Sample | PairSample: ...

    @abstractmethod
    def sequence_of(self, i: int) -> int:
        """The number in the files of sample i."""

    @abstractmethod
    def check_ids(self, vocab_size: int, most_tokens: int) -> None:
        """Compare the ids of files of up to `most_tokens` with the vocabulary.

        Raises:
            TesselError: one is not in it; names the sample.
        """

    def refuse_ids(self, i: int, vocab_size: int) -> None:
        """Raise the error if sample i holds an id that the vocabulary has not.

        Raises:
            TesselError: it does.
        """
        sample = self[i]
        for half in sample if isinstance(sample, PairSample) else (sample,):
            ids = np.concatenate((half["tokens"], half["labels"]))
            wrong = ids[(ids < 0) | (ids >= vocab_size)]
            if len(wrong):
                raise TesselError(
                    f"{self.indexed.prefix}: sequence {self.sequence_of(i)} holds the id {int(wrong[0])}, and the "
                    f"model's vocabulary has {vocab_size} rows (ids 0 to {vocab_size - 1}): the data was made with "
                    "another tokenizer. Preprocess it with the model's own."
                )

    def pieces(self, i: int) -> list[Piece]:
        """The sequence that sample i is, whole."""
        sequence = self.sequence_of(i)
        return [Piece(sequence, 0, int(self.indexed.lengths[sequence]))]

    def epochs_of(self, i: int) -> tuple[int, int]:
        """The first and last epoch (from 1) that sample i is of: one and the same."""
        epoch = i * self.num_epochs // max(len(self), 1) + 1
        return epoch, epoch


def sample_of(
    ids: np.ndarray, labels: np.ndarray, segments: np.ndarray | None = None, per_sequence: bool = False
) -> Sample:
    """A sample of ids [n] and labels [n] as files hold them: not shifted, -100 without loss.

    Labels become the next token's. The last token of the sample, and of each segment, has none. Positions restart
    with segments.
    """
    n = len(ids)
    shifted = np.full(n, IGNORED, np.int64)
    shifted[:-1] = labels[1:]
    positions = np.arange(n, dtype=np.int64)
    if segments is not None and n:
        begins = np.concatenate(([True], segments[1:] != segments[:-1]))
        shifted[:-1][begins[1:]] = IGNORED
        positions = positions - np.maximum.accumulate(np.where(begins, positions, 0))
        segments = np.cumsum(begins, dtype=np.int32)
    return finished(np.array(ids, np.int64), shifted, positions, segments, per_sequence)


def finished(
    tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray, segments: np.ndarray | None, per_sequence: bool
) -> Sample:
    """A sample of tokens [n] and labels [n] that are shifted, -100 without loss; segments [n] count from 1.

    With `per_sequence` the loss mask adds up to 1 over each segment that has loss.
    """
    mask = (labels != IGNORED).astype(np.float32)
    if per_sequence:
        of = np.zeros(len(tokens), np.int64) if segments is None else segments
        counts = np.bincount(of, weights=mask, minlength=1)
        mask /= np.maximum(counts, 1).astype(np.float32)[of]
    return Sample(
        tokens=tokens, labels=np.where(labels == IGNORED, 0, labels), loss_mask=mask, position_ids=positions,
        segments=segments,
    )  # fmt: skip


def padded(samples: Sequence[Sample | PairSample], padding: Padding) -> list[Sample]:
    """The samples of a micro-batch on one length, pairs as their chosen and then their rejected halves."""
    chosen = [sample.chosen if isinstance(sample, PairSample) else sample for sample in samples]
    rows = chosen + [sample.rejected for sample in samples if isinstance(sample, PairSample)]
    length = padding.length_of(max(len(row["tokens"]) for row in rows))
    # Padding on the right sees what comes before, and nobody sees it; on the left it must be told apart.
    told_apart = any(row["segments"] is not None for row in rows) or (
        padding.side == "left" and any(len(row["tokens"]) < length for row in rows)
    )
    return [_pad(row, length, padding, told_apart) for row in rows]


def _pad(row: Sample, length: int, padding: Padding, told_apart: bool) -> Sample:
    n = len(row["tokens"])
    at = slice(length - n, length) if padding.side == "left" else slice(0, n)

    def fill(values: np.ndarray, filler: int) -> np.ndarray:
        filled = np.full(length, filler, values.dtype)
        filled[at] = values
        return filled

    segments = row["segments"]
    if told_apart:
        # Padding is segment 0, and one run: attention goes by runs.
        segments = fill(np.ones(n, np.int32) if segments is None else segments, 0)
    positions = np.arange(length, dtype=np.int64)
    positions[at] = row["position_ids"]
    return Sample(
        tokens=fill(row["tokens"], padding.pad_id),
        labels=fill(row["labels"], 0),
        loss_mask=fill(row["loss_mask"], 0),
        position_ids=positions,
        segments=segments,
    )
