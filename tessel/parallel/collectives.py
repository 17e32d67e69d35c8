"""Collectives with gradients: each is a forward and the backward that belongs to it.

They take and give plain local tensors, and are written on torch's functional collectives, so that a
compiled region may hold them. With group None (a degree of 1) each is the identity and sends nothing.
Every reduction is a sum.

============= ============================ ============================ ==============================
function      forward                      backward                     bytes that a rank sends, ring
============= ============================ ============================ ==============================
copy_to       identity                     all-reduce                   0; 2 (n-1)/n x
reduce_from   all-reduce                   identity                     2 (n-1)/n x; 0
gather_from   all-gather along a dim       reduce-scatter along it      (n-1) x; (n-1) x
scatter_to    reduce-scatter along a dim   all-gather along it          (n-1)/n x; (n-1)/n x
join_from     all-gather along a dim       its own part                 (n-1) x; 0
all_to_all    part r to rank r, dim 0      the same the other way       all but its own part; the same
============= ============================ ============================ ==============================

n is the size of the group and x the bytes of the forward's input. gather_from belongs to what each rank
uses for itself, so that gradients differ and add up; join_from to what all ranks use alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def copy_to(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """What every rank holds alike, into a region where ranks differ: identity; the gradients are summed."""
    if group is None:
        return x
    y: Tensor = _Copy.apply(x, group)
    return y


def reduce_from(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of the ranks' parts, alike on all of them; the gradient passes as it is."""
    if group is None:
        return x
    y: Tensor = _Reduce.apply(x, group)
    return y


def gather_from(x: Tensor, group: ProcessGroup | None, dim: int) -> Tensor:
    """The ranks' tensors joined along `dim`, for a region where ranks differ: gradients are summed and cut."""
    if group is None:
        return x
    y: Tensor = _Gather.apply(x, group, dim)
    return y


def scatter_to(x: Tensor, group: ProcessGroup | None, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum over ranks; the gradients are joined.

    The size of `dim` must be a multiple of the group's.
    """
    if group is None:
        return x
    y: Tensor = _Scatter.apply(x, group, dim)
    return y


def join_from(x: Tensor, group: ProcessGroup | None, dim: int) -> Tensor:
    """The ranks' tensors joined along `dim`, which all ranks go on with alike: each keeps its part of the gradient."""
    if group is None:
        return x
    y: Tensor = _Join.apply(x, group, dim)
    return y


def all_to_all(
    x: Tensor,
    group: ProcessGroup | None,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> Tensor:
    """Rows of dim 0 exchanged: the r-th run of `input_splits` rows goes to rank r.

    The r-th run of `output_splits` rows of the result comes from rank r. Without splits, all runs are
    equally long. Runs may be empty.
    """
    if group is None:
        return x
    output = None if output_splits is None else list(output_splits)
    input_ = None if input_splits is None else list(input_splits)
    y: Tensor = _AllToAll.apply(x, group, output, input_)
    return y


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grads[0], ctx.group, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grads[0], ctx.group, ctx.dim), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _own_part(grads[0], ctx.group, ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: ProcessGroup, output_splits: list[int] | None, input_splits: list[int] | None
    ) -> Tensor:
        ctx.group, ctx.output_splits, ctx.input_splits = group, output_splits, input_splits
        return _exchange(x, group, output_splits, input_splits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.group, ctx.input_splits, ctx.output_splits), None, None, None


# torch's functional collectives are operators that a compiler knows; each result has to be waited for.
def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    return _waited(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.group_name))


def _all_gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    y = _waited(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))
    return y if dim % x.dim() == 0 else torch.cat(y.chunk(group.size()), dim)


def _reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    parts = _parts(x, group, dim)
    if dim % x.dim():
        x = torch.cat(parts)
    y = torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    return _waited(y)


def _exchange(x: Tensor, group: ProcessGroup, output: list[int] | None, input_: list[int] | None) -> Tensor:
    even = [x.shape[0] // group.size()] * group.size()
    y = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), output or even, input_ or even, group.group_name)
    return _waited(y)


def _own_part(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    return _parts(x, group, dim)[group.rank()].contiguous()


def _parts(x: Tensor, group: ProcessGroup, dim: int) -> tuple[Tensor, ...]:
    if x.shape[dim] % group.size():
        raise ValueError(
            f"dim {dim} of {tuple(x.shape)} is not a multiple of {group.size()}, the processes to share it."
        )
    return x.chunk(group.size(), dim)


def _waited(x: Tensor) -> Tensor:
    y: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return y
