""".json: one array of objects, cut between its elements without parsing them; or one object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from tessel.data.readers.block import BYTE_ORDER_MARK, Block, Blocks, Damage, RowFault, report
from tessel.data.readers.lines import BLANK, as_object, has_long_number, line_blocks, load_slowly
from tessel.data.readers.stream import Stream, check_length
from tessel.data.rows import BadRow, Row

_QUOTE, _BACKSLASH, _COMMA = ord('"'), ord("\\"), ord(",")
_SPACES = b" \t\r\n"
# 1 for what may open or close something, and for commas; depth by bracket.
_IS_MARK = bytes(byte in b'"[]{},' for byte in range(256))
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


class Scanner:
    """Finds what separates the elements of an array, chunk by chunk, strings and nesting considered."""

    def __init__(self, depth: int) -> None:
        self._depth = depth  # 1 within the array, 0 before it
        self._in_string = 0
        self._escaped = False

    def feed(self, chunk: bytes) -> tuple[np.ndarray, int | None]:
        """Where in the chunk the commas between elements are, and the end of the array, if it is there."""
        data = np.frombuffer(chunk, np.uint8)
        at = np.flatnonzero(np.frombuffer(chunk.translate(_IS_MARK), bool))
        marks = data[at]
        is_quote = marks == _QUOTE
        escaped = self._find_escaped(chunk, data)
        if escaped is not None:
            is_quote &= ~escaped[at]
        num_quotes = np.cumsum(is_quote) + self._in_string
        if len(at):
            self._in_string = int(num_quotes[-1]) & 1
        outside = (num_quotes & 1 == 0) & (marks != _QUOTE)
        at, marks = at[outside], marks[outside]
        depths = np.cumsum(_STEP[marks], dtype=np.int64) + self._depth
        if len(at):
            self._depth = int(depths[-1])
        ends = np.flatnonzero(depths == 0)
        is_separator = (marks == _COMMA) & (depths == 1)
        if len(ends):
            is_separator[ends[0] :] = False
            return at[is_separator], int(at[ends[0]])
        return at[is_separator], None

    def _find_escaped(self, chunk: bytes, data: np.ndarray) -> np.ndarray | None:
        """Which bytes follow a backslash that is not itself escaped; None if there are none."""
        if not self._escaped and b"\\" not in chunk:
            return None
        escaped = np.zeros(len(data) + 1, bool)
        at = np.flatnonzero(data == _BACKSLASH)
        if len(at):
            begins = np.diff(at, prepend=-2) != 1
            # A run at the very beginning may go on from the chunk before.
            shift = int(self._escaped) if at[0] == 0 else 0
            run_start = np.maximum.accumulate(np.where(begins, at, 0))
            offset = at - run_start + np.where(run_start == 0, shift, 0)
            escaped[at[offset % 2 == 0] + 1] = True
        if self._escaped:
            escaped[0] = True
        self._escaped = bool(escaped[-1])
        return escaped[:-1]


def json_blocks(path: str, stream: Stream, block_bytes: int) -> Blocks:
    """Blocks of a .json file: elements of its array, or lines if it begins with none.

    Raises:
        Damage: the file cannot be read on, an element is too long, or the array does not end.
    """
    try:
        start = stream.read(max(block_bytes, 64))
        while start and not start.removeprefix(BYTE_ORDER_MARK).strip(_SPACES):
            more = stream.read(block_bytes)
            if not more:
                break
            check_length(len(start), 1)
            start += more
    except OSError as error:
        raise Damage(1, stream.explain(error)) from error
    content = start.removeprefix(BYTE_ORDER_MARK).lstrip(_SPACES)
    if content.startswith(b"["):
        return _array_blocks(path, stream, content[1:], block_bytes)
    return line_blocks(path, stream, start, "jsonl", block_bytes)


def _array_blocks(path: str, stream: Stream, start: bytes, block_bytes: int) -> Blocks:
    scanner = Scanner(depth=1)
    row = 1
    pieces: list[bytes] = []
    length = 0
    chunk = start
    while True:
        try:
            chunk = chunk or stream.read(block_bytes)
        except OSError as error:
            raise Damage(row, stream.explain(error)) from error
        if not chunk:
            raise Damage(row, "the file ends within its array: it is cut off, or a bracket or a quote is not closed.")
        separators, end = scanner.feed(chunk)
        if end is not None:
            data = b"".join([*pieces, chunk[:end]])
            if row > 1 or len(separators) or data.strip(_SPACES):
                yield Block(path, row, data, "array", num_bytes=stream.passed())
                row += len(separators) + 1
            break
        if len(separators):
            cut = int(separators[-1])
            yield Block(path, row, b"".join([*pieces, chunk[:cut]]), "array", num_bytes=stream.passed())
            row += len(separators)
            chunk = chunk[cut + 1 :]
            pieces, length = [], 0
        pieces.append(chunk)
        length += len(chunk)
        check_length(length, row)
        chunk = b""
    _check_rest(stream, chunk[end + 1 :], row, block_bytes)


def _check_rest(stream: Stream, rest: bytes, row: int, block_bytes: int) -> None:
    try:
        while not rest.strip(_SPACES):
            rest = stream.read(block_bytes)
            if not rest:
                return
    except OSError as error:
        raise Damage(row, stream.explain(error)) from error
    raise Damage(
        row,
        "something follows the end of the array: a bracket too many, or several arrays. "
        "Mend it, or rename the file to .jsonl if each line holds a list.",
    )


def parse_array(block: Block, columns: Sequence[str] | None, bad: list[BadRow] | None, lists: bool) -> list[Row]:
    """The elements of a block as rows."""
    rows = []
    values: list[Any] | None = None
    try:
        if not has_long_number(block.data):
            values = orjson.loads(b"[" + block.data + b"]")
        else:
            values = json.loads(b"[" + block.data + b"]")
    except (ValueError, RecursionError):
        values = None  # to be found below
    for number, element in enumerate(values if values is not None else _elements(block.data), block.first_line):
        try:
            if values is None:
                element = load_slowly(element, block.path)
                if element is BLANK:
                    raise RowFault("invalid JSON: nothing stands between two commas. Mend the file.")
            rows.append(Row(number, as_object(element, columns, lists)))
        except RowFault as fault:
            report(block, number, str(fault), bad)
    return rows


def _elements(data: bytes) -> list[bytes]:
    """The texts between the commas of the array."""
    separators, _ = Scanner(depth=1).feed(data)
    bounds = [-1, *separators.tolist(), len(data)]
    return [data[begin + 1 : end] for begin, end in zip(bounds, bounds[1:], strict=False)]
