"""How far a run is: a live display on a terminal, nothing besides the log lines otherwise."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from tessel.runtime.log import console, voice


def stdout_is_terminal() -> bool:
    """Whether log lines go to a terminal."""
    return sys.stdout.isatty()


class RunProgress:
    """A bar with iteration, loss and tokens/s under the log lines, used as a context manager.

    Drawn on stderr, and only where stdout is a terminal as well: under `| tee` the log's lines, which go
    past this process, would run into it.
    """

    def __init__(self, train_iters: int, start_iteration: int = 0) -> None:
        self._train_iters = train_iters
        self._start_iteration = start_iteration
        self._display: Any = None
        self._task: Any = None

    def __enter__(self) -> RunProgress:
        if not (voice.is_heard and console().is_terminal and stdout_is_terminal()):
            return self
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._display = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console(),
            transient=True,
        )
        self._display.start()
        self._task = self._display.add_task(
            "training", total=self._train_iters, completed=self._start_iteration, figures=""
        )
        return self

    def update(self, iteration: int, loss: float | None = None, tokens_per_s: float | None = None) -> None:
        """Show that `iteration` is done; a figure that is None is left out."""
        if self._display is None:
            return
        figures = [] if loss is None else [f"loss {loss:.4f}"]
        if tokens_per_s is not None:
            figures.append(f"{tokens_per_s:,.0f} tokens/s")
        self._display.update(self._task, completed=iteration, figures=" · ".join(figures))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.stop()
