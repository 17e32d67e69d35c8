"""Which of how many processes this is, as the environment of torchrun or of msrun says. Needs no torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from tessel.errors import UsageError

LAUNCHED = "TESSEL_LAUNCHED"
"""Set for the processes that `tessel VERB --nproc-per-node` starts, beside what torchrun sets."""
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SCHEDULER, WORKER = "MS_SCHED", "MS_WORKER"
"""Values of msrun's MS_ROLE."""


@dataclass(frozen=True)
class World:
    """A process's place among the processes of a run. Ranks of a node follow each other."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    num_nodes: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """What torchrun says of this process; one process where it says nothing.

        LOCAL_RANK decides: RANK and WORLD_SIZE without it count the machines of a scheduler, and are not read.

        Raises:
            UsageError: part of torchrun's variables is missing, or is no number, or there is no port to meet at.
        """
        if "LOCAL_RANK" not in environment:
            return cls._of_msrun(environment) if "MS_ROLE" in environment else cls()
        missing = [name for name in _NEEDED if name not in environment]
        if missing:
            raise UsageError(
                f"LOCAL_RANK is set and {' and '.join(missing)} not: that is no whole environment of a launcher. "
                "Start with torchrun or --nproc-per-node, or unset LOCAL_RANK for one process."
            )
        rank, world_size, local_world_size = (_number(environment, name) for name in _NEEDED)
        if world_size > 1 and environment.get("MASTER_PORT") == "0":
            raise UsageError(
                "MASTER_PORT is 0, which is no port: torchrun --master-port 0 tells its processes none, and they would "
                "wait for one another forever. Give a port that is free, or torchrun --standalone."
            )
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=_number(environment, "LOCAL_RANK"),
            local_world_size=local_world_size,
            node=_number(environment, "GROUP_RANK", rank // local_world_size),
            num_nodes=_number(environment, "GROUP_WORLD_SIZE", -(-world_size // local_world_size)),
        )

    @classmethod
    def _of_msrun(cls, environment: Mapping[str, str]) -> World:
        """What msrun says of this process, which is nothing of machines: only the processes together can tell.

        Its scheduler runs the command line, too. It counts as one more process, so that nobody takes it for the first.
        """
        num_workers = _number(environment, "MS_WORKER_NUM", 1)
        if environment["MS_ROLE"] == SCHEDULER:
            return cls(num_workers, num_workers + 1, num_workers, num_workers + 1)
        rank, local_rank = _number(environment, "RANK_ID"), _number(environment, "DEVICE_ID", 0)
        return cls(rank, num_workers, local_rank, num_workers)

    @property
    def node_ranks(self) -> range:
        """The ranks on this node."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)

    def name_of(self, ranks: list[int]) -> str:
        """Some ranks of this node in words, with the node where there are several."""
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        return who if self.num_nodes == 1 else f"{who} on {node_name(self.node)}"


def node_name(node: int) -> str:
    """This machine in words."""
    return f"node {node} ({socket.gethostname()})"


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started by `tessel VERB --nproc-per-node`, which has said what there was to say."""
    return "LOCAL_RANK" in environment and LAUNCHED in environment


def unread_counts(environment: Mapping[str, str] = os.environ) -> str | None:
    """A remark on a scheduler's RANK and WORLD_SIZE, which look like torchrun's but count machines."""
    if "LOCAL_RANK" in environment or environment.get("WORLD_SIZE", "1") == "1":
        return None
    named = " and ".join(f"{name}={environment[name]}" for name in ("WORLD_SIZE", "RANK") if name in environment)
    return (
        f"{named} without LOCAL_RANK count machines and are not read; give --nproc-per-node with --nnodes and "
        "--node-rank, or use torchrun, for a run of several"
    )


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name)
    if text is None and otherwise is not None:
        return otherwise
    if text is None or not text.isdecimal():
        raise UsageError(f"{name}={text} in the environment is no whole number. Start with torchrun, or unset it.")
    return int(text)
