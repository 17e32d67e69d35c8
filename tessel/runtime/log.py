"""What the user sees: plain lines on stdout, warnings and progress on stderr."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_PROGRESS_INTERVAL_S = 10.0


def log(message: str) -> None:
    """Print one plain line on stdout at once, so that a log file can be followed.

    A reader that has left (`| head`, a `tee` that was killed) does not end the work: a run may be days old.
    """
    try:
        print(message, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("tessel: nobody reads stdout any more; going on without it", file=sys.stderr)


@functools.cache
def warn_once(message: str) -> None:
    """Print a warning on stderr, the same text only once in a process."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@functools.cache
def console() -> Console:
    """The terminal that progress displays and tables are drawn on: stderr, so that stdout stays plain."""
    from rich.console import Console

    return Console(stderr=True)


class Progress(Protocol):
    """What `progress` yields."""

    def advance(self, num_steps: float = 1) -> None:
        """Say that `num_steps` more of the total are done."""


class _RichProgress:
    def __init__(self, display: object, task: object) -> None:
        self._display = display
        self._task = task

    def advance(self, num_steps: float = 1) -> None:
        self._display.advance(self._task, num_steps)  # type: ignore[attr-defined]


class _PlainProgress:
    """A line at most every PLAIN_PROGRESS_INTERVAL_S, so short work prints nothing."""

    def __init__(self, description: str, total: float | None) -> None:
        self._description = description
        self._total = total
        self._done = 0.0
        self._last_line_s = time.monotonic()

    def advance(self, num_steps: float = 1) -> None:
        self._done += num_steps
        now_s = time.monotonic()
        if now_s - self._last_line_s < PLAIN_PROGRESS_INTERVAL_S:
            return
        self._last_line_s = now_s
        of_total = f"/{self._total:,.0f}" if self._total is not None else ""
        print(f"{self._description}: {self._done:,.0f}{of_total}", file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Progress]:
    """Show how far a piece of work is: a bar on a terminal, a sparse line otherwise.

    `total` is in the unit that `advance` counts; None where it is not known. Lines that `log`
    prints meanwhile appear above the bar.
    """
    if not console().is_terminal:
        yield _PlainProgress(description, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Redirecting would send lines meant for a file to the terminal.
    with Display(
        *columns, TimeRemainingColumn(), console=console(), transient=True, redirect_stdout=sys.stdout.isatty()
    ) as display:
        yield _RichProgress(display, display.add_task(description, total=total))
