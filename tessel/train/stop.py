"""Reasons to stop a run early, in good order."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType


@dataclass
class StopRequest:
    """Whether the run should stop after the step in progress, and why.

    `largest` is the largest of a number over all processes: a signal may reach one of them alone, and clocks
    differ, but all must stop after the same step. All ask at the same points.
    """

    exit_duration_in_mins: float | None = None
    exit_interval: int | None = None
    started_s: float = field(default_factory=time.monotonic)
    largest: Callable[[int], int] = int
    signal_number: int = 0

    @property
    def signal_name(self) -> str | None:
        """The signal that has come, as far as this process knows."""
        return signal.Signals(self.signal_number).name if self.signal_number else None

    def signalled(self) -> bool:
        """Whether a signal has come to any process: what can be left out now should be."""
        agreed = self.largest(self.signal_number)
        # One that has come meanwhile counts the next time: the others do not know of it yet.
        if agreed:
            self.signal_number = agreed
        return bool(agreed)

    def reason(self, iteration: int, is_last: bool = False) -> str | None:
        """Why to stop after `iteration`; None to go on. --exit-interval does not cut off the end of a run."""
        if self.signalled():
            return f"received {self.signal_name}"
        if self.exit_duration_in_mins is not None:
            minutes = (time.monotonic() - self.started_s) / 60
            if self.largest(int(minutes > self.exit_duration_in_mins)):
                return f"--exit-duration-in-mins {self.exit_duration_in_mins:g} is over"
        if self.exit_interval is not None and not is_last and iteration % self.exit_interval == 0:
            return f"--exit-interval {self.exit_interval}"
        return None


@contextmanager
def signals_stop(request: StopRequest) -> Iterator[None]:
    """While inside, SIGTERM and the first SIGINT only mark `request`; a second SIGINT interrupts at once."""

    def mark(number: int, frame: FrameType | None) -> None:
        del frame
        if request.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = number

    before = {number: signal.signal(number, mark) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
