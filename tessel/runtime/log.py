"""What the user sees: plain lines on stdout, warnings and progress on stderr.

Of many processes, rank 0 alone is heard. What each would have said can be kept in a file of its own.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_PROGRESS_INTERVAL_S = 10.0


class Voice:
    """Whether this process is heard, and the file that keeps what it says. There is one, `voice`."""

    def __init__(self) -> None:
        self.is_heard = True
        self.file: TextIO | None = None

    def speak_as(self, rank: int, folder: str | Path | None = None) -> None:
        """From now on rank 0 alone is heard, and with `folder` every rank writes `rank_00003.log` in it.

        Python's warnings of ranks that are not heard go to the file too: each process would repeat them.
        """
        self.is_heard = rank == 0
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            # Line by line, so that it can be followed; added to, since a restart goes on.
            self.file = open(Path(folder) / f"rank_{rank:05d}.log", "a", buffering=1)  # noqa: SIM115
            self.keep(
                f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}, pid {os.getpid()}, {socket.gethostname()}"
            )
        if not self.is_heard:
            warnings.showwarning = _showwarning_unheard

    def keep(self, text: str) -> None:
        """Write `text` to this process's own file, if it has one."""
        if self.file is not None:
            self.file.write(text.rstrip("\n") + "\n")


voice = Voice()


def _showwarning_unheard(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    voice.keep(warnings.formatwarning(message, category, filename, lineno, line))


@contextmanager
def muted() -> Iterator[None]:
    """This process says nothing meanwhile, neither lines nor warnings nor progress."""
    was_heard, voice.is_heard = voice.is_heard, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        voice.is_heard = was_heard


def log(message: str) -> None:
    """Print one plain line on stdout at once, so that a log file can be followed.

    A reader that has left (`| head`, a `tee` that was killed) does not end the work: a run may be days old.
    """
    voice.keep(message)
    if not voice.is_heard:
        return
    try:
        print(message, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("tessel: nobody reads stdout any more; going on without it", file=sys.stderr)


@functools.cache
def warn_once(message: str) -> None:
    """Print a warning on stderr, the same text only once in a process."""
    voice.keep(f"warning: {message}")
    if not voice.is_heard:
        return
    print(f"warning: {message}", file=sys.stderr, flush=True)


@functools.cache
def console() -> Console:
    """The terminal that progress displays and tables are drawn on: stderr, so that stdout stays plain."""
    from rich.console import Console

    return Console(stderr=True)


class Progress(Protocol):
    """What `progress` yields."""

    def advance(self, num_steps: float = 1, note: str = "") -> None:
        """Say that `num_steps` more of the total are done; `note` stands behind the bar or the line."""


class _SilentProgress:
    def advance(self, num_steps: float = 1, note: str = "") -> None:
        pass


class _RichProgress:
    def __init__(self, display: object, task: object) -> None:
        self._display = display
        self._task = task

    def advance(self, num_steps: float = 1, note: str = "") -> None:
        self._display.update(self._task, advance=num_steps, note=note)  # type: ignore[attr-defined]


class _PlainProgress:
    """A line at most every PLAIN_PROGRESS_INTERVAL_S, so short work prints nothing."""

    def __init__(self, description: str, total: float | None) -> None:
        self._description = description
        self._total = total
        self._done = 0.0
        self._last_line_s = time.monotonic()

    def advance(self, num_steps: float = 1, note: str = "") -> None:
        self._done += num_steps
        now_s = time.monotonic()
        if now_s - self._last_line_s < PLAIN_PROGRESS_INTERVAL_S:
            return
        self._last_line_s = now_s
        of_total = f"/{self._total:,.0f}" if self._total is not None else ""
        behind = f"; {note}" if note else ""
        print(f"{self._description}: {self._done:,.0f}{of_total}{behind}", file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Progress]:
    """Show how far a piece of work is: a bar on a terminal, a sparse line otherwise.

    `total` is in the unit that `advance` counts; None where it is not known. Lines that `log`
    prints meanwhile appear above the bar.
    """
    if not voice.is_heard:
        yield _SilentProgress()
        return
    if not console().is_terminal:
        yield _PlainProgress(description, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Redirecting would send lines meant for a file to the terminal.
    with Display(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console(),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    ) as display:
        yield _RichProgress(display, display.add_task(description, total=total, note=""))
