"""A batcher on several processes that hold one model together: rank 0 is asked, and all of them take its steps.

Before each step rank 0 tells the others what it was asked for since the last one, and within it which tokens it chose;
everything else follows from these alone, so that the caches of all stay alike. Each message is two broadcasts of CPU
tensors at most: its length, i64 [1], and its JSON, u8 [length], which is left out where there is nothing to say.

While nobody asks, rank 0 takes empty steps now and then: the others wait with a time limit.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from tessel.generate.batcher import Batcher
from tessel.generate.load import Opened
from tessel.generate.request import Event, Request
from tessel.generate.sampling import Sampling
from tessel.runtime import failure, watchdog

IDLE_STEP_S = 1.0
"""From one empty step to the next, while nobody asks."""
_END = -1
_Order = dict[str, Any] | int
"""A request to add, or the number of one to cancel."""


@contextmanager
def in_step(opened: Opened, **options: Any) -> Iterator[Batcher | None]:
    """A batcher of the model, with its `options`; None on processes that follow rank 0, when it has no more for them.

    Rank 0 lets the others go when the body has ended; after an error it ends like any process of many.
    """
    options = {"device": opened.device, **options}
    group = opened.processes.control
    if group is None:
        yield Batcher(opened.model, opened.tokenizer, **options)
        return
    link = _Link(group)
    if opened.processes.world.rank == 0:
        leader = _Leader(link, opened, **options)
        yield leader
        link.tell(None)
    else:
        _follow(Batcher(opened.model, opened.tokenizer, agree=link.agree, **options), link)
        yield None


@contextmanager
def waiting(batcher: Batcher) -> Iterator[None]:
    """Around waiting for a user, with nothing in the batcher: other processes, if there are some, wait along."""
    if not isinstance(batcher, _Leader):
        yield
        return
    is_over = threading.Event()

    def keep_stepping() -> None:
        try:
            while not is_over.wait(IDLE_STEP_S):
                batcher.step()
        except RuntimeError as error:  # another process is gone, and a user who says nothing would never hear of it
            failure.end(error)

    thread = threading.Thread(target=keep_stepping, name="idle", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@dataclass(frozen=True)
class _Link:
    """Messages of rank 0 to all ranks of `group`."""

    group: ProcessGroup

    def tell(self, orders: list[_Order] | None) -> None:
        """What the others are to do before the next step; None: to leave."""
        watchdog.goes_on()
        message = json.dumps(orders).encode() if orders else b""
        distributed.broadcast(torch.tensor([_END if orders is None else len(message)]), 0, self.group)
        if message:
            distributed.broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8), 0, self.group)

    def hear(self) -> list[_Order] | None:
        """What rank 0 has told."""
        length = torch.zeros(1, dtype=torch.int64)
        distributed.broadcast(length, 0, self.group)
        watchdog.goes_on()
        if int(length) <= 0:
            return None if int(length) == _END else []
        message = torch.empty(int(length), dtype=torch.uint8)
        distributed.broadcast(message, 0, self.group)
        orders: list[_Order] = json.loads(message.numpy().tobytes())
        return orders

    def agree(self, tokens: list[int]) -> list[int]:
        """Rank 0's tokens. On a GPU, sums that a draw rests on may differ from one process to another."""
        chosen = torch.tensor(tokens)
        distributed.broadcast(chosen, 0, self.group)
        found: list[int] = chosen.tolist()
        return found


class _Leader(Batcher):
    """Rank 0's: what it is asked for goes to the others before its next step."""

    def __init__(self, link: _Link, opened: Opened, **options: Any) -> None:
        super().__init__(opened.model, opened.tokenizer, agree=link.agree, **options)
        self._link = link
        self._orders: list[_Order] = []

    def add(self, request: Request) -> int:
        """See `Batcher`."""
        number = super().add(request)
        self._orders.append({**asdict(request), "stop_ids": sorted(request.stop_ids)})
        return number

    def cancel(self, number: int) -> None:
        """See `Batcher`."""
        super().cancel(number)
        self._orders.append(number)

    def step(self) -> list[Event]:
        """See `Batcher`."""
        self._link.tell(self._orders)
        self._orders = []
        return super().step()


def _follow(batcher: Batcher, link: _Link) -> None:
    """Take rank 0's steps until it has no more. Signals go to all processes, and rank 0 says what they mean."""
    stopping = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in stopping}
    try:
        while (orders := link.hear()) is not None:
            for order in orders:
                if isinstance(order, int):
                    batcher.cancel(order)
                else:
                    batcher.add(_request_of(order))
            batcher.step()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _request_of(order: dict[str, Any]) -> Request:
    return Request(
        **{
            **order,
            "prompt_ids": tuple(order["prompt_ids"]),
            "sampling": Sampling(**order["sampling"]),
            "stop_ids": frozenset(order["stop_ids"]),
            "stop_strings": tuple(order["stop_strings"]),
        }
    )
