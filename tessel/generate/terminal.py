"""Where a dialogue is typed and read: a terminal with a history of lines, or a pipe."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_KEPT_LINES = 1000
_DIM, _PLAIN, _START_OF_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"


class Terminal:
    """Lines in, text out. In a pipe nothing but answers goes to stdout; remarks go to stderr.

    `history`: the file of lines typed before, read and written where a person types; None for none.
    """

    def __init__(self, history: Path | None = None) -> None:
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._history = history
        for stream in (sys.stdin, sys.stdout):
            with suppress(AttributeError, OSError):
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        if self.is_interactive:
            self._open_history()

    def read(self) -> str | None:
        """What the user says: a line, joined with the next one where it ends with a backslash; None at the end.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        lines: list[str] = []
        while True:
            line = self._line("... " if lines else ">>> ")
            if line is None:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _line(self, prompt: str) -> str | None:
        if self.is_interactive:
            try:
                return input(prompt)
            except EOFError:
                self.write("\n")
                return None
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def write(self, text: str) -> None:
        """A piece of an answer."""
        print(text, end="", flush=True)

    def say(self, line: str, file: TextIO | None = None) -> None:
        """A remark."""
        print(f"{_DIM}{line}{_PLAIN}" if self.is_interactive else line, file=file or sys.stderr, flush=True)

    def wait(self, line: str) -> None:
        """A remark that the next one replaces, where a person looks on; "" takes it away."""
        if self.is_interactive:
            shown = f"{_DIM}{line}{_PLAIN}" if line else ""
            print(_START_OF_LINE + shown, end="", file=sys.stderr, flush=True)

    def _open_history(self) -> None:
        try:
            import readline
        except ImportError:  # Python without it: lines can be typed, not edited
            return
        if self._history is not None:
            with suppress(OSError):
                readline.read_history_file(self._history)
        readline.set_history_length(_KEPT_LINES)

    def close(self) -> None:
        """Keep the lines that were typed. A folder that cannot be written to is no reason to fail."""
        if not self.is_interactive or self._history is None:
            return
        with suppress(ImportError, OSError):
            import readline

            self._history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(self._history)
            self._history.chmod(0o600)


def history_file(asked: str | None) -> Path | None:
    """The file of --history-file; by default in the user's folder for such state (XDG), and none for ''."""
    if asked is not None:
        return Path(asked) if asked else None
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "tessel" / "chat_history"


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C ends nothing: the yielded function says whether it was pressed."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
