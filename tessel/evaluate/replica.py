"""Copies of a model that answer different questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessel.evaluate.exam import Item
from tessel.generate.load import num_replicas
from tessel.layout.topology import Topology


@dataclass(frozen=True)
class Replica:
    """Which copy of the model this process belongs to; one process of each speaks for it."""

    number: int
    num_replicas: int
    speaks: bool

    @classmethod
    def of(cls, topology: Topology, rank: int) -> Replica:
        """The copy that a rank belongs to. Those that share experts are one, whose processes do the same."""
        place, number = topology.place(rank), num_replicas(topology)
        copy, within = divmod(place.dp, topology.dp // number)
        return cls(copy, number, place.tp == place.pp == within == 0)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This replica's part, one piece, so that beginnings that questions share stay together."""
        first, end = (len(items) * n // self.num_replicas for n in (self.number, self.number + 1))
        return items[first:end]
