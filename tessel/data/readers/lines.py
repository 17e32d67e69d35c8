""".jsonl: one object a line; lines that hold nothing are passed over.

.txt: one document a line, as the text builder of Hugging Face's `datasets` reads it, which the
Ascend suites use; \\n, \\r\\n and \\r end a line. Empty lines are dropped; a line of spaces is a
document. To keep paragraphs together, put each document on a line of its own or use .jsonl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import orjson

from tessel.data.readers.block import (
    BYTE_ORDER_MARK,
    TEXT_KEY,
    Block,
    Blocks,
    Damage,
    RowFault,
    format_of,
    report,
)
from tessel.data.readers.stream import Stream, check_length
from tessel.data.rows import BadRow, Row, kind_of

# Integers that orjson gives as floats are at least so long.
_LONG_NUMBER = b"0" * 19
_ANY_DIGIT = bytes.maketrans(b"123456789", b"000000000")
BLANK = object()
_BAD_BYTES = re.compile("[\udc80-\udcff]")


def line_blocks(path: str, stream: Stream, start: bytes, kind: str, block_bytes: int) -> Blocks:
    """Blocks of whole lines; `start` is what was read of the stream before.

    Raises:
        Damage: the file cannot be read on, or a line is too long.
    """
    line = 1
    pieces: list[bytes] = []
    length = 0
    chunk = start
    while True:
        try:
            chunk = chunk or stream.read(block_bytes)
        except OSError as error:
            raise Damage(line, stream.explain(error)) from error
        if not chunk:
            break
        end = chunk.rfind(b"\n") + 1
        if end:
            data = b"".join([*pieces, chunk[:end]])
            yield Block(path, line, data, kind, num_bytes=stream.passed())
            line += num_lines(data, kind)
            chunk = chunk[end:]
            pieces, length = [], 0
        pieces.append(chunk)
        length += len(chunk)
        check_length(length, line)
        chunk = b""
    if length:
        yield Block(path, line, b"".join(pieces), kind, num_bytes=stream.passed())


def num_lines(data: bytes, kind: str) -> int:
    """How many lines end in `data`, by what ends a line in that kind of file."""
    if kind == "jsonl" or b"\r" not in data:
        return data.count(b"\n")
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def parse_jsonl(block: Block, columns: Sequence[str] | None, bad: list[BadRow] | None, lists: bool) -> list[Row]:
    """The rows of a block of lines. See `parse_rows`."""
    data = without_mark(block)
    rows = []
    loads = orjson.loads
    exact = _Exact(data, columns)
    for number, line in enumerate(data.split(b"\n"), block.first_line):
        if not line:
            continue
        try:
            try:
                values = loads(line)
                if type(values) is not dict or not exact(values):
                    values = load_slowly(line, block.path)
            except orjson.JSONDecodeError:
                values = load_slowly(line, block.path)
            if values is BLANK:
                continue
            rows.append(Row(number, as_object(values, columns, lists)))
        except RowFault as fault:
            report(block, number, str(fault), bad)
    return rows


class _Exact:
    """Whether what orjson made of a piece of a block is what json makes: all but integers over 64 bits are."""

    def __init__(self, data: bytes, columns: Sequence[str] | None) -> None:
        self._data = data
        self._columns = columns
        self._has_long: bool | None = None

    def __call__(self, values: dict[str, Any]) -> bool:
        if self._columns is not None:
            for column in self._columns:
                if type(values.get(column)) is not str:
                    break
            else:
                return True
        if self._has_long is None:
            self._has_long = has_long_number(self._data)
        return not self._has_long


def has_long_number(data: bytes) -> bool:
    """Whether JSON text may hold integers over 64 bits, of which orjson makes floats."""
    return _LONG_NUMBER in data.translate(_ANY_DIGIT)  # several times as fast as a regular expression


def load_slowly(data: bytes, path: str) -> Any:
    """JSON by Python's own module, which has the last word; BLANK where there is nothing but spaces.

    Raises:
        RowFault: not UTF-8, or not JSON.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowFault(not_utf8(error.reason, data[error.start], path)) from error
    if not text or text.isspace():
        return BLANK
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise RowFault(f"invalid JSON ({reason}{at}): {_excerpt(text)}. {_expected(path)}") from error


def as_object(values: Any, columns: Sequence[str] | None, lists: bool) -> dict[str, Any]:
    """A row's columns; with `lists`, a list of objects as the value of "".

    Raises:
        RowFault: it is no object.
    """
    if type(values) is dict:
        return values
    if lists and type(values) is list:
        return {"": values}
    key = json.dumps(columns[0] if columns else TEXT_KEY)
    raise RowFault(f"{kind_of(values)}, where an object is expected, as in {{{key}: ...}}.")


def parse_txt(block: Block, bad: list[BadRow] | None) -> list[Row]:
    """The lines of a block as rows of one column."""
    # Universal newlines; no other character ends a line, so not splitlines().
    text = decode(without_mark(block))
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    rows = []
    for number, line in enumerate(text.split("\n"), block.first_line):
        if not line:
            continue
        if reason := why_bad_bytes(line, block.path):
            report(block, number, reason, bad)
        else:
            rows.append(Row(number, {TEXT_KEY: line}))
    return rows


def without_mark(block: Block) -> bytes:
    """Its data, but for the byte order mark that a file may begin with."""
    return block.data.removeprefix(BYTE_ORDER_MARK) if block.first_line == 1 else block.data


def decode(data: bytes) -> str:
    """UTF-8 to text; bytes that are none become lone surrogates, for `why_bad_bytes` to find."""
    return data.decode("utf-8", errors="surrogateescape")


def why_bad_bytes(text: str, path: str) -> str | None:
    """What is wrong with a text of `decode`; None if nothing is."""
    if text.isascii() or not _BAD_BYTES.search(text):
        return None
    data = text.encode("utf-8", errors="surrogateescape")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(error.reason, data[error.start], path)
    return None


def not_utf8(reason: str, byte: int, path: str) -> str:
    """What is said of bytes that are not UTF-8."""
    return (
        f"not UTF-8 ({reason} at byte 0x{byte:02x}). Convert the file, for instance: iconv -f GB18030 -t UTF-8 {path}"
    )


def _expected(path: str) -> str:
    form = format_of(path)
    if form is not None and form.kind == "json":
        return "A .json file holds one array of objects, or one object a line."
    return "Each line must be one JSON object; an array of objects belongs into a .json."


def _excerpt(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")
