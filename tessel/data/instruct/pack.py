"""Samples joined into packs of one length, so that little of a batch is padding.

Three ways. `mindspeed` and `neat` write what MindSpeed-LLM's --pack and --neat-pack write: the largest sample that
fits, again and again, up to one token less than the length. `best` is tessel's own: best fit, in decreasing
length, up to the length itself. The attention mask of `neat` and `best` holds the number, from 1, of the sample
that a token belongs to, and 0 on padding; that of `mindspeed` is 1 throughout.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.data.instruct.shorten import IGNORED, kept_by_turns
from tessel.errors import TesselError

_T = TypeVar("_T")
MODES = ("best", "mindspeed", "neat")
# Tokens written at a time, of each of the three files.
_CHUNK_TOKENS = 1 << 19


@dataclass(frozen=True)
class Packed:
    """What packing came to. `num_dropped` samples were too long; `num_cut` were cut. Tokens without padding."""

    mode: str
    seq_length: int
    num_samples: int
    num_packs: int
    num_tokens: int
    num_dropped: int
    num_cut: int

    @property
    def efficiency(self) -> float:
        """The share of the packs' tokens that is no padding."""
        return self.num_tokens / (self.num_packs * self.seq_length) if self.num_packs else 1.0

    def describe(self) -> str:
        """One line for the user."""
        long = f"; {self.num_dropped:,} longer samples left out" if self.num_dropped else ""
        long += f"; {self.num_cut:,} longer samples cut" if self.num_cut else ""
        return (
            f"{self.num_samples:,} samples in {self.num_packs:,} packs of {self.seq_length:,} tokens: "
            f"{self.efficiency:.2%} of them is not padding{long}"
        )


def pack_dataset(
    source_prefixes: Mapping[str, str | Path],
    output_prefixes: Mapping[str, str | Path],
    seq_length: int,
    pad_id: int,
    mode: str = "best",
    num_blocks: int = 1,
) -> Packed:
    """Rewrite unpacked instruction data into packs of exactly `seq_length` tokens.

    Keys of both mappings: those whose names end with input_ids, labels and attention_mask. Each sequence of the
    sources is a sample; lengths are held in memory, tokens are read from the map. `num_blocks` is
    MindSpeed-LLM's --n-subs: n // num_blocks consecutive samples at a time are packed for themselves, which leaves
    one block more where that does not come out even.

    Raises:
        TesselError: the sources do not belong together, or no sample fits.
    """
    assert mode in MODES
    sources = {key: IndexedDataset(prefix) for key, prefix in source_prefixes.items()}
    ids, labels = _by_role(sources, "input_ids"), _by_role(sources, "labels")
    if not np.array_equal(ids.lengths, labels.lengths):
        raise TesselError(f"{ids.prefix} and {labels.prefix} differ in their lengths: they do not belong together.")
    lengths = np.array(ids.lengths)
    plan = _plan(lengths, labels, seq_length, mode, num_blocks)
    if not plan.packs:
        raise TesselError(f"{ids.prefix}: no sample is shorter than --seq-length {seq_length}, so nothing is packed.")
    _write(plan, ids, labels, output_prefixes, seq_length, pad_id, mode)
    num_samples = sum(len(pack) for pack in plan.packs)
    num_tokens = int(plan.kept_lengths[np.concatenate(plan.packs)].sum(dtype=np.int64))
    num_cut = int(sum((plan.kept_lengths < lengths)[pack].sum() for pack in plan.packs))
    return Packed(
        mode,
        seq_length,
        num_samples,
        len(plan.packs),
        num_tokens,
        int(np.count_nonzero(lengths)) - num_samples,
        num_cut,
    )


@dataclass(frozen=True)
class _Plan:
    """Which samples each pack holds, in order, and how many tokens of each sample are kept.

    `kept_positions` are those kept of the samples that are cut by turns.
    """

    packs: list[np.ndarray]
    kept_lengths: np.ndarray
    kept_positions: dict[int, np.ndarray]


def _plan(lengths: np.ndarray, labels: IndexedDataset, seq_length: int, mode: str, num_blocks: int) -> _Plan:
    kept_lengths = np.minimum(lengths, seq_length - 1) if mode == "neat" else lengths.copy()
    kept_positions = {}
    if mode == "best":
        for sample in np.flatnonzero(lengths > seq_length).tolist():
            kept_positions[sample] = kept_by_turns(labels.get(sample), seq_length)
            kept_lengths[sample] = len(kept_positions[sample])
    fits = (kept_lengths < seq_length) if mode == "mindspeed" else (kept_lengths > 0)
    packs: list[np.ndarray] = []
    size = max(len(lengths) // num_blocks, 1)
    for start in range(0, len(lengths), size):
        samples = np.arange(start, min(start + size, len(lengths)))
        samples = samples[fits[samples]]
        own = kept_lengths[samples]
        found = best_fit(own, seq_length) if mode == "best" else greedy_knapsack(own, seq_length - 1)
        packs += [samples[pack] for pack in found]
    return _Plan(packs, kept_lengths, kept_positions)


def greedy_knapsack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Packs of sample numbers: each takes the longest sample that still fits until none does.

    Of equally long samples the last comes first. As MindSpeed-LLM's and LLaMA-Factory's greedy_knapsack; here
    counts by length stand for the sorted list, so that a sample is found in nearly constant time.
    """
    order = np.argsort(lengths, kind="stable")
    ends = np.searchsorted(lengths[order], np.arange(capacity + 1), side="right").tolist()
    firsts = [0, *ends[:-1]]  # samples of length n are order[firsts[n] : ends[n]]
    # shorter[n]: a length at most n that may still have samples; followed down to one that has.
    shorter = list(range(capacity + 1))
    packs = []
    left = ends[capacity]
    while left:
        pack: list[int] = []
        room = capacity
        while True:
            length = room
            path = []
            while length > 0 and ends[length] == firsts[length]:
                path.append(length)
                length = shorter[length] if shorter[length] < length else length - 1
            for n in path:
                shorter[n] = length
            if length <= 0:
                break
            ends[length] -= 1
            pack.append(ends[length])
            room -= length
        if not pack:  # what is left has no token
            break
        left -= len(pack)
        packs.append(order[pack])
    return packs


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Packs of sample numbers by best fit in decreasing length: each sample goes where it leaves the least room.

    Samples of one length are dealt out at once: a pack that takes one is then the fullest, and takes the next while
    it can. So the work grows with the number of lengths times packs touched, n log n at most but for moves in
    a list of `capacity` numbers. Packs are ordered by their first sample, samples by their number.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, firsts = np.unique(-lengths[order], return_index=True)
    ends = [*firsts[1:].tolist(), len(order)]
    packs: list[list[np.ndarray]] = []
    rooms: list[int] = []  # of packs that have room, each number once, ascending
    packs_of: dict[int, list[int]] = {}
    for length, first, end in zip((-sizes).tolist(), firsts.tolist(), ends, strict=True):
        while first < end:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                pack = packs_of[room].pop()
                if not packs_of[room]:
                    del packs_of[room]
                    rooms.pop(at)
            else:
                room, pack = capacity, len(packs)
                packs.append([])
            count = min(room // length, end - first)
            packs[pack].append(order[first : first + count])
            first += count
            room -= count * length
            if room:
                if room not in packs_of:
                    insort(rooms, room)
                packs_of.setdefault(room, []).append(pack)
    joined = [np.sort(np.concatenate(pack)) for pack in packs]
    return sorted(joined, key=lambda pack: int(pack[0]))


def _write(
    plan: _Plan,
    ids: IndexedDataset,
    labels: IndexedDataset,
    output_prefixes: Mapping[str, str | Path],
    seq_length: int,
    pad_id: int,
    mode: str,
) -> None:
    with ExitStack() as stack:
        ids_to, labels_to, mask_to = (
            stack.enter_context(IndexedDatasetWriter(_by_role(output_prefixes, role), np.int32))
            for role in ("input_ids", "labels", "attention_mask")
        )
        for packs in _chunks(plan.packs, max(1, _CHUNK_TOKENS // seq_length)):
            sources, targets, numbers = _moves(packs, plan, ids, seq_length)
            pack_lengths = np.full(len(packs), seq_length, np.int32)
            for writer, dataset, filler in ((ids_to, ids, pad_id), (labels_to, labels, IGNORED)):
                row = np.full(len(packs) * seq_length, filler, np.int32)
                row[targets] = dataset.span(0, dataset.total_tokens)[sources]
                writer.add_documents(row, pack_lengths)
            mask = np.full(len(packs) * seq_length, int(mode == "mindspeed"), np.int32)
            if mode != "mindspeed":
                mask[targets] = numbers
            mask_to.add_documents(mask, pack_lengths)


def _chunks(packs: list[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(packs), size):
        yield packs[start : start + size]


def _moves(
    packs: list[np.ndarray], plan: _Plan, ids: IndexedDataset, seq_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every token of some packs: where it lies in the file and in the packs, and its sample's number there."""
    samples = np.concatenate(packs)
    lengths = plan.kept_lengths[samples].astype(np.int64)
    ends = np.cumsum(lengths)
    within = np.arange(int(ends[-1])) - np.repeat(ends - lengths, lengths)
    firsts = (np.take(ids.pointers, samples) // ids.dtype.itemsize).astype(np.int64)
    sources = np.repeat(firsts, lengths) + within
    for i, sample in enumerate(samples.tolist()):
        if sample in plan.kept_positions:
            sources[ends[i] - lengths[i] : ends[i]] = firsts[i] + plan.kept_positions[sample]
    counts = np.array([len(pack) for pack in packs])
    pack_of = np.repeat(np.arange(len(packs)), counts)
    before = np.repeat((ends - lengths)[np.cumsum(counts) - counts], counts)  # tokens before the sample's pack
    targets = np.repeat(pack_of * seq_length + (ends - lengths) - before, lengths) + within
    numbers = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    return sources, targets, np.repeat(numbers, lengths)


def _by_role(of_key: Mapping[str, _T], role: str) -> _T:
    return next(value for key, value in of_key.items() if key.endswith(role))
