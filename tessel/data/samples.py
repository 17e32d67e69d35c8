"""Megatron's GPTDataset: documents shuffled, laid end to end and cut into sequences of equal length.

The three index arrays and every sample are those of megatron-core's core/datasets/gpt_dataset.py.
Shapes: L = sequence length; a sample draws L tokens, and one more for the last label.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from tessel.data.cache import IndexCache
from tessel.data.indexed import IndexedDataset
from tessel.data.sample_index import build_indices, plan_epochs
from tessel.errors import TesselError

NO_PAD = -1


class Sample(TypedDict):
    """One training sequence; arrays of [L]."""

    tokens: np.ndarray  # i64
    labels: np.ndarray  # i64
    loss_mask: np.ndarray  # f32
    position_ids: np.ndarray  # i64
    segments: np.ndarray | None  # i32; equal numbers attend to each other, causally. None: all do


class Piece(NamedTuple):
    """A run of tokens of one document (a sequence of the .idx) inside a sample."""

    document: int
    offset: int
    length: int


@dataclass(frozen=True)
class SampleOptions:
    """What decides the samples of a dataset, besides its tokens.

    eod_id is None where no end of document is known, pad_id is -1 where there is none.
    """

    seq_length: int
    seed: int = 1234
    eod_id: int | None = None
    pad_id: int = NO_PAD
    add_extra_token: bool = True
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    inter_document_masking: bool = False

    @property
    def reads_eod(self) -> bool:
        """Whether ends of documents change masks or positions."""
        return self.eod_mask_loss or self.reset_position_ids or self.reset_attention_mask

    @property
    def has_segments(self) -> bool:
        """Whether parts of a sample do not see each other."""
        return self.reset_attention_mask or self.inter_document_masking


def resolve_pad_id(pad_id: int, special_ids: Iterable[int], allow_ambiguous: bool) -> int:
    """The pad id in force: none (-1) where it is also another special id, since real text then holds it.

    Megatron's rule from core 0.16 on; `--allow-ambiguous-pad-tokens` keeps the id.
    """
    return NO_PAD if pad_id in set(special_ids) and not allow_ambiguous else pad_id


def count_tokens(lengths: np.ndarray, sequence_ids: np.ndarray) -> int:
    """Tokens of the sequences `sequence_ids`; a range of them, the usual case, is summed without gathering."""
    if not len(sequence_ids):
        return 0
    first, last = int(sequence_ids[0]), int(sequence_ids[-1])
    is_range = last - first == len(sequence_ids) - 1 and bool((np.diff(sequence_ids) == 1).all())
    return int((lengths[first : last + 1] if is_range else lengths[sequence_ids]).sum(dtype=np.int64))


class GPTDataset:
    """Samples of seq_length tokens from the sequences `sequence_ids` of an indexed dataset.

    `num_samples` is how many are needed at least, None for one epoch. `drop_last` drops the last
    sample that the tokens do not fill. `cache` may hold the index arrays from
    an earlier start.

    Raises:
        TesselError: there are no tokens.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        sequence_ids: np.ndarray,
        num_samples: int | None,
        config: SampleOptions,
        *,
        name: str = "train",
        drop_last: bool = True,
        cache: IndexCache | None = None,
    ) -> None:
        self.indexed = indexed
        self.sequence_ids = sequence_ids
        self.num_samples = num_samples
        self.config = config
        self.name = name
        lengths = indexed.lengths
        self.tokens_per_epoch = count_tokens(lengths, sequence_ids)
        if self.tokens_per_epoch == 0:
            raise TesselError(
                f"{indexed.prefix}: the {name} split holds no tokens ({len(sequence_ids)} of {len(indexed)} sequences)."
                " Give it a larger share with --split, or a dataset of its own."
            )
        self._extra = int(config.add_extra_token)
        self.plan = plan_epochs(self.tokens_per_epoch, num_samples, config.seq_length, self._extra)

        def build() -> tuple[np.ndarray, ...]:
            # Index files are unaligned: copied once, the many reads that follow are faster.
            return build_indices(
                np.array(lengths),
                sequence_ids,
                self.plan,
                self.tokens_per_epoch,
                seed=config.seed,
                seq_length=config.seq_length,
                extra_tokens=self._extra,
                drop_last=drop_last,
            )

        if cache is None:
            arrays = build()
        else:
            num_samples_per_epoch = self.tokens_per_epoch // config.seq_length
            arrays = cache.get(
                self._cache_key(drop_last),
                ("document_index", "sample_index", "shuffle_index"),
                build,
                beside=Path(indexed.prefix) / "cache" / "GPTDataset_indices",
                num_entries=self.plan.num_epochs * (len(sequence_ids) + 3 * num_samples_per_epoch),
            )
        self.document_index, self.sample_index, self.shuffle_index = arrays

    def _cache_key(self, drop_last: bool) -> dict[str, Any]:
        return {
            "class": "GPTDataset",
            "split": self.name,
            "lengths": self.indexed.lengths,
            "sequence_ids": self.sequence_ids,
            "num_samples": self.num_samples,
            "seed": self.config.seed,
            "seq_length": self.config.seq_length,
            "add_extra_token": self.config.add_extra_token,
            "drop_last": drop_last,
        }

    @property
    def num_epochs(self) -> int:
        """How often the documents are gone through."""
        return self.plan.num_epochs

    def __len__(self) -> int:
        return len(self.sample_index) - 1

    def __getitem__(self, i: int) -> Sample:
        """Sample i in training order, as arrays of [L]; see `Sample` for the dtypes."""
        length = self.config.seq_length
        rows = Sample(
            tokens=np.empty(length, np.int64),
            labels=np.empty(length, np.int64),
            loss_mask=np.empty(length, np.float32),
            position_ids=np.empty(length, np.int64),
            segments=np.empty(length, np.int32) if self.config.has_segments else None,
        )
        self.write(i, rows)
        return rows

    def write(self, i: int, rows: Sample) -> None:
        """Write sample i into arrays of [L], such as rows of a micro-batch; `segments` where the options have any."""
        options = self.config
        tokens, labels, loss_mask, segments = rows["tokens"], rows["labels"], rows["loss_mask"], rows["segments"]
        pieces = self._walk(i)
        is_whole = self._write_text(pieces, tokens, labels)
        if options.reads_eod:
            loss_mask[:], rows["position_ids"][:], own_segments = masks_and_positions(tokens, options)
            if segments is not None and own_segments is not None:
                segments[:] = own_segments
        else:
            loss_mask[:], rows["position_ids"][:] = self._plain_rows
        if options.inter_document_masking and segments is not None:
            segments[:], rows["position_ids"][:] = _document_segments(
                [piece.length for piece in pieces], options.seq_length, self._extra
            )
        if is_whole and options.pad_id < 0 and self.indexed.dtype.kind == "u":
            return  # nothing can be padding
        loss_mask[labels == options.pad_id] = 0.0
        tokens[tokens == options.pad_id] = 0
        labels[labels == options.pad_id] = 0

    def _write_text(self, pieces: list[Piece], tokens: np.ndarray, labels: np.ndarray) -> bool:
        """Tokens and labels, padded with the pad id; whether there was nothing to pad."""
        at, length = 0, len(tokens)
        for piece in pieces:
            text = self.indexed.get(*piece)
            if not len(text):
                continue
            tokens[at : at + len(text)] = text[: length - at]
            # A label is the next token, so the first token of all is none.
            begin = 1 if at == 0 else 0
            labels[at + begin - 1 : at + len(text) - 1] = text[begin:]
            at += len(text)
        tokens[at:] = self.config.pad_id
        labels[max(at - 1, 0) :] = self.config.pad_id
        return at == length + 1

    @functools.cached_property
    def _plain_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Loss mask f32[L] and positions i64[L] of a sample where ends of documents mean nothing.

        The mask is 0 where the label is padding in sample 0, a quirk of Megatron up to its newest version: without
        an end-of-document option it keeps the loss mask of the first sample it reads, padding included, as the start
        of all later ones. There the first sample read depends on workers and restarts; here it is always sample 0.
        """
        length = self.config.seq_length
        tokens, labels = np.empty((2, length), np.int64)
        self._write_text(self._walk(0), tokens, labels)
        return (labels != self.config.pad_id).astype(np.float32), np.arange(length, dtype=np.int64)

    def pieces(self, i: int) -> list[Piece]:
        """The documents of sample i, in order: sequence number in the .idx, offset and length in tokens.

        Together they are the L tokens and the last label, less what is padding. Documents without
        a token are left out.
        """
        return [piece for piece in self._walk(i) if piece.length]

    def epochs_of(self, i: int) -> tuple[int, int]:
        """The first and last epoch (from 1) that sample i draws from, by position in the document index."""
        row = int(self.shuffle_index[i])
        first, last = int(self.sample_index[row, 0]), int(self.sample_index[row + 1, 0])
        per_epoch = len(self.sequence_ids)
        return first // per_epoch + 1, last // per_epoch + 1

    def _walk(self, i: int) -> list[Piece]:
        row = int(self.shuffle_index[i])
        (first, offset), (last, end) = self.sample_index[row].tolist(), self.sample_index[row + 1].tolist()
        documents = self.document_index[first : last + 1].tolist()
        pieces = []
        for document in documents[:-1]:
            pieces.append(Piece(document, offset, int(self.indexed.lengths[document]) - offset))
            offset = 0
        return [*pieces, Piece(documents[-1], offset, end + self._extra - offset)]


def masks_and_positions(tokens: np.ndarray, options: SampleOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Loss mask f32[L], positions i64[L] and segments i32[L] or None, from the end-of-document tokens [L].

    An end of document belongs to the document it ends; the loss mask is 0 where it is the input
    (Megatron's _get_ltor_masks_and_position_ids).
    """
    length = len(tokens)
    loss_mask = np.ones(length, np.float32)
    positions = np.arange(length, dtype=np.int64)
    segments = None
    if not options.reads_eod:
        return loss_mask, positions, segments
    if options.eod_id is None:
        raise TesselError(
            "--eod-mask-loss, --reset-position-ids and --reset-attention-mask need an end-of-document id: "
            "give a tokenizer or --eod-id."
        )
    is_eod = tokens == options.eod_id
    if options.eod_mask_loss:
        loss_mask[is_eod] = 0.0
    if options.reset_position_ids:
        starts = np.zeros(length, np.int64)
        starts[1:] = np.where(is_eod[:-1], positions[1:], 0)
        positions = positions - np.maximum.accumulate(starts)
    if options.reset_attention_mask:
        segments = np.zeros(length, np.int32)
        np.cumsum(is_eod[:-1], dtype=np.int32, out=segments[1:])
    return loss_mask, positions, segments


def _document_segments(piece_lengths: list[int], length: int, extra_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments i32[L] and positions i64[L] that restart with each document piece.

    The extra token is no input, and padding belongs to the last piece (gpt_dataset.py,
    inter_document_masking).
    """
    lengths = list(piece_lengths)
    if extra_tokens:
        lengths[-1] -= 1
        if lengths[-1] == 0:
            lengths.pop()
    shortfall = length - sum(lengths)
    if shortfall > 0:
        if lengths:
            lengths[-1] += shortfall
        else:
            lengths.append(shortfall)
    segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    begins = np.cumsum([0, *lengths[:-1]])
    return segments, np.arange(length, dtype=np.int64) - np.repeat(begins, lengths)
