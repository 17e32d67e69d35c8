"""Blocks of plain lines as places in their file, so that the bytes are read by whoever parses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from tessel.data.readers.block import MAX_ROW_BYTES, Block, Damage, format_of
from tessel.data.readers.lines import num_lines
from tessel.data.readers.stream import check_length
from tessel.data.rows import BadRow
from tessel.errors import TesselError

_LOOK_BYTES = 1 << 13
_COUNT_BYTES = 1 << 22


class Span(NamedTuple):
    """Whole lines of a file that is not compressed: bytes `start` to `stop`. Nobody has counted its first line."""

    path: str
    start: int
    stop: int
    kind: str

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.stop - self.start

    @property
    def first_line(self) -> int:
        """A number that stands for that of its first line: 1 at the beginning of the file, and nowhere else."""
        return 1 if self.start == 0 else 2

    def where(self, number: int) -> str:
        """A row's file and number, as errors begin."""
        return f"{self.path}, line {number}"

    def load(self, first_line: int | None = None) -> Block:
        """Its bytes; `first_line` as it is counted, if that is known.

        Raises:
            TesselError: the file cannot be read, or is shorter by now.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = b"".join(_pieces(file, self.num_bytes))
        except OSError as error:
            raise TesselError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        if len(data) != self.num_bytes:
            raise TesselError(f"{self.path} has become shorter while it was read. Run again when it is whole.")
        return Block(self.path, self.first_line if first_line is None else first_line, data, self.kind)


class LineCounter:
    """Numbers of lines by their place, for files that are gone through from front to back."""

    def __init__(self) -> None:
        self._path = ""
        self._at = 0
        self._line = 1

    def first_line(self, span: Span) -> int:
        """The number (from 1) of the first line of a span; reads the file from the last one asked for."""
        if span.path != self._path or span.start < self._at:
            self._path, self._at, self._line = span.path, 0, 1
        with open(span.path, "rb") as file:
            file.seek(self._at)
            for data in _pieces(file, span.start - self._at):
                self._line += num_lines(data, span.kind)
        self._at = span.start
        return self._line


def has_spans(path: str | Path) -> bool:
    """Whether a file is one of plain lines."""
    form = format_of(path)
    return form is not None and form.kind in ("jsonl", "txt") and form.compression is None


def read_spans(path: str | Path, block_bytes: int, bad: list[BadRow] | None = None) -> Iterator[Span]:
    """Cut a file as `read_blocks` does, into spans of about `block_bytes`, at ends of lines; reads next to nothing.

    Raises:
        TesselError: the file cannot be read, or a line is too long and there is no `bad`.
    """
    name = str(path)
    form = format_of(name)
    assert form is not None
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            start = 0
            while start < size:
                stop = min(start + block_bytes, size)
                if stop < size:
                    stop = _end_of_line(file, stop - 1, start, size)
                span = Span(name, start, stop, form.kind)
                if span.num_bytes > MAX_ROW_BYTES:
                    check_length(span.num_bytes, LineCounter().first_line(span))
                yield span
                start = stop
    except Damage as damage:
        if bad is None:
            raise TesselError(f"{name}, line {damage.number}: {damage.reason}") from damage
        bad.append(BadRow(damage.number, f"the file from here on is lost: {damage.reason}"))
    except OSError as error:
        raise TesselError(f"{name} cannot be read: {error.strerror or error}.") from error


def _end_of_line(file: IO[bytes], at: int, start: int, size: int) -> int:
    """The place behind the first line end from `at` on; `size` if there is none, or a line is much too long."""
    file.seek(at)
    while at - start <= MAX_ROW_BYTES:
        data = file.read(_LOOK_BYTES)
        if not data:
            return size
        found = data.find(b"\n")
        if found >= 0:
            return at + found + 1
        at += len(data)
    return size


def _pieces(file: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    """The next bytes of a file, as many as there are."""
    while num_bytes > 0:
        data: bytes = file.read(min(num_bytes, _COUNT_BYTES))
        if not data:
            return
        yield data
        num_bytes -= len(data)
