"""MindSpore made ready in this process: its device, and the cluster of the processes of a run.

A cluster has a scheduler, a process of its own in which its workers find each other. msrun starts one, with the same
command line as the workers; `tessel pretrain --nproc-per-node` starts one, too.
"""

from __future__ import annotations

import os
import socket
import zlib

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.communication import get_rank, init

from tessel.config.run import RunConfig
from tessel.errors import TesselError
from tessel.mindspore_engine.collectives import mend_point_to_point
from tessel.mindspore_engine.support import device_target
from tessel.runtime.log import log
from tessel.runtime.world import SCHEDULER, World


def begin(cfg: RunConfig) -> None:
    """Choose the device, and meet the other processes, if there are any; before anything else has an effect.

    The scheduler of a cluster stays in here until the run is over, and leaves by SystemExit.

    Raises:
        TesselError: the cluster does not form.
    """
    target = device_target(cfg)
    ms.set_device(target)
    # On a CPU, dispatching a small product takes longer than the product.
    ms.set_context(mode=ms.PYNATIVE_MODE, pynative_synchronize=target == "CPU")
    if cfg.precision.deterministic_mode:
        ms.set_deterministic(True)
    if "MS_ROLE" not in os.environ:
        return
    try:
        init()
    except RuntimeError as error:
        if os.environ["MS_ROLE"] == SCHEDULER:
            raise SystemExit(1) from error  # the workers say what happened
        raise TesselError(
            f"The processes of the run did not form MindSpore's cluster ({str(error).splitlines()[0]}). Look whether "
            f"{os.environ.get('MS_SCHED_HOST')}:{os.environ.get('MS_SCHED_PORT')} can be reached, or is in use."
        ) from error
    if os.environ["MS_ROLE"] == SCHEDULER:
        raise SystemExit(0)
    mend_point_to_point()
    _tell_torch()


def describe() -> str:
    """What computes, in words."""
    return f"engine: MindSpore {ms.__version__} on {ms.get_context('device_target')}"


def _tell_torch() -> None:
    """torchrun's environment for this worker: torch's processes are these, and meet in host memory.

    Only the workers together know which of them share a machine, and which port is free on the first one's.
    """
    if "LOCAL_RANK" in os.environ:
        if int(os.environ["RANK"]) != get_rank():
            raise TesselError(f"MindSpore numbers rank {os.environ['RANK']} as {get_rank()}. Start the run with msrun.")
        return
    rank, size = get_rank(), int(os.environ["MS_WORKER_NUM"])
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    own = np.zeros((size, 2), np.float32)
    # Whole numbers below 2^24 are exact in fp32, which every device can add up.
    own[rank] = zlib.crc32(socket.gethostname().encode()) % 2**24, port
    hosts, ports = ops.AllReduce()(ms.Tensor(own)).asnumpy().astype(int).T
    machines = list(dict.fromkeys(hosts))
    neighbours = np.flatnonzero(hosts == hosts[rank]).tolist()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(neighbours.index(rank)),
        LOCAL_WORLD_SIZE=str(len(neighbours)),
        GROUP_RANK=str(machines.index(hosts[rank])),
        GROUP_WORLD_SIZE=str(len(machines)),
        MASTER_ADDR=os.environ["MS_SCHED_HOST"],
        MASTER_PORT=str(ports[0]),
    )
    log(f"msrun: {World.from_environment()}")
