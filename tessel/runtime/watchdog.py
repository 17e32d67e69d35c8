"""Looks after a process among many, from a thread of its own.

It ends the process where nothing else would: when the run makes no progress (an operation between processes that
another never enters hangs for ever), when another process of the node has died or failed and this one waits for
it, when another node has failed, and when the launcher is gone.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tessel.runtime import failure, stack
from tessel.runtime.failure import ELSEWHERE, ERROR, HANG, Record, desk
from tessel.runtime.log import voice
from tessel.runtime.world import World

LOOK_INTERVAL_S = 0.5
# A process that another's end has not ended by then is stuck, and the launcher would wait for half a minute.
GRACE_S = 10.0
_NEWS_INTERVAL_S = 2.0


class News(Protocol):
    """What tells of the other nodes."""

    def hear(self) -> str | None:
        """Why another node has failed, if one has."""


class Position:
    """Where the run is. There is one of this process; `at` moves it."""

    def __init__(self) -> None:
        self.iteration: int | None = None
        self.phase = "start-up"
        self.since_s = time.monotonic()
        self.num_unlimited = 0

    def describe(self) -> str:
        """`in iteration 7, save`."""
        return f"in {self.phase}" if self.iteration is None else f"in iteration {self.iteration}, {self.phase}"


_position = Position()


def at(iteration: int | None, phase: str) -> None:
    """Say that the run has come so far: `at(7, "forward and backward")`. Costs nothing to speak of."""
    _position.iteration, _position.phase, _position.since_s = iteration, phase, time.monotonic()


def goes_on() -> None:
    """Say that the phase of the last `at` has come further, such as by one batch of an evaluation."""
    _position.since_s = time.monotonic()


@contextmanager
def unlimited(phase: str) -> Iterator[None]:
    """Around work on files, or waiting for another process's, which may take as long as it needs."""
    before = _position.phase
    _position.phase = phase
    _position.num_unlimited += 1
    try:
        yield
    finally:
        _position.num_unlimited -= 1
        at(_position.iteration, before)


@contextmanager
def watching(world: World, limit_s: float, news: News | None = None) -> Iterator[None]:
    """Watch while inside; `news` is for runs of several nodes.

    After an error it goes on until the process ends: the cause may lie elsewhere, and leaving can hang.
    """
    watchdog = Watchdog(world, limit_s, news)
    at(_position.iteration, _position.phase)
    watchdog.start()
    yield
    watchdog.stop()


class Watchdog:
    """The thread. `limit_s` is how long the run may take from one `at` to the next."""

    def __init__(self, world: World, limit_s: float, news: News | None = None) -> None:
        self._world = world
        self._limit_s = limit_s
        self._news = news
        self._launcher = os.getppid()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="watchdog", daemon=True)
        self._ends_s: float | None = None
        self._next_news_s = 0.0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End: the others are left in good order."""
        self._stopped.set()

    def _look_after(self) -> None:
        while not self._stopped.wait(LOOK_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        if os.getppid() != self._launcher:
            failure.report(Record(self._world.rank, ERROR, f"the launcher (pid {self._launcher}) is gone"))
        if self._ends_s is None:
            self._look_at_others()
        elif time.monotonic() > self._ends_s:
            self._keep_stacks()
            failure.leave(1)
        waited_s = time.monotonic() - _position.since_s
        if not _position.num_unlimited and waited_s > self._limit_s:
            self._keep_stacks()
            failure.report(self._where(waited_s))

    def _look_at_others(self) -> None:
        claim, dead = desk.claim(), failure.dead_peers()
        if claim is not None and claim.rank != self._world.rank:
            if claim.kind == HANG:
                self._keep_stacks()
                failure.write(self._where(time.monotonic() - _position.since_s))
            self._ends_s = time.monotonic() + GRACE_S
        elif dead:
            voice.keep(f"{self._world.name_of(dead)} died; this process ends within {GRACE_S:g} s")
            self._ends_s = time.monotonic() + GRACE_S
            self._tell(f"{self._world.name_of(dead)} died")
        elif self._world.num_nodes > 1 and self._world.local_rank == 0:
            self._look_at_other_nodes()

    def _look_at_other_nodes(self) -> None:
        """One process of each node asks, and the others see what it says."""
        if self._news is None or time.monotonic() < self._next_news_s:
            return
        self._next_news_s = time.monotonic() + _NEWS_INTERVAL_S
        text = self._news.hear()
        if text is not None:
            failure.report(Record(self._world.rank, ELSEWHERE, text))

    def _tell(self, text: str) -> None:
        if self._world.num_nodes > 1 and desk.tell_nodes is not None:
            desk.tell_nodes(text)

    def _where(self, waited_s: float) -> Record:
        place = stack.place_of_main_thread(self._thread.ident)
        where = f"{_position.describe()}: {place}"
        return Record(
            self._world.rank, HANG, f"no progress for {_minutes(waited_s)} {where}", group=where
        )  # fmt: skip

    def _keep_stacks(self) -> None:
        if voice.file is not None:
            faulthandler.dump_traceback(voice.file, all_threads=True)


def _minutes(seconds: float) -> str:
    minutes = float(f"{seconds / 60:.2g}")
    return f"{minutes:g} minute{'' if minutes == 1 else 's'}"
