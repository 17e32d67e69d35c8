"""What the tests of launching start in each process: `python -m tests.runtime.worker MODE [ARGUMENT]`.

`python -m tests.runtime.worker launch FLAGS... -- MODE [ARGUMENT]` starts it through tessel's own launcher.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tessel.config.layout import Launch
from tessel.config.parser import parse
from tessel.errors import TesselError, UsageError
from tessel.launch import launch
from tessel.runtime import failure, watchdog
from tessel.runtime.log import log, voice, warn_once
from tessel.runtime.world import World

TIMEOUT_MINUTES = float(os.environ.get("TEST_TIMEOUT_MINUTES", "10"))


def steps(argument: str, on_step: Callable[[int, World], None], num_steps: int = 10_000) -> None:
    """Sums over all processes, as a run has them; the pids and the last step are left in the folder `argument`."""
    import torch
    from torch import distributed

    from tessel.runtime.process import process_group

    world = World.from_environment()
    with process_group(torch.device("cpu"), TIMEOUT_MINUTES):
        Path(argument, f"pid_{world.rank}").write_text(str(os.getpid()))
        for iteration in range(1, num_steps + 1):
            watchdog.at(iteration, "training step")
            on_step(iteration, world)
            value = torch.ones(1)
            distributed.all_reduce(value)
            assert value.item() == world.world_size
            log(f"iteration {iteration}")
            time.sleep(0.01)


def fail(argument: str) -> None:
    def on_step(iteration: int, world: World) -> None:
        if iteration == 3 and world.rank == 2:
            raise ZeroDivisionError("of one process")

    steps(argument, on_step)


def refuse_one(argument: str) -> None:
    def on_step(iteration: int, world: World) -> None:
        if iteration == 3 and world.rank == 1:
            raise TesselError("the disk is full.")

    steps(argument, on_step)


def refuse_all(argument: str) -> None:
    raise UsageError(f"{argument} cannot be.\nSecond line.")


def go_on(argument: str) -> None:
    steps(argument, lambda iteration, world: None)


def succeed(argument: str) -> None:
    warn_once(f"as rank {World.from_environment().rank}")
    steps(argument, lambda iteration, world: None, num_steps=3)


def hang(argument: str) -> None:
    def on_step(iteration: int, world: World) -> None:
        if iteration == 3 and world.rank == 1:
            time.sleep(1000)

    steps(argument, on_step)


def hang_in_group(argument: str) -> None:
    """Gloo's own limit, with no watchdog to come before it."""
    from datetime import timedelta

    import torch
    from torch import distributed

    world = World.from_environment()
    distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
    watchdog.at(3, "training step")
    if world.rank == 1:
        time.sleep(1000)
    distributed.all_reduce(torch.ones(1))


def stop(argument: str) -> None:
    """Stops in good order once a signal has come to any process."""
    import torch
    from torch import distributed

    from tessel.runtime.process import process_group
    from tessel.train.stop import StopRequest, signals_stop

    world = World.from_environment()
    request = StopRequest()
    with process_group(torch.device("cpu"), TIMEOUT_MINUTES), signals_stop(request):
        Path(argument, f"pid_{world.rank}").write_text(str(os.getpid()))
        while True:
            stops = torch.tensor([float(request.signalled())])
            distributed.all_reduce(stops)
            if stops.item():
                break
            time.sleep(0.01)
        time.sleep(1)
        Path(argument, f"saved_{world.rank}").touch()


def once(argument: str) -> None:
    """Rank 0, or the first rank of each node, makes a file; the others read it."""
    import torch

    from tessel.runtime.process import process_group

    world = World.from_environment()
    folder = Path(argument)
    with process_group(torch.device("cpu"), TIMEOUT_MINUTES) as processes:
        for per_node in (False, True):
            place = folder / (f"node_{world.node}" if per_node else "all")
            with processes.first("a file", per_node=per_node) as leads:
                if leads:
                    time.sleep(0.5 if per_node else min(1.5 * TIMEOUT_MINUTES * 60, 10))
                    place.write_text(str(world.rank))
                assert place.read_text()
                (folder / f"{place.name}_leader_{world.rank}_{int(leads)}").touch()
        assert processes.nodes[world.node] == tuple(world.node_ranks)


def lacking(argument: str) -> None:
    """The last node lacks a folder."""
    import torch

    from tessel.runtime.process import process_group

    world = World.from_environment()

    def look() -> None:
        if world.node == world.num_nodes - 1:
            raise TesselError("--load: /model does not exist.")

    with process_group(torch.device("cpu"), TIMEOUT_MINUTES) as processes:
        processes.together(look)


MODES = (fail, refuse_one, refuse_all, go_on, succeed, hang, hang_in_group, stop, once, lacking)


def main(argv: list[str]) -> int:
    if argv[0] == "launch":
        flags, rest = argv[1 : argv.index("--")], argv[argv.index("--") + 1 :]
        return launch(["-m", "tests.runtime.worker", *rest], parse(Launch, flags, "worker").value)
    world = World.from_environment()
    voice.speak_as(world.rank, os.environ.get("TEST_RANK_LOG_DIR"))
    with failure.shown_once(world):
        {mode.__name__: mode for mode in MODES}[argv[0]](argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
