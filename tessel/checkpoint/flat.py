"""Tensors that lie flat in a buffer, or in fragments that do: how Megatron's distributed optimizer keeps states."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tessel.checkpoint.stored import Assembled, Index, Piece, StoredTensor, bounds


@dataclass(frozen=True)
class Unflattened:
    """A tensor of `shape` whose elements lie in row-major order in a buffer, from `start` on.

    The buffer is the last dim of `source`; `lead` says where in the dims before.
    """

    source: StoredTensor
    lead: tuple[int, ...]
    start: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def path(self) -> Path:
        return self.source.path

    def read(self, index: Index | None = None) -> Tensor:
        """The tensor, or the box of it that `index` says: what lies from its first to its last element is read."""
        box = bounds(index, self.shape)
        sizes = [max(high - low, 0) for low, high in box]
        if not math.prod(sizes):
            return torch.empty(sizes, dtype=self.dtype)
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        first = self.start + sum(low * stride for (low, _), stride in zip(box, strides, strict=True))
        last = self.start + sum((high - 1) * stride for (_, high), stride in zip(box, strides, strict=True))
        lead = tuple(slice(at, at + 1) for at in self.lead)
        flat = self.source.read((*lead, slice(first, last + 1))).reshape(-1)
        return flat.as_strided(sizes, strides, flat.storage_offset())


def of_fragments(source: StoredTensor, shape: tuple[int, ...]) -> StoredTensor | None:
    """A tensor of `shape` that is stored as equal fragments: [fragments along each dim, elements of a fragment].

    Megatron's `fully_sharded_model_space`. None where `source` is no such thing.
    """
    *counts, num_elements = source.shape
    if len(counts) != len(shape) or any(count == 0 or size % count for size, count in zip(shape, counts, strict=True)):
        return None
    sizes = tuple(size // count for size, count in zip(shape, counts, strict=True))
    if math.prod(sizes) != num_elements:
        return None
    pieces = []
    for number in itertools.product(*map(range, counts)):
        start = tuple(at * size for at, size in zip(number, sizes, strict=True))
        fragment = Unflattened(source, tuple(number), 0, sizes)
        pieces.append(Piece(start, sizes, fragment, (0,) * len(sizes)))
    return Assembled(source.name, source.dtype, shape, tuple(pieces))
