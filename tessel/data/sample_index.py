"""The index arrays of Megatron's GPTDataset: which documents, in which order, cut where, and shuffled how.

Source: megatron-core's core/datasets/gpt_dataset.py and helpers.cpp. Shapes: L = sequence length, n = samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from tessel.data.shuffle import shuffle

# The final epoch is shuffled apart when less than this share of it is needed.
_SEPARATE_EPOCH_SHARE = 0.80
# Documents whose lengths are looked up at once when samples are laid out.
_CHUNK_DOCUMENTS = 1 << 18


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
    num_samples = _count_samples(num_tokens, seq_length, extra_tokens, drop_last)
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


def _count_samples(num_tokens: int, seq_length: int, extra_tokens: int, drop_last: bool) -> int:
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
    tokens_per_epoch: int,
    *,
    seed: int,
    seq_length: int,
    extra_tokens: int,
    drop_last: bool,
) -> SampleIndex:
    """The index arrays of one dataset; one RandomState of the seed is drawn from in Megatron's order."""
    rng = np.random.RandomState(seed)
    document = build_document_index(sequence_ids, plan, rng)
    num_tokens = plan.num_epochs * tokens_per_epoch
    sample = _sample_index(lengths, document, num_tokens, seq_length, extra_tokens, drop_last)
    n = len(sample) - 1
    shuffle = build_shuffle_index(n, plan.num_samples_sans_final_epoch if plan.separate_final_epoch else n, rng)
    return SampleIndex(document, sample, shuffle)
