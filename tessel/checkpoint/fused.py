"""Which parameters lie in a fused tensor, box by box: Megatron keeps q, k and v in one matrix, and gate and up.

    linear_qkv   for each query group, in order: its query heads, its key head, its value head   (dim 0)
    linear_fc1   the rows of gate, then those of up                                               (dim 0)

A `Fused` tensor says it once, and is read in both directions: `assembled` puts the fused tensor
together from parameters, `pieces` says which pieces of the parameters lie in one that is stored.
Cuts by tensor parallelism are in it, since the boxes are those of the rank (`layout.tiles.tile_of`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tessel.checkpoint.stored import (
    Assembled,
    Derived,
    Index,
    Piece,
    Reshaped,
    StoredTensor,
    Transposed,
    bounds,
    index_of,
)


class Rows(NamedTuple):
    """Rows `start` to `stop` of the parameter number `part` among those that are fused."""

    part: int
    start: int
    stop: int


def qkv_rows(first_group: int, num_groups: int, heads_per_group: int, head_dim: int) -> list[Rows]:
    """The rows of q (part 0), k (1) and v (2) in the order of linear_qkv, for so many query groups."""
    rows = []
    for group in range(first_group, first_group + num_groups):
        for part, num_heads in enumerate((heads_per_group, 1, 1)):
            size = num_heads * head_dim
            rows.append(Rows(part, group * size, (group + 1) * size))
    return rows


def gate_up_rows(start: int, stop: int) -> list[Rows]:
    """Rows `start` to `stop` of gate (part 0), then those of up (1)."""
    return [Rows(0, start, stop), Rows(1, start, stop)]


class Span(NamedTuple):
    """The box of a parameter from `start` on, of `size`, lies in the fused tensor from `at` on.

    The fused tensor may lack leading dims of the parameter, in which the box is of size 1.
    """

    parameter: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    at: tuple[int, ...]


@dataclass(frozen=True)
class Fused:
    """A tensor of this shape, made of boxes of parameters."""

    shape: tuple[int, ...]
    spans: tuple[Span, ...]


def alone(parameter: str, start: tuple[int, ...], size: tuple[int, ...], drop: int = 0) -> Fused:
    """A tensor that is one box of one parameter, without its first `drop` dims."""
    return Fused(size[drop:], (Span(parameter, start, size, (0,) * (len(size) - drop)),))


def fuse(
    parameters: Sequence[str],
    rows: Sequence[Rows],
    start: tuple[int, ...],
    size: tuple[int, ...],
    dim: int = 0,
    drop: int = 0,
) -> Fused:
    """Boxes of parameters one after the other along `dim`, by `rows`; `start` and `size` say the other dims.

    The first `drop` dims, of size 1, are left out of the fused tensor.
    """
    spans, at = [], 0
    for row in rows:
        length = row.stop - row.start
        place = _put((0,) * len(size), dim, at)[drop:]
        spans.append(Span(parameters[row.part], _put(start, dim, row.start), _put(size, dim, length), place))
        at += length
    return Fused(_put(size, dim, at)[drop:], tuple(spans))


def _put(numbers: tuple[int, ...], dim: int, number: int) -> tuple[int, ...]:
    return (*numbers[:dim], number, *numbers[dim + 1 :])


def assembled(key: str, fused: Fused, parameters: Mapping[str, StoredTensor], dtype: torch.dtype) -> Assembled:
    """The fused tensor, put together from whole parameters."""
    dims = len(fused.shape)
    pieces = tuple(
        Piece(span.at, span.size[len(span.size) - dims :], parameters[span.parameter], span.start)
        for span in fused.spans
    )
    return Assembled(key, dtype, fused.shape, pieces)


def pieces(
    fused: Fused, source: StoredTensor, shapes: Mapping[str, tuple[int, ...]], lead: tuple[int, ...] = ()
) -> list[tuple[str, Piece]]:
    """What a stored fused tensor holds: parameter names and pieces of them.

    What lies outside a parameter's shape in `shapes` is padding and left out. `lead`: where the fused tensor lies
    in a source that has more dims in front, such as the layer's number in a stack of layers.
    """
    found = []
    for span in fused.spans:
        ends = zip(span.start, span.size, shapes[span.parameter], strict=True)
        size = tuple(min(begin + length, whole) - begin for begin, length, whole in ends)
        if min(size, default=1) > 0:
            found.append((span.parameter, Piece(span.start, size, source, (*lead, *span.at))))
    return found


def experts_of_gemm(matrix: StoredTensor, num_experts: int, hidden: int, is_first: bool) -> StoredTensor:
    """mlp.experts.weight1 (`is_first`) or weight2, as [experts, features out, features in].

    weight1 is stored as [hidden, experts x 2 inner] and weight2 as [experts x inner, hidden], but their bytes
    are the experts' transposed matrices one after the other: [experts, hidden, 2 inner] and [experts, inner, hidden].
    """
    inner = matrix.shape[1] // num_experts if is_first else matrix.shape[0] // num_experts
    stacked = (num_experts, hidden, inner) if is_first else (num_experts, inner, hidden)
    return Transposed(Reshaped(matrix, stacked))


def gemm_of_experts(experts: StoredTensor, is_first: bool) -> StoredTensor:
    """The inverse of `experts_of_gemm`: [experts, out, in] as Megatron's one matrix of two dims."""
    num_experts, features_out, features_in = experts.shape
    shape = (features_in, num_experts * features_out) if is_first else (num_experts * features_in, features_out)
    return Reshaped(Transposed(experts), shape)


@dataclass(frozen=True)
class FormerQkv(Derived):
    """linear_qkv from before checkpoint_version 2, with its rows in today's order: [heads, 3, head_dim].

    Version 0 (`is_first`) has them as [3, heads, head_dim], version 1 as [heads, head_dim, 3]. Source: Megatron's
    own `fix_query_key_value_ordering`.
    """

    is_first: bool
    head_dim: int

    def read(self, index: Index | None = None) -> Tensor:
        """The box `index`, or all of it: the rows between the first and the last that are needed are read."""
        (low, high), *rest = bounds(index, self.shape)
        row = torch.arange(low, high)
        head, part, feature = row // (3 * self.head_dim), row // self.head_dim % 3, row % self.head_dim
        num_heads = self.shape[0] // (3 * self.head_dim)
        if self.is_first:
            at = (part * num_heads + head) * self.head_dim + feature
        else:
            at = (head * self.head_dim + feature) * 3 + part
        first = int(at.min())
        return self.source.read(index_of([(first, int(at.max()) + 1), *rest]))[at - first]
