"""Copies of a model that answer different questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessel.errors import UsageError
from tessel.evaluate.exam import Item
from tessel.layout.topology import Topology


@dataclass(frozen=True)
class Replica:
    """Which copy of the model this process belongs to; one process of each speaks for it."""

    number: int
    num_replicas: int
    speaks: bool

    @classmethod
    def of(cls, topology: Topology, rank: int) -> Replica:
        """
        Raises:
            UsageError: replicas share experts, so that they cannot work apart.
        """
        if topology.dp > 1 and topology.ep * topology.etp > topology.tp:
            raise UsageError(
                f"--expert-model-parallel-size {topology.ep} deals experts out over replicas, which answer different "
                f"questions here: start {topology.tp * topology.pp} processes, or lower it."
            )
        place = topology.place(rank)
        return cls(place.dp, topology.dp, place.tp == 0 and place.pp == 0)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This replica's part, one piece, so that beginnings that questions share stay together."""
        first, end = (len(items) * n // self.num_replicas for n in (self.number, self.number + 1))
        return items[first:end]
