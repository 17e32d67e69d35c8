"""Which blocks of queries and keys attention consists of, and their sum.

Given the positions that the queries and the keys have, and the documents of the rows, `blocks_of` lists
rectangles that together hold every pair of a query and a key that it sees, once: none for what
causality, documents or a window hide altogether; without a mask where all is seen, or all up to the
diagonal; with one at the edges alone. `Total` runs them and puts outputs together; `gradients_of` goes back.

Shape suffixes: B batch, H query heads, G key/value heads, S queries here, K keys here, W the whole
row's positions, D head_dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tessel.layout.context import Range
from tessel.model.attention_block import NOTHING, block_backward, block_forward

# With documents shorter than this on average, masked squares are faster than a block for each document.
_MIN_DOCUMENT_TOKENS = 32
# Sides of masked squares, in tokens: small squares hold less that is hidden, large ones are fewer.
_MIN_SIDE, _MAX_SIDE = 128, 1024


@dataclass(frozen=True)
class Block:
    """A rectangle. `queries` and `keys` are where they lie here; `first_query`, `first_key` their positions."""

    row: int | None  # None: every row of the batch
    queries: Range
    keys: Range
    first_query: int
    first_key: int
    kind: Literal["full", "causal", "masked"]

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key that are computed, in one row and head."""
        num_queries, num_keys = self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]
        return num_queries * (num_queries + 1) // 2 if self.kind == "causal" else num_queries * num_keys


@dataclass(frozen=True)
class _Piece:
    """Positions of a row that lie together here, of documents numbered `lowest` to `highest`."""

    start: int
    stop: int
    at: int
    lowest: int = 0
    highest: int = 0


@dataclass(frozen=True)
class _Run:
    start: int
    stop: int
    document: int


class Documents:
    """The segments of whole rows [B, W], and their runs on the host. None: every row is one document.

    Reading the runs waits for the device, once for a micro-batch.
    """

    def __init__(self, segments_BW: Tensor | None) -> None:
        self.segments_BW = segments_BW
        self._rows = [] if segments_BW is None else [list(_runs(row)) for row in _changes(segments_BW)]
        num_runs = sum(len(runs) for runs in self._rows)
        self._are_short = segments_BW is not None and segments_BW.numel() < _MIN_DOCUMENT_TOKENS * num_runs

    def rows(self) -> Iterator[tuple[int | None, list[_Run]]]:
        """The rows that differ, and the runs of each; (None, []) for all rows where none has several runs."""
        if all(len(runs) == 1 for runs in self._rows):
            return iter([(None, [])])
        return iter(enumerate(self._rows))

    def pieces(self, ranges: Sequence[Range], runs: list[_Run], side: int | None) -> list[_Piece]:
        """Ranges that lie one after another, cut at `side` and where documents change (or labelled by them)."""
        pieces: list[_Piece] = []
        at = 0
        for start, stop in ranges:
            pieces += _cut(_Piece(start, stop, at), runs, _MAX_SIDE if self._are_short else side, self._are_short)
            at += stop - start
        return pieces


def blocks_of(queries: Sequence[Range], keys: Sequence[Range], documents: Documents, window: int | None) -> list[Block]:
    """The blocks of queries and keys whose positions are these ranges, each lying one after another here.

    A range of queries and one of keys are the same or share no position.
    """
    side = None if window is None else min(max(window, _MIN_SIDE), _MAX_SIDE)
    blocks = []
    for row, runs in documents.rows():
        by_document: dict[int, list[_Piece]] = defaultdict(list)
        several: list[_Piece] = []
        for piece in documents.pieces(keys, runs, side):
            (by_document[piece.lowest] if piece.lowest == piece.highest else several).append(piece)
        for q in documents.pieces(queries, runs, side):
            if q.lowest == q.highest:
                candidates: Iterable[_Piece] = [*by_document[q.lowest], *several]
            else:
                candidates = [*(k for pieces in by_document.values() for k in pieces), *several]
            blocks += [block for k in candidates if (block := _block(row, q, k, window)) is not None]
    return _joined(blocks)


def _block(row: int | None, q: _Piece, k: _Piece, window: int | None) -> Block | None:
    """What queries `q` see of keys `k`; None where that is nothing."""
    if k.start >= q.stop or k.highest < q.lowest or k.lowest > q.highest:
        return None
    if window is not None and k.stop - 1 <= q.start - window:
        return None
    one_document = q.lowest == q.highest == k.lowest == k.highest
    in_window = window is None or k.start > q.stop - 1 - window
    kind: Literal["full", "causal", "masked"] = "masked"
    if one_document and in_window and k.stop - 1 <= q.start:
        kind = "full"
    elif one_document and in_window and (k.start, k.stop) == (q.start, q.stop):
        kind = "causal"
    return Block(row, (q.at, q.at + q.stop - q.start), (k.at, k.at + k.stop - k.start), q.start, k.start, kind)


def _joined(blocks: list[Block]) -> list[Block]:
    """The same with full blocks that lie side by side made one: first along the keys, then along the queries."""

    def along_keys(first: Block, second: Block) -> Block | None:
        beside = (first.row, first.queries, first.keys[1]) == (second.row, second.queries, second.keys[0])
        return replace(first, keys=(first.keys[0], second.keys[1])) if beside else None

    def along_queries(first: Block, second: Block) -> Block | None:
        beside = (first.row, first.keys, first.queries[1]) == (second.row, second.keys, second.queries[0])
        return replace(first, queries=(first.queries[0], second.queries[1])) if beside else None

    others = [block for block in blocks if block.kind != "full"]
    full = [block for block in blocks if block.kind == "full"]
    full = _merged(sorted(full, key=lambda block: (block.row or 0, block.queries, block.keys)), along_keys)
    full = _merged(sorted(full, key=lambda block: (block.row or 0, block.keys, block.queries)), along_queries)
    return full + others


def _merged(blocks: Iterable[Block], join: Callable[[Block, Block], Block | None]) -> list[Block]:
    merged: list[Block] = []
    for block in blocks:
        joined = join(merged[-1], block) if merged else None
        if joined is None:
            merged.append(block)
        else:
            merged[-1] = joined
    return merged


def _changes(segments_BW: Tensor) -> list[tuple[list[int], list[int]]]:
    """For each row: where a run starts, and its document."""
    segments_BW = segments_BW.cpu()
    starts_BW = torch.ones_like(segments_BW, dtype=torch.bool)
    starts_BW[:, 1:] = segments_BW[:, 1:] != segments_BW[:, :-1]
    at_rows = [row.nonzero().flatten() for row in starts_BW]
    return [
        ([*at.tolist(), segments_BW.shape[1]], row[at].tolist()) for at, row in zip(at_rows, segments_BW, strict=True)
    ]


def _runs(row: tuple[list[int], list[int]]) -> Iterator[_Run]:
    bounds, documents = row
    return (_Run(*run) for run in zip(bounds[:-1], bounds[1:], documents, strict=True))


def _cut(piece: _Piece, runs: list[_Run], side: int | None, label: bool) -> Iterator[_Piece]:
    """A piece cut at `side`, and at the ends of runs unless these only `label` what is in it."""
    own = [run for run in runs if run.start < piece.stop and run.stop > piece.start]
    if own and not label:
        for run in own:
            start, stop = max(piece.start, run.start), min(piece.stop, run.stop)
            part = _Piece(start, stop, piece.at + start - piece.start, run.document, run.document)
            yield from _cut(part, [], side, False)
        return
    for start in range(piece.start, piece.stop, side or piece.stop - piece.start):
        stop = min(start + side, piece.stop) if side else piece.stop
        inside = [run.document for run in own if run.start < stop and run.stop > start]
        lowest, highest = (min(inside), max(inside)) if inside else (piece.lowest, piece.highest)
        yield _Piece(start, stop, piece.at + start - piece.start, lowest, highest)


# The mask of a block, bool [1, 1, S, K].
Masks = Callable[[Block], Tensor]


def masks_of(documents: Documents, window: int | None, device: torch.device) -> Masks:
    """Masks are built when a block is computed, and dropped: together they would be as large as the scores."""

    def mask(block: Block) -> Tensor:
        queries_S1 = _positions(block.first_query, block.queries, device)[:, None]
        keys_K = _positions(block.first_key, block.keys, device)
        visible = keys_K <= queries_S1
        if window is not None:
            visible &= keys_K > queries_S1 - window
        if documents.segments_BW is not None and block.row is not None:
            segments_W = documents.segments_BW[block.row]
            visible &= segments_W[queries_S1] == segments_W[keys_K]
        return visible[None, None]

    return mask


def _positions(first: int, range_: Range, device: torch.device) -> Tensor:
    return torch.arange(first, first + range_[1] - range_[0], device=device)


class Total:
    """Attention's output over the blocks so far, in fp32, for queries [B, S, H, D]."""

    def __init__(self, q_BSHD: Tensor, masks: Masks) -> None:
        self._q_BHSD, self._masks = q_BSHD.transpose(1, 2), masks
        dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
        self._out_BHSD = torch.zeros_like(q_BSHD, dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)
        self._lse_BHS = torch.full(self._q_BHSD.shape[:3], NOTHING, dtype=dtype, device=q_BSHD.device)

    def add(self, k_BKGD: Tensor, v_BKGD: Tensor, blocks: Iterable[Block]) -> None:
        """Compute blocks of these keys and put them to the rest."""
        for block in blocks:
            rows, queries, keys = _slices(block)
            out_BHSD, lse_BHS = block_forward(
                self._q_BHSD[rows, :, queries],
                k_BKGD.transpose(1, 2)[rows, :, keys],
                v_BKGD.transpose(1, 2)[rows, :, keys],
                self._masks(block) if block.kind == "masked" else None,
                block.kind == "causal",
            )
            total_BHSD, total_lse_BHS = self._out_BHSD[rows, :, queries], self._lse_BHS[rows, :, queries]
            both_BHS = torch.logaddexp(total_lse_BHS, lse_BHS)
            total_BHSD.mul_((total_lse_BHS - both_BHS).exp_()[..., None])
            total_BHSD.addcmul_(out_BHSD.to(total_BHSD.dtype), (lse_BHS - both_BHS).exp_()[..., None])
            total_lse_BHS.copy_(both_BHS)

    def result(self) -> tuple[Tensor, Tensor]:
        """(output [B, S, H, D] in the queries' dtype, lse fp32 [B, H, S])."""
        return self._out_BHSD.transpose(1, 2).to(self._q_BHSD.dtype), self._lse_BHS


@dataclass(frozen=True)
class Backward:
    """What the gradients through blocks need, and the queries' own, which add up in `grad_q_BSHD`, fp32."""

    grad_BSHD: Tensor
    q_BSHD: Tensor
    out_BSHD: Tensor
    lse_BHS: Tensor
    masks: Masks
    grad_q_BSHD: Tensor

    @classmethod
    def of(cls, grad_BSHD: Tensor, q_BSHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor, masks: Masks) -> Backward:
        """Start from the gradient of the output."""
        grad_q_BSHD = _wide_zeros(q_BSHD)
        return cls(grad_BSHD.contiguous(), q_BSHD, out_BSHD, lse_BHS, masks, grad_q_BSHD)

    def through(self, k_BKGD: Tensor, v_BKGD: Tensor, blocks: Iterable[Block]) -> tuple[Tensor, Tensor]:
        """Gradients of these keys and values through the blocks, fp32; those of the queries are added."""
        grad_k_BKGD, grad_v_BKGD = _wide_zeros(k_BKGD), _wide_zeros(v_BKGD)
        for block in blocks:
            rows, queries, keys = _slices(block)
            grads = block_backward(
                self.grad_BSHD.transpose(1, 2)[rows, :, queries],
                self.q_BSHD.transpose(1, 2)[rows, :, queries],
                k_BKGD.transpose(1, 2)[rows, :, keys],
                v_BKGD.transpose(1, 2)[rows, :, keys],
                self.out_BSHD.transpose(1, 2)[rows, :, queries],
                self.lse_BHS[rows, :, queries],
                self.masks(block) if block.kind == "masked" else None,
                block.kind == "causal",
            )
            where = (queries, keys, keys)
            for total, grad, at in zip((self.grad_q_BSHD, grad_k_BKGD, grad_v_BKGD), grads, where, strict=True):
                total.transpose(1, 2)[rows, :, at] += grad
        return grad_k_BKGD, grad_v_BKGD


def _slices(block: Block) -> tuple[slice, slice, slice]:
    rows = slice(None) if block.row is None else slice(block.row, block.row + 1)
    return rows, slice(*block.queries), slice(*block.keys)


def _wide_zeros(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
