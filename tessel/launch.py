"""`--nproc-per-node`: a verb in several processes, on one machine or on one of several."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from tessel.config.launch_rules import is_loopback, num_nodes_of
from tessel.config.layout import Launch
from tessel.errors import UsageError
from tessel.runtime.world import is_launched, unread_counts

DEFAULT_PORT = 29500
"""Where machine 0 listens if nothing else is said: torchrun's port."""


def starts_processes(options: Launch, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is to start others, rather than being one of them or alone.

    Raises:
        UsageError: --nproc-per-node is given to a process that torchrun has started.
    """
    if options.nproc_per_node is None:
        remark = unread_counts(environment)
    elif is_launched(environment):
        return False
    elif "LOCAL_RANK" in environment:
        raise UsageError(
            f"--nproc-per-node {options.nproc_per_node} starts processes, and this is one already, started by "
            "torchrun (LOCAL_RANK is set). Leave --nproc-per-node out, or torchrun."
        )
    else:
        remark = unread_counts(environment) if options.nnodes == "1" else None
    if remark is not None:
        print(f"tessel: {remark}", file=sys.stderr, flush=True)
    return options.nproc_per_node is not None


def launch(arguments: Sequence[str], options: Launch) -> int:
    """Start `python ARGUMENTS` in `options.nproc_per_node` processes of this machine; returns their exit status.

    The processes find out who they are from torchrun's environment (`runtime.world`). What is wrong with the
    command line is best found before: one process then says it.

    Raises:
        TesselError: the machines of the run did not meet.
    """
    # Below that, torch's C++ prints the stack of each connection that a dead process has left. Read when it loads.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from tessel.runtime.agent import Nodes, loopback_interface, run

    assert options.nproc_per_node is not None
    fewest, most = num_nodes_of(options)
    port = options.master_port
    nodes = Nodes(
        nproc_per_node=options.nproc_per_node,
        fewest=fewest,
        most=most,
        node_rank=options.node_rank,
        master_addr=options.master_addr,
        master_port=port if port is not None else (0 if most == 1 else DEFAULT_PORT),
        max_restarts=options.max_restarts,
    )
    environment = threads_of(options.nproc_per_node)
    interface = loopback_interface()
    if most == 1 and interface is not None and is_loopback(options.master_addr):
        # A laptop's name and address change with the network it is in.
        environment.setdefault("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", interface))
    return run(arguments, nodes, environment)


def threads_of(num_processes: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """OMP_NUM_THREADS for each of some processes on this machine: a fair share of its cores, unless it is set."""
    if num_processes == 1 or "OMP_NUM_THREADS" in environment:
        return {}
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(num_cores // num_processes, 1)
    cores = f"{num_cores} core{'s' if num_cores > 1 else ''}"
    print(f"tessel: OMP_NUM_THREADS={share}: {cores}, {num_processes} processes", file=sys.stderr, flush=True)
    return {"OMP_NUM_THREADS": str(share)}
