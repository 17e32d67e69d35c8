"""Megatron's GPTDataset: documents shuffled, laid end to end and cut into sequences of equal length.

The three index arrays and every sample are those of megatron-core's core/datasets/gpt_dataset.py.
Shapes: L = sequence length; a sample draws L tokens, and one more for the last label.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from tessel.data.cache import IndexCache
from tessel.data.indexed import IndexedDataset
from tessel.data.shuffle import shuffle
from tessel.errors import TesselError

# The final epoch is shuffled apart when less than this share of it is needed.
_SEPARATE_EPOCH_SHARE = 0.80
NO_PAD = -1
# Documents whose lengths are looked up at once when samples are laid out.
_CHUNK_DOCUMENTS = 1 << 18


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


def resolve_pad_id(pad_id: int, special_ids: Iterable[int], allow_ambiguous: bool) -> int:
    """The pad id in force: none (-1) where it is also another special id, since real text then holds it.

    Megatron's rule from core 0.16 on; `--allow-ambiguous-pad-tokens` keeps the id.
    """
    return NO_PAD if pad_id in set(special_ids) and not allow_ambiguous else pad_id


class SampleIndex(NamedTuple):
    """The arrays that say what each sample holds.

    document: i32[epochs * documents], sequence ids in training order.
    sample: [n + 1, 2], position in `document` and token offset at which sample i begins.
    shuffle: u32[n], dataset index -> row of `sample`.
    """

    document: np.ndarray
    sample: np.ndarray
    shuffle: np.ndarray


class EpochPlan(NamedTuple):
    """How often the documents are gone through, and whether the last time is shuffled apart."""

    num_epochs: int
    separate_final_epoch: bool
    num_samples_sans_final_epoch: int


def plan_epochs(tokens_per_epoch: int, num_samples: int | None, seq_length: int, extra_tokens: int) -> EpochPlan:
    """The fewest epochs that hold `num_samples` (None: one epoch)."""
    if num_samples is None:
        return EpochPlan(1, False, 0)
    num_epochs = max(1, -(-(num_samples * seq_length + extra_tokens) // tokens_per_epoch))
    if num_epochs == 1:
        return EpochPlan(1, False, 0)
    sans_final = ((num_epochs - 1) * tokens_per_epoch - extra_tokens) // seq_length
    per_epoch = (tokens_per_epoch - extra_tokens) // seq_length
    separate = num_samples - sans_final < int(_SEPARATE_EPOCH_SHARE * per_epoch)
    return EpochPlan(num_epochs, separate, sans_final)


def build_document_index(sequence_ids: np.ndarray, plan: EpochPlan, rng: np.random.RandomState) -> np.ndarray:
    """i32[epochs * sequences]: all epochs shuffled together, but the last where the plan says so."""
    index = np.empty(plan.num_epochs * len(sequence_ids), np.int32)
    index.reshape(plan.num_epochs, -1)[:] = sequence_ids
    num_together = len(index) - (len(sequence_ids) if plan.separate_final_epoch else 0)
    shuffle(index[:num_together], rng)
    if plan.separate_final_epoch:
        shuffle(index[num_together:], rng)
    return index


def build_sample_index(
    lengths: np.ndarray, document_index: np.ndarray, seq_length: int, extra_tokens: int, drop_last: bool
) -> np.ndarray:
    """[n + 1, 2]: position in `document_index` and offset at which each sample begins, and the end of the last.

    The same as walking document by document (helpers.cpp, build_sample_idx): sample i begins at
    token i*L of the stream, and its row names the first document that reaches past token
    i*L + extra, so the cursor rests on a document until the sample's last label is drawn too.
    `lengths` holds the tokens of each sequence, by sequence id. drop_last=False keeps a last
    sample that the tokens do not fill; their number is then computed in float32, as there.
    """
    num_tokens = sum(int(some.sum(dtype=np.int64)) for some in _lengths_in_order(lengths, document_index))
    return _sample_index(lengths, document_index, num_tokens, seq_length, extra_tokens, drop_last)


def _sample_index(
    lengths: np.ndarray,
    document_index: np.ndarray,
    num_tokens: int,
    seq_length: int,
    extra_tokens: int,
    drop_last: bool,
) -> np.ndarray:
    """`build_sample_index`, where the tokens of the whole `document_index` are known. By chunks, to bound memory."""
    num_samples = count_samples(num_tokens, seq_length, extra_tokens, drop_last)
    # Lengths are i32 themselves.
    dtype = np.int32 if len(document_index) <= np.iinfo(np.int32).max else np.int64
    index = np.zeros((num_samples + 1, 2), dtype)
    num_placed, num_before, position = 1, 0, 0
    for some in _lengths_in_order(lengths, document_index):
        ends = np.cumsum(some, dtype=np.int64)
        ends += num_before
        num_before = int(ends[-1])
        end = min(num_samples, (num_before - extra_tokens) // seq_length) + 1
        if end > num_placed:
            starts = np.arange(num_placed, end, dtype=np.int64) * seq_length
            documents = np.searchsorted(ends, starts + extra_tokens, side="left")
            index[num_placed:end, 0] = documents + position
            index[num_placed:end, 1] = starts - (ends[documents] - some[documents])
            num_placed = end
        position += len(some)
    if num_placed <= num_samples:  # a last sample that runs out of tokens
        index[-1] = len(document_index) - 1, int(lengths[document_index[-1]]) - extra_tokens
    return index


def count_samples(num_tokens: int, seq_length: int, extra_tokens: int, drop_last: bool) -> int:
    """Samples that a stream of tokens holds, the last partial one included unless it is dropped."""
    usable = max(0, num_tokens - extra_tokens)
    if drop_last:
        return usable // seq_length
    # float32 may round up past what there is; then Megatron fails, and the exact number holds.
    return min(-(-usable // seq_length), int(np.ceil(np.float32(usable) / np.float32(seq_length))))


def _lengths_in_order(lengths: np.ndarray, document_index: np.ndarray) -> Iterator[np.ndarray]:
    """The lengths of the documents in `document_index`, chunk after chunk; the next is gathered meanwhile."""
    starts = range(0, len(document_index), _CHUNK_DOCUMENTS)

    def gather(start: int) -> np.ndarray:
        return lengths.take(document_index[start : start + _CHUNK_DOCUMENTS])

    if len(starts) < 2:
        yield from map(gather, starts)
        return
    with ThreadPoolExecutor(1, "index") as pool:
        ahead = pool.submit(gather, starts[0])
        for start in starts[1:]:
            some, ahead = ahead.result(), pool.submit(gather, start)
            yield some
        yield ahead.result()


def build_shuffle_index(num_samples: int, num_first: int, rng: np.random.RandomState) -> np.ndarray:
    """u32[n] (i64 past 2^32 - 2): [0, num_first) and [num_first, n), each shuffled in itself."""
    dtype = np.int64 if num_samples >= np.iinfo(np.uint32).max - 1 else np.uint32
    index = np.arange(num_samples, dtype=dtype)
    shuffle(index[:num_first], rng)
    if num_first < num_samples:
        shuffle(index[num_first:], rng)
    return index


def build_indices(
    lengths: np.ndarray,
    sequence_ids: np.ndarray,
    plan: EpochPlan,
    options: SampleOptions,
    drop_last: bool,
    tokens_per_epoch: int,
) -> SampleIndex:
    """The index arrays of one dataset; one RandomState of the seed is drawn from in Megatron's order."""
    rng = np.random.RandomState(options.seed)
    document = build_document_index(sequence_ids, plan, rng)
    num_tokens = plan.num_epochs * tokens_per_epoch
    sample = _sample_index(lengths, document, num_tokens, options.seq_length, int(options.add_extra_token), drop_last)
    n = len(sample) - 1
    shuffle = build_shuffle_index(n, plan.num_samples_sans_final_epoch if plan.separate_final_epoch else n, rng)
    return SampleIndex(document, sample, shuffle)


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
            return build_indices(np.array(lengths), sequence_ids, self.plan, config, drop_last, self.tokens_per_epoch)

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
        options = self.config
        pieces = self._walk(i)
        tokens, labels = self._tokens_and_labels(pieces)
        loss_mask, positions, segments = masks_and_positions(tokens, options)
        loss_mask[self._always_masked] = 0.0
        if options.inter_document_masking:
            segments, positions = _document_segments(
                [piece.length for piece in pieces], options.seq_length, self._extra
            )
        loss_mask[labels == options.pad_id] = 0.0
        tokens[tokens == options.pad_id] = 0
        labels[labels == options.pad_id] = 0
        return Sample(tokens=tokens, labels=labels, loss_mask=loss_mask, position_ids=positions, segments=segments)

    def _tokens_and_labels(self, pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens i64[L] and labels i64[L], padded with the pad id."""
        options = self.config
        text = np.full(options.seq_length + self._extra, options.pad_id, np.int64)
        at = 0
        for piece in pieces:
            text[at : at + piece.length] = self.indexed.get(*piece)
            at += piece.length
        labels = text[1:].copy() if self._extra else np.append(text[1:], options.pad_id)
        return text[: options.seq_length].copy(), labels

    @functools.cached_property
    def _always_masked(self) -> np.ndarray:
        """bool[L]: positions without loss in every sample, because the label is padding in sample 0.

        A quirk of Megatron up to its newest version: without an end-of-document option it keeps the
        loss mask of the first sample it reads, padding included, as the start of all later ones.
        There the first sample read depends on workers and restarts; here it is always sample 0.
        """
        options = self.config
        if options.eod_mask_loss or options.reset_position_ids or options.reset_attention_mask:
            return np.zeros(options.seq_length, bool)
        return self._tokens_and_labels(self._walk(0))[1] == options.pad_id

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
    if not (options.eod_mask_loss or options.reset_position_ids or options.reset_attention_mask):
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
