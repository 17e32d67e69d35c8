"""Sums, slices and messages between the processes of a layout, by MindSpore, with their gradients.

On a CPU MindSpore has neither all-gather nor reduce-scatter in a group: both are made of an all-reduce there, with
the same result. Shape suffixes: B micro-batch, S sequence, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import mint, nn, ops
from mindspore.communication import create_group
from mindspore.mint.distributed import distributed as point_to_point

from tessel.layout.topology import Topology

_SEQUENCE_DIM = 1


class Group:
    """Some processes that add tensors up; `ranks` in the order of their numbers, this process at `index`."""

    def __init__(self, name: str, ranks: Sequence[int], rank: int) -> None:
        self.ranks = tuple(ranks)
        self.index = self.ranks.index(rank)
        create_group(name, list(ranks))  # by its members alone
        self._sum = ops.AllReduce(ops.ReduceOp.SUM, group=name)
        self._name = name
        self._emulates = ms.get_context("device_target") == "CPU"

    @property
    def size(self) -> int:
        """Processes of the group."""
        return len(self.ranks)

    def sum(self, x: ms.Tensor) -> ms.Tensor:
        """The sum over the group, without a gradient; fp32 or fp16."""
        return self._sum(x)

    def gather_sequence(self, x_BSE: ms.Tensor) -> ms.Tensor:
        """The parts of all, joined along the sequence; without a gradient."""
        if not self._emulates:
            parts = ops.AllGather(group=self._name)(x_BSE)  # along dim 0
            return mint.cat(mint.split(parts, x_BSE.shape[0], dim=0), dim=_SEQUENCE_DIM)
        zeros = mint.zeros(x_BSE.shape, dtype=x_BSE.dtype)
        parts = [x_BSE if index == self.index else zeros for index in range(self.size)]
        return self.sum(mint.cat(parts, dim=_SEQUENCE_DIM))

    def scatter_sequence(self, x_BSE: ms.Tensor) -> ms.Tensor:
        """This process's part along the sequence of the sum over the group; without a gradient."""
        length = x_BSE.shape[_SEQUENCE_DIM] // self.size
        if not self._emulates:
            stacked = mint.cat(mint.split(x_BSE, length, dim=_SEQUENCE_DIM), dim=0)
            return ops.ReduceScatter(ops.ReduceOp.SUM, group=self._name)(stacked)
        return self.sum(x_BSE)[:, self.index * length : (self.index + 1) * length]


class _Pair(nn.Cell):
    """A collective whose gradient is another one."""

    def __init__(self, forward: Any, backward: Any) -> None:
        super().__init__()
        self._forward_function, self._backward_function = forward, backward

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self._forward_function(x)

    def bprop(self, x: ms.Tensor, out: ms.Tensor, gradient: ms.Tensor) -> tuple[ms.Tensor]:
        return (self._backward_function(gradient),)


def _unchanged(x: ms.Tensor) -> ms.Tensor:
    return x


def _same(x: ms.Tensor) -> ms.Tensor:
    # A cell with a gradient of its own must not return its input itself.
    return x * 1.0


class TensorParallel:
    """How activations enter and leave the layers that `group` shares; None: nothing is shared.

    enter    into a column-cut layer: as they are, the gradient summed; under sequence parallelism all-gather, and
             reduce-scatter of the gradient
    leave    a row-cut layer: summed, the gradient as it is; under sequence parallelism reduce-scatter, and all-gather
    total    a sum that every process goes on with alike
    """

    def __init__(self, group: Group | None, sequence_parallel: bool) -> None:
        self.group = group
        self.size, self.index = (1, 0) if group is None else (group.size, group.index)
        self.num_sequence_parts = self.size if sequence_parallel else 1
        self.enter = self.leave = self.total = _unchanged
        if group is None:
            return
        self.total = _Pair(group.sum, _same)
        if sequence_parallel:
            self.enter = _Pair(group.gather_sequence, group.scatter_sequence)
            self.leave = _Pair(group.scatter_sequence, group.gather_sequence)
        else:
            self.enter, self.leave = _Pair(_same, group.sum), self.total

    def largest(self, x: ms.Tensor) -> ms.Tensor:
        """The elementwise maximum over the group, without a gradient: there is no such collective on a CPU."""
        if self.group is None:
            return x
        slots = [x if index == self.index else mint.zeros(x.shape, dtype=x.dtype) for index in range(self.size)]
        return mint.amax(ops.stop_gradient(self.group.sum(mint.cat([s.reshape(1, *x.shape) for s in slots], dim=0))), 0)


@dataclass(frozen=True)
class Groups:
    """The groups that this process is in, by axis of the layout; None where it is alone.

    `kv_replicas` are tensor-parallel neighbours with the same key/value heads, `tied_stages` the first and the last
    stage, for a process on one of them. `stages` are the global ranks of this process's pipeline, in its order.
    """

    tp: Group | None
    dp: Group | None
    kv_replicas: Group | None
    tied_stages: Group | None
    stages: tuple[int, ...]

    @classmethod
    def of(cls, topology: Topology, rank: int, num_kv_heads: int) -> Groups:
        """Make this process's groups."""
        copies = max(topology.tp // num_kv_heads, 1)
        kv = [ranks[i : i + copies] for ranks in topology.groups("tp") for i in range(0, len(ranks), copies)]
        pipelines = topology.groups("pp")
        tied = [[ranks[0], ranks[-1]] for ranks in pipelines]
        return cls(
            tp=_own("tp", topology.groups("tp"), rank),
            dp=_own("dp", topology.groups("dp"), rank),
            kv_replicas=_own("kv", kv, rank),
            tied_stages=_own("tied", tied, rank),
            stages=tuple(next(ranks for ranks in pipelines if rank in ranks)),
        )


def _own(name: str, groups: Sequence[Sequence[int]], rank: int) -> Group | None:
    for ranks in groups:
        if rank in ranks and len(set(ranks)) > 1:
            return Group(f"tessel_{name}_{ranks[0]}", ranks, rank)
    return None


def mend_point_to_point() -> None:
    """MindSpore 2.8 to 2.10 look a rank up in Ascend's world group, whatever the device, unless told otherwise."""
    if ms.get_context("device_target") == "CPU":
        for function in (point_to_point.get_cache_group_rank, point_to_point.get_cache_group_size):
            function.__defaults__ = ("mccl_world_group",)


def send(x: ms.Tensor, rank: int) -> None:
    """Send a tensor to a process, which must `receive` one of the same shape and dtype."""
    point_to_point.send(x, rank)


def receive(shape: tuple[int, ...], dtype: Any, rank: int) -> ms.Tensor:
    """What a process has sent here."""
    buffer = ms.Tensor(np.zeros(shape, dtype=np.float32)).astype(dtype)
    point_to_point.recv(buffer, rank)
    return buffer
