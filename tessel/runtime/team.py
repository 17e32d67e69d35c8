"""The processes of a run as readers and writers of folders: what one finds out, and what fails, all know.

Everything here goes over CPU process groups of its own, whatever the accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

from torch import distributed
from torch.distributed import ProcessGroup

from tessel.errors import TesselError, UsageError
from tessel.runtime.failure import PeerFailedError

T = TypeVar("T")

# Processes wait in these groups for the slowest disk. One that died is noticed at once, so this is only for one
# that hangs.
TIMEOUT = timedelta(hours=2)
_MOST_TOLD = 8


@dataclass(frozen=True)
class Team:
    """This process among the others. `Team()` is a process alone.

    `nodes`: the ranks that see the same folders, group by group; one group where storage is shared.
    `everyone` and `neighbours` are groups of all ranks and of those that see this rank's folders; None for a
    process alone. A team that a thread uses is not to be used outside of it.
    """

    rank: int = 0
    nodes: tuple[tuple[int, ...], ...] = ((0,),)
    everyone: ProcessGroup | None = None
    neighbours: ProcessGroup | None = None

    @classmethod
    def of(cls, nodes: Sequence[Sequence[int]] | None = None, timeout: timedelta = TIMEOUT) -> Team:
        """Make the groups; every process calls it, from its main thread, in the same order as other groups.

        `nodes`: see the class; None for shared storage.
        """
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return cls()
        ranks = tuple(range(distributed.get_world_size()))
        everyone = distributed.new_group(list(ranks), timeout=timeout, backend="gloo")
        if nodes is None or len(nodes) == 1:
            return cls(distributed.get_rank(), (ranks,), everyone, everyone)
        own = None
        for node in nodes:
            made = distributed.new_group(list(node), timeout=timeout, backend="gloo")
            if distributed.get_rank() in node:
                own = made
        return cls(distributed.get_rank(), tuple(tuple(node) for node in nodes), everyone, own)

    @property
    def size(self) -> int:
        """Processes in all."""
        return sum(len(node) for node in self.nodes)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all of them."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this process makes the folders that its neighbours fill."""
        return self.rank == self._own[0]

    @property
    def shares_storage(self) -> bool:
        """Whether all processes see the same folders."""
        return len(self.nodes) == 1

    @property
    def node(self) -> int:
        """The number of the group of ranks that see this rank's folders."""
        return next(number for number, ranks in enumerate(self.nodes) if self.rank in ranks)

    @property
    def _own(self) -> tuple[int, ...]:
        return self.nodes[self.node]

    def each(self, function: Callable[[], T]) -> list[T]:
        """What `function()` returns on every process, by rank. All call this together.

        Raises:
            TesselError: it failed somewhere. All processes raise the same then.
            PeerFailedError: it failed elsewhere in a way that is no user's to mend; there, what it was is raised.
        """
        if self.everyone is None:
            return [function()]
        try:
            outcome: tuple[str, Any] = ("", function())
            own: Exception | None = None
        except Exception as error:  # noqa: BLE001 - the others must hear of it; it is raised below
            outcome, own = (_kind(error), _message(error)), error
        outcomes: list[Any] = [None] * self.size
        distributed.all_gather_object(outcomes, outcome, group=self.everyone)
        failed = {rank: (kind, value) for rank, (kind, value) in enumerate(outcomes) if kind}
        if failed:
            if own is not None and not isinstance(own, TesselError):
                raise own
            raise self._joined(failed) from own
        return [cast(T, value) for _, value in outcomes]

    def first(self, function: Callable[[], T]) -> T:
        """What `function()` returns on the first process, which alone calls it. Raises as `each`."""
        return cast(T, self.each(lambda: function() if self.is_first else None)[0])

    def writer(self, function: Callable[[], T]) -> T:
        """What `function()` returns on the process that writes this one's folders; only those call it.

        Raises as `each`, everywhere, whichever node it failed on.
        """
        return cast(T, self.each(lambda: function() if self.writes else None)[self._own[0]])

    def gather(self, value: T) -> dict[int, T]:
        """`value` of this process and its neighbours by rank, on the one that writes; empty on the others."""
        if self.neighbours is None:
            return {self.rank: value}
        values: list[Any] | None = [None] * len(self._own) if self.writes else None
        distributed.gather_object(value, values, dst=self._own[0], group=self.neighbours)
        return dict(zip(self._own, values, strict=True)) if values is not None else {}

    def wait(self) -> None:
        """Wait until all are here."""
        self.each(lambda: None)

    def name_of(self, rank: int) -> str:
        """How an error names the place of a process."""
        if self.shares_storage:
            return f"process {rank}"
        node = next(number for number, ranks in enumerate(self.nodes) if rank in ranks)
        return f"node {node} (process {rank})"

    def _joined(self, failed: Mapping[int, tuple[str, str]]) -> TesselError | PeerFailedError:
        """One error for all: what several say alike once, with the place where that says more."""
        told: dict[str, int] = {}
        for rank, (_, text) in failed.items():
            told.setdefault(text, rank)
        kinds = {kind for kind, _ in failed.values()}
        if len(told) == 1 and (self.shares_storage or len(failed) == self.size):
            message = next(iter(told))
        else:
            lines = [f"{self.name_of(rank)}: {text}" for text, rank in told.items()]
            more = [f"and {len(lines) - _MOST_TOLD} more"] if len(lines) > _MOST_TOLD else []
            message = "\n".join([*lines[:_MOST_TOLD], *more])
        if not kinds <= {"TesselError", "UsageError"}:
            return PeerFailedError(message)
        return UsageError(message) if kinds == {"UsageError"} else TesselError(message)


def _kind(error: Exception) -> str:
    for kind in (UsageError, TesselError):
        if isinstance(error, kind):
            return kind.__name__
    return type(error).__name__


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, TesselError) else f"{type(error).__name__}: {error}"
