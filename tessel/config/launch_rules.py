"""The static rules of a launch: how many processes and machines there are, and where they meet."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from tessel.config.layout import Launch
from tessel.config.run import RunConfig
from tessel.errors import UsageError

_NEEDS_NPROC = ("nnodes", "node_rank", "master_addr", "master_port", "max_restarts")
_MOST_PORT = 65535


def num_nodes_of(launch: Launch) -> tuple[int, int]:
    """The fewest and the most machines of --nnodes.

    Raises:
        UsageError: it is neither a number nor MIN:MAX.
    """
    parts = launch.nnodes.split(":")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--nnodes is {launch.nnodes!r}: it must be a number of machines, or MIN:MAX such as 2:4.")
    fewest, most = int(parts[0]), int(parts[-1])
    if fewest > most:
        raise UsageError(f"--nnodes is {launch.nnodes}: the fewest machines come first. Give {most}:{fewest}.")
    return fewest, most


def is_loopback(address: str) -> bool:
    """Whether an address means the machine itself, whichever that is."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost" or address.endswith(".localhost")


def check_launch(cfg: RunConfig) -> None:
    """Machines that can meet, and flags that only mean something to those who start processes."""
    launch, default = cfg.launch, Launch()
    fewest, most = num_nodes_of(launch)
    if launch.nproc_per_node is None:
        idle = [name for name in _NEEDS_NPROC if getattr(launch, name) != getattr(default, name)]
        if idle:
            flag = f"--{idle[0].replace('_', '-')}"
            raise UsageError(
                f"{flag} needs --nproc-per-node, the number of processes to start on this machine. Add it; "
                f"or start with torchrun, and give {flag} to that."
            )
        return
    if most > 1 and is_loopback(launch.master_addr):
        raise UsageError(
            f"--nnodes {launch.nnodes} with --master-addr {launch.master_addr}: that is each machine itself, so they "
            "cannot meet. Give the name or address of machine 0, as the others reach it."
        )
    if launch.node_rank >= most:
        raise UsageError(
            f"--node-rank is {launch.node_rank} of --nnodes {launch.nnodes}: machines are counted from 0, so it must "
            f"be below {most}."
        )
    if launch.master_port is not None and not 0 < launch.master_port <= _MOST_PORT:
        raise UsageError(f"--master-port is {launch.master_port}: it must be from 1 to {_MOST_PORT}.")


LAUNCH_RULES: tuple[Callable[[RunConfig], None], ...] = (check_launch,)
