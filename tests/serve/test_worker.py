"""Events on their way from the model's thread to those who wait for them."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
import urllib.request
from pathlib import Path
from typing import cast

import pytest

from tessel.generate.batcher import Batcher
from tessel.generate.request import Event, Request
from tessel.serve import worker
from tessel.serve.worker import Job, Worker
from tests.serve.conftest import serving


class Counting:
    """A batcher of two texts of as many tokens as are asked for; the longer one goes on when `goes_on` is set."""

    num_waiting = 0

    def __init__(self) -> None:
        self._left: list[int] = []
        self.goes_on = threading.Event()

    @property
    def num_running(self) -> int:
        return sum(left > 0 for left in self._left)

    def add(self, request: Request) -> int:
        self._left.append(request.max_new_tokens)
        return len(self._left) - 1

    def step(self) -> list[Event]:
        running = [number for number, left in enumerate(self._left) if left > 0 and len(self._left) == 2]
        if len(running) == 1:
            assert self.goes_on.wait(10)
        for number in running:
            self._left[number] -= 1
        return [Event(number, 7, "a", finish=None if self._left[number] else "length") for number in running]


async def batches_of(job: Job) -> list[int]:
    return [len(events) async for events in job]


def test_a_text_that_ends_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_WRITE_S", "_HAND_OUT_S"):
        monkeypatch.setattr(worker, name, 1e9)

    async def serve() -> list[list[int]]:
        batcher = Counting()
        ours = Worker(cast(Batcher, batcher), max_texts=2)
        jobs = [ours.submit([Request((1,), max_new_tokens=number)]) for number in (3, 200)]
        longer = asyncio.create_task(batches_of(jobs[1]))
        shorter = await batches_of(jobs[0])
        await asyncio.sleep(0)  # the longer text takes what has come for it
        batcher.goes_on.set()
        found = [shorter, await longer]
        await ours.stop()
        return found

    assert asyncio.run(serve()) == [[3], [200]], "each whole, at its end"


@pytest.mark.parametrize(("timeout_s", "num_signals"), [("0.2", 1), ("60", 2)])
def test_a_request_that_outlasts_the_server_is_told_so(
    timeout_s: str, num_signals: int, served_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of --shutdown-timeout-s, or at a second signal."""
    step = Batcher.step

    def slow_step(self: Batcher) -> list[Event]:
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(Batcher, "step", slow_step)
    body = {"model": "tiny", "prompt": "the dog", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with serving(served_folder, "--shutdown-timeout-s", timeout_s) as server:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.readline().startswith(b"data: ")
            for _ in range(num_signals):
                server.handle_exit(signal.SIGTERM, None)
            events = response.read().strip().split(b"\n\n")
    assert events[-1] == b"data: [DONE]"
    assert json.loads(events[-2].removeprefix(b"data: "))["error"]["code"] == "server_shutting_down"
    assert not server.has_failed
