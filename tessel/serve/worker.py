"""The one thread that runs the model, and how the server's event loop talks to it.

The loop hands over requests and cancellations in a queue; the thread takes what is there between two steps, and gives
the events of steps back together: where steps are short and texts are many, those of a few, which nobody can tell from
one after another, since each write to a connection costs as much as some tokens of a small model. A text that has ended
does not wait for the others, since its client may ask for more. Everything but `_work` and what it calls runs on the
loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from tessel.generate.batcher import Batcher
from tessel.generate.lockstep import IDLE_STEP_S
from tessel.generate.request import Event, Request
from tessel.serve.errors import ApiError

_WRITE_S = 0.002
"""From one write to the next on average, to whichever connection..."""
_HAND_OUT_S = 0.08
"""... but each text is written so often at least, since a stream is to look even."""


@dataclass(frozen=True)
class _Add:
    key: int
    request: Request


@dataclass(frozen=True)
class _Cancel:
    key: int


_Command = _Add | _Cancel | None
"""None: stop."""


class Job:
    """The texts of one request of a client, as they grow: `async for events in job`, each (number of the text, event).

    Ends when all have ended; what has come meanwhile is given together.
    """

    def __init__(self, keys: Sequence[int]) -> None:
        self.keys = tuple(keys)
        self._numbers = {key: number for number, key in enumerate(keys)}
        self._left = len(keys)
        self._events: list[tuple[int, Event]] = []
        self._news = asyncio.Event()
        self._error: ApiError | None = None
        self.is_cancelled = False

    def put(self, key: int, event: Event) -> None:
        """An event of the text `key`."""
        self._events.append((self._numbers[key], event))
        self._left -= event.finish is not None
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """No more events are to come: whoever waits for them gets the error."""
        self._error = error
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Event]]]:
        while self._left or self._events:
            await self._news.wait()
            self._news.clear()
            events, self._events = self._events, []
            if events:
                yield events
            if self._error is not None:
                raise self._error


class Worker:
    """Runs a batcher. At most `max_texts` are waiting or running at a time.

    `on_end` is called on the loop when the thread has ended: after `stop`, or because the model failed.
    """

    def __init__(self, batcher: Batcher, max_texts: int, on_end: Callable[[], None] = lambda: None) -> None:
        self.batcher, self.max_texts = batcher, max_texts
        self._on_end = on_end
        self._jobs: dict[int, Job] = {}
        self._commands: SimpleQueue[_Command] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._next = 0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def num_texts(self) -> int:
        """Texts that wait or run."""
        return len(self._jobs)

    @property
    def is_alive(self) -> bool:
        """Whether the model is there."""
        return self._thread.is_alive()

    def submit(self, requests: Sequence[Request]) -> Job:
        """Take requests, whose events come to the job returned.

        Raises:
            ApiError: they are more than there are places left (429), or ever (400); or the worker is gone (503).
        """
        if len(requests) > self.max_texts:
            raise ApiError(
                400, f"A request for {len(requests)} texts is more than this server takes, {self.max_texts}.", "n"
            )
        if not self.is_alive:
            raise ApiError(503, "The model is not running.")
        if self.num_texts + len(requests) > self.max_texts:
            raise ApiError(429, "The server is busy: its queue is full. Try again later.", code="queue_full")
        job = Job(range(self._next, self._next + len(requests)))
        self._next += len(requests)
        for key, request in zip(job.keys, requests, strict=True):
            self._jobs[key] = job
            self._commands.put(_Add(key, request))
        return job

    def cancel(self, job: Job) -> None:
        """End what is left of a job; further times do nothing."""
        for key in () if job.is_cancelled else job.keys:
            if key in self._jobs:
                self._commands.put(_Cancel(key))
        job.is_cancelled = True

    def end(self) -> None:
        """End the thread after its present step; jobs that are left are told so. A signal handler may call it."""
        self._commands.put(None)

    async def stop(self) -> None:
        """`end`, and wait for it."""
        self.end()
        await asyncio.to_thread(self._thread.join)

    def _hand_out(self, events: list[tuple[int, Event]]) -> None:
        for key, event in events:
            job = self._jobs[key] if event.finish is None else self._jobs.pop(key)
            job.put(key, event)

    def _end(self) -> None:
        for job in self._jobs.values():
            job.fail(ApiError(503, "The server is shutting down.", code="server_shutting_down"))
        self._jobs.clear()
        self._on_end()

    # ------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self._work()
        finally:  # an exception is shown by threading, and ends the server
            self._loop.call_soon_threadsafe(self._end)

    def _work(self) -> None:
        keys: dict[int, int] = {}
        numbers: dict[int, int] = {}
        events: list[tuple[int, Event]] = []
        handed_s = time.monotonic()
        while True:
            for command in self._taken():
                if command is None:
                    return
                if isinstance(command, _Add):
                    number = self.batcher.add(command.request)
                    keys[number], numbers[command.key] = command.key, number
                elif command.key in numbers:
                    self.batcher.cancel(numbers[command.key])
            ended: set[int] = set()
            for event in self.batcher.step():
                key = keys[event.request]
                events.append((key, event))
                if event.finish is not None:
                    ended.add(key)
                    del keys[event.request], numbers[key]
            wait_s = min(_WRITE_S * self.batcher.num_running, _HAND_OUT_S)
            if (now_s := time.monotonic()) - handed_s >= wait_s:
                due, events, handed_s = events, [], now_s
            else:
                due = [(key, event) for key, event in events if key in ended]
                events = [(key, event) for key, event in events if key not in ended] if due else events
            if due:
                self._loop.call_soon_threadsafe(self._hand_out, due)

    def _taken(self) -> list[_Command]:
        """The commands that are there; where there is nothing else to do, after the first has come, or a while."""
        taken: list[_Command] = []
        if self._is_idle():
            with suppress(Empty):
                taken.append(self._commands.get(timeout=IDLE_STEP_S))
        while not self._commands.empty():
            taken.append(self._commands.get())
        return taken

    def _is_idle(self) -> bool:
        return not (self.batcher.num_running or self.batcher.num_waiting)
