"""A verb as one of several processes that have a process group already (`processes.run`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from tessel.generate import load as loads
from tessel.runtime.log import voice


@contextmanager
def _joined(*_: Any) -> Iterator[Any]:
    from tessel.runtime.process import Processes
    from tessel.runtime.world import World

    world = World.from_environment()
    yield Processes(world, control=distributed.group.WORLD if world.world_size > 1 else None)


def join() -> int:
    """Let verbs that are called in this process take part in the group; returns its rank."""
    rank, size = distributed.get_rank(), str(distributed.get_world_size())
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    loads.process_group = _joined  # type: ignore[assignment]
    voice.speak_as(rank)
    return rank
