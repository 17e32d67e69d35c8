"""Experts between a Hugging Face folder, where each has tensors of its own, and memory, where they are stacked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tessel.checkpoint.names import is_stacked, places_of, renamed, stored_name
from tessel.checkpoint.stored import StoredTensor


@dataclass(frozen=True)
class StackedTensor:
    """A tensor of each expert, as one tensor with the expert as dim 0."""

    name: str
    experts: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.experts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.experts), *self.experts[0].shape)

    @property
    def path(self) -> Path:
        return self.experts[0].path

    def read(self, index: tuple[slice, ...] | None = None) -> Tensor:
        """The box `index`, or all of it: of each expert in it, that expert's part is read."""
        if index is None:
            return torch.stack([expert.read() for expert in self.experts])
        return torch.stack([expert.read(index[1:]) for expert in self.experts[index[0]]])


@dataclass(frozen=True)
class HalfTensor:
    """The first or the second half of a stored tensor, along dim 1."""

    name: str
    whole: StoredTensor
    half: int

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first, second, *rest = self.whole.shape
        return (first, second // 2, *rest)

    @property
    def path(self) -> Path:
        return self.whole.path

    def read(self, index: tuple[slice, ...] | None = None) -> Tensor:
        """The box `index` of the half, or all of it."""
        size = self.shape[1]
        index = index or tuple(slice(0, length) for length in self.shape)
        start, stop, _ = index[1].indices(size)
        begin = self.half * size
        return self.whole.read((index[0], slice(begin + start, begin + stop), *index[2:]))


def in_memory(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a folder by their names in memory, experts stacked.

    Experts whose numbers have gaps, or whose shapes or dtypes differ, stay as they are.
    """
    found: dict[str, StoredTensor] = {}
    stacks: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in stored.items():
        for place in places_of(name):
            if place.expert is not None:
                stacks.setdefault(place.name, {})[place.expert] = tensor
            elif place.half is not None and len(tensor.shape) == 3:
                found[place.name] = HalfTensor(place.name, tensor, place.half)
            else:
                found[name if place.half is not None else place.name] = tensor
    for name, experts in stacks.items():
        in_order = tuple(experts[number] for number in sorted(experts))
        alike = len({(expert.shape, expert.dtype) for expert in in_order}) == 1
        if alike and sorted(experts) == list(range(len(experts))):
            found[name] = StackedTensor(name, in_order)
        else:
            found |= {expert.name: expert for expert in in_order}
    return found


def as_stored(tensors: Iterable[tuple[str, Tensor]], family: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters by their names in a folder of the family, which transformers 4 and 5 read: expert by expert."""
    for name, tensor in tensors:
        if is_stacked(name):
            for number, expert in enumerate(tensor.unbind(0)):
                yield stored_name(name, family, number), expert
        else:
            yield renamed(name, family), tensor
