"""MindSpore's cluster around processes that tessel starts itself: its scheduler, and who the workers are.

`tessel pretrain --nproc-per-node N` starts the workers as with torch, so that a failure ends them all, with one
error. The scheduler is a small process beside them, on the first machine.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from tessel.config.layout import Launch
from tessel.runtime.world import SCHEDULER, WORKER

_SCHEDULE = "from mindspore.communication import init; init()"
_ERRORS_ALONE = "3"
_PORT_OFFSET = 1
_END_WAIT_S = 5.0


@contextmanager
def scheduler(launch: Launch, default_port: int) -> Iterator[None]:
    """While inside, workers that inherit this environment find a scheduler, and it ends with them.

    It listens beside torch's store: on the port after --master-port, or after `default_port` where several machines
    must know it; one machine alone takes a free one.
    """
    if launch.nproc_per_node == 1 and launch.nnodes == "1":
        yield
        return
    num_workers = (launch.nproc_per_node or 1) * int(launch.nnodes)
    given = launch.master_port if launch.master_port is not None or launch.nnodes == "1" else default_port
    port = _free_port() if given is None else given + _PORT_OFFSET
    shared = {"MS_WORKER_NUM": str(num_workers), "MS_SCHED_HOST": launch.master_addr, "MS_SCHED_PORT": str(port)}
    os.environ.update(shared)
    process = None
    if launch.node_rank == 0:
        command = [sys.executable, "-c", _SCHEDULE]
        process = subprocess.Popen(
            command, env={**os.environ, "MS_ROLE": SCHEDULER}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    try:
        yield
    finally:
        if process is not None:
            _end(process)


def join(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take this process's place in the cluster, if tessel has started it for one; msrun has said so already.

    Of what MindSpore logs by itself, errors alone are let through, unless GLOG_v says otherwise.
    """
    environment.setdefault("GLOG_v", _ERRORS_ALONE)
    if "MS_SCHED_PORT" in environment and "MS_ROLE" not in environment and "RANK" in environment:
        environment.update(
            MS_ROLE=WORKER,
            MS_NODE_ID=environment["RANK"],
            RANK_ID=environment["RANK"],
            DEVICE_ID=environment["LOCAL_RANK"],
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """It ends by itself once its workers have left in good order."""
    try:
        process.wait(_END_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
