"""Two models tensor by tensor: by hash, or by value where they differ or a tolerance is given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from tessel.checkpoint.stored import Cast, StoredModel, StoredTensor, blocks, bounds, bytes_of, index_of, name_of
from tessel.runtime.log import progress

_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same, and in what."""

    name: str
    what: str


@dataclass(frozen=True)
class Comparison:
    """`digests`: sha256 of each tensor that is equal, over its bytes in row-major order."""

    differences: tuple[Difference, ...]
    digests: dict[str, str]
    num_bytes: int


def digest_of_tensor(tensor: StoredTensor) -> str:
    """sha256 of a tensor's bytes in row-major order, little endian, read block by block."""
    digest = sha256()
    for block in blocks(tensor):
        digest.update(bytes_of(block))
    return digest.hexdigest()


def norm_of(tensor: StoredTensor) -> float:
    """L2 norm over all elements, summed in fp64 block by block."""
    squares = (float(block.double().square().sum()) for block in blocks(tensor))
    return math.sqrt(sum(squares))


def compare(first: StoredModel, second: StoredModel, dtype: torch.dtype | None, tolerance: float | None) -> Comparison:
    """Every tensor of both, streamed.

    `dtype`: the second one has the values of the first in this dtype. With a tolerance, values are compared in
    fp64 whatever the dtypes; without, bits are.
    """
    differences = [Difference(name, "is in the first alone") for name in first.tensors if name not in second.tensors]
    differences += [Difference(name, "is in the second alone") for name in second.tensors if name not in first.tensors]
    names = [name for name in first.tensors if name in second.tensors]
    digests: dict[str, str] = {}
    num_bytes = sum(_num_bytes(second.tensors[name]) for name in names)
    with progress("comparing", num_bytes) as bar, ThreadPoolExecutor(2) as readers:
        for name in names:
            ours, theirs = first.tensors[name], second.tensors[name]
            if dtype is not None and ours.dtype != dtype:
                ours = Cast(ours, dtype)
            what = _unlike(ours, theirs, tolerance)
            if what is None and tolerance is None:
                one, other = readers.map(digest_of_tensor, (ours, theirs))
                if one == other:
                    digests[name] = other
                else:
                    what = value_difference(ours, theirs, None)
            elif what is None:
                what = value_difference(ours, theirs, tolerance)
            if what is not None:
                differences.append(Difference(name, what))
            bar.advance(_num_bytes(theirs))
    return Comparison(tuple(differences), digests, num_bytes)


def _num_bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _unlike(ours: StoredTensor, theirs: StoredTensor, tolerance: float | None) -> str | None:
    if ours.shape != theirs.shape:
        return f"is {list(ours.shape)} in the first and {list(theirs.shape)} in the second"
    if ours.dtype != theirs.dtype and tolerance is None:
        return f"is {name_of(ours.dtype)} in the first and {name_of(theirs.dtype)} in the second"
    return None


def value_difference(ours: StoredTensor, theirs: StoredTensor, tolerance: float | None) -> str | None:
    """How many values differ (by more than `tolerance`), where the first one is, and the largest difference."""
    num_unequal, largest, where = 0, 0.0, None
    for index, one, other in _both(ours, theirs):
        left, right = one.double(), other.double()
        gap = (left - right).abs()
        same = (left == right) | (left.isnan() & right.isnan())
        if tolerance is None:
            same = _same_bits(one, other)
        else:
            same |= gap <= tolerance
        if bool(same.all()):
            continue
        wrong = (~same).nonzero()
        num_unequal += len(wrong)
        finite = gap[~same].nan_to_num(math.inf, math.inf)
        largest = max(largest, float(finite.max()))
        where = where or [low + int(at) for (low, _), at in zip(index, wrong[0], strict=True)]
    if not num_unequal:
        return None
    total = math.prod(ours.shape)
    return f"differs in {num_unequal:,} of {total:,} values, by {largest:g} at most, first at {where}"


def _same_bits(one: Tensor, other: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[one.dtype.itemsize]
    return one.contiguous().view(kind) == other.contiguous().view(kind)


def _both(ours: StoredTensor, theirs: StoredTensor) -> Iterator[tuple[list[tuple[int, int]], Tensor, Tensor]]:
    """The same boxes of both, of some rows each."""
    shape = ours.shape
    if not shape:
        yield [], ours.read(), theirs.read()
        return
    row_bytes = math.prod(shape[1:]) * 8
    step = max(_BLOCK_BYTES // max(row_bytes, 1), 1)
    for low in range(0, shape[0], step):
        box = bounds((slice(low, low + step), *(slice(None) for _ in shape[1:])), shape)
        yield box, ours.read(index_of(box)), theirs.read(index_of(box))
