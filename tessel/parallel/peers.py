"""Sums over the processes of a run. One process alone adds nothing."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, ReduceOp

from tessel.layout.topology import Topology
from tessel.parallel.groups import Groups


class Peers:
    """The other processes, as the training step sees them."""

    def __init__(self, groups: Groups | None = None) -> None:
        self._groups = groups

    @property
    def topology(self) -> Topology:
        """The degrees of the run."""
        return Topology() if self._groups is None else self._groups.topology

    @property
    def device(self) -> torch.device:
        """Where tensors must lie to be added up."""
        return torch.device("cpu") if self._groups is None else self._groups.device

    @property
    def num_processes(self) -> int:
        """Processes of the run."""
        return 1 if self._groups is None else self._groups.topology.world_size

    @property
    def num_replicas(self) -> int:
        """Data-parallel replicas: processes that read different samples."""
        return 1 if self._groups is None else self._groups.topology.dp

    @property
    def replica(self) -> int:
        """This process's data-parallel replica, from 0."""
        return 0 if self._groups is None else self._groups.place.dp

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run."""
        return self._groups is None or self._groups.rank == 0

    def sum_tokens(self, count: Tensor) -> Tensor:
        """A count of this replica's tokens, added up over replicas."""
        return count if self._groups is None else _all_reduce(count, self._groups.dp, ReduceOp.SUM)

    def sum_losses(self, losses: Tensor) -> Tensor:
        """What this process's part of the model and of the batch came to, added up over all parts."""
        return losses if self._groups is None else _all_reduce(losses, self._groups.batch, ReduceOp.SUM)

    def sum_everywhere(self, values: Tensor) -> Tensor:
        """The sum over every process."""
        if self._groups is None or self.num_processes == 1:
            return values
        return _all_reduce(values, distributed.group.WORLD, ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """The largest over every process; NaN where one has NaN."""
        if self._groups is None or self.num_processes == 1:
            return values
        bad = _all_reduce(values.isnan().to(values.dtype), distributed.group.WORLD, ReduceOp.MAX)
        values = _all_reduce(values.nan_to_num(nan=0.0, posinf=torch.inf), distributed.group.WORLD, ReduceOp.MAX)
        return values.masked_fill(bad > 0, torch.nan)

    def largest_number(self, number: int) -> int:
        """The largest of a small whole number over every process."""
        if self._groups is None or self.num_processes == 1:
            return number
        return int(self.largest(torch.tensor([float(number)], device=self.device)))


def _all_reduce(values: Tensor, group: ProcessGroup | None, op: ReduceOp.RedOpType) -> Tensor:
    if group is None:
        return values
    values = values.clone()
    distributed.all_reduce(values, op, group=group)
    return values
