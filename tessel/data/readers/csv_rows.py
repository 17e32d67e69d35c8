""".csv: records of text cells under a header; commas, double quotes, newlines within quotes.

Every cell is text, as it stands: no numbers, no dates, and an empty cell is an empty text. With
`null_words`, cells that pandas takes for missing values are null, since `datasets` reads by pandas.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from typing import Any

from tessel.data.readers.block import BYTE_ORDER_MARK, MAX_ROW_BYTES, Block, Blocks, Damage, report
from tessel.data.readers.lines import decode, num_lines, why_bad_bytes
from tessel.data.readers.stream import Stream, check_length
from tessel.data.rows import BadRow, Row

# A quoted cell, but for its closing quote. Nothing is tried again, so long cells cost no memory.
_QUOTED = re.compile(rb'"[^"]*+(?:""[^"]*+)*+')
_LINE_END = re.compile(rb"\r\n|\n|\r")
# pandas' read_csv, argument na_values of its documentation.
NULL_WORDS = frozenset(
    [*("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>")]
    + [*("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")]
)


def csv_header(path: str, stream: Stream, block_bytes: int) -> tuple[tuple[str, ...], bytes, int]:
    """The column names, what was read after them, and the number of the line that follows.

    Raises:
        Damage: there is no header, a name occurs twice, it is not UTF-8, or the file cannot be read.
    """
    data = b""
    end = 0
    while not end:
        try:
            chunk = stream.read(block_bytes)
        except OSError as error:
            raise Damage(1, stream.explain(error)) from error
        data = (data + chunk).removeprefix(BYTE_ORDER_MARK)
        check_length(len(data), 1)
        end = _first_record(data)
        if not chunk:
            end = end or len(data)
            break
    if not data.strip():
        raise Damage(1, "there is no header with the names of the columns.")
    record, rest = data[:end], data[end:]
    text = decode(record)
    if reason := why_bad_bytes(text, path):
        raise Damage(1, reason)
    names = tuple(next(filter(None, _reader(text)), []))
    doubled = [name for i, name in enumerate(names) if name in names[:i]]
    if doubled:
        raise Damage(1, f"the header names the column {doubled[0]!r} twice. Rename one of them.")
    return names, rest, 1 + num_lines(record, "csv")


def csv_blocks(path: str, stream: Stream, block_bytes: int, null_words: bool) -> Blocks:
    """Blocks of whole records.

    Raises:
        Damage: see `csv_header`; a record is too long, or its quotes are not closed.
    """
    names, data, line = csv_header(path, stream, block_bytes)
    wanted = block_bytes
    while True:
        try:
            chunk = stream.read(max(wanted - len(data), block_bytes))
        except OSError as error:
            raise Damage(line, stream.explain(error)) from error
        data += chunk
        end, is_open = _last_record(data)
        if not chunk:
            if is_open:
                line += num_lines(data[:end], "csv")
                raise Damage(line, "a quote opens here or in this record and is never closed.")
            end = len(data)
        if end:
            yield Block(path, line, data[:end], "csv", names, null_words, stream.passed())
            line += num_lines(data[:end], "csv")
            data = data[end:]
            wanted = block_bytes
        else:
            check_length(len(data), line)
            wanted = 2 * len(data)  # so that what is looked at again does not grow quadratically
        if not chunk:
            return


def _quoted(data: bytes) -> tuple[list[tuple[int, int]], bool]:
    """Where quoted cells begin and end, and whether the last goes on after the data."""
    spans = []
    at = data.find(b'"')
    while at >= 0:
        after = at + 1
        # Elsewhere than at the beginning of a cell, a quote is a character as any other.
        if at == 0 or data[at - 1] in b",\n\r":
            match = _QUOTED.match(data, at)
            assert match is not None, "it begins with a quote"
            after = match.end() + 1
            spans.append((at, after))
        at = data.find(b'"', after)
    return spans, bool(spans) and spans[-1][1] > len(data)


def _first_record(data: bytes) -> int:
    """Where the first record that is not empty ends, after its newline; 0 if that is not seen."""
    begin = len(data) - len(data.lstrip(b"\r\n"))
    for until, after in [*_quoted(data)[0], (len(data), 0)]:
        if ending := _LINE_END.search(data, begin, until):
            # A newline may follow a carriage return at the end.
            return ending.end() if ending[0] != b"\r" or ending.end() < len(data) else 0
        begin = after
    return 0


def _last_record(data: bytes) -> tuple[int, bool]:
    """Where the last record that ends in the data ends, 0 if none does; and whether a quote is open at the end."""
    spans, is_open = _quoted(data)
    until = len(data)
    for begin, after in [*reversed(spans), (0, 0)]:
        if end := _last_line_end(data, after, until):
            return end, is_open
        until = begin
    return 0, is_open


def _last_line_end(data: bytes, begin: int, end: int) -> int:
    newline = data.rfind(b"\n", begin, end) + 1
    if newline:
        return newline
    # Files of carriage returns alone; one at the end may be followed by a newline.
    return data.rfind(b"\r", begin, min(end, len(data) - 1)) + 1


def _reader(text: str) -> Any:
    # A setting of the whole module, which no other part of this program has a use for.
    csv.field_size_limit(min(2 * MAX_ROW_BYTES, sys.maxsize))
    return csv.reader(io.StringIO(text, newline=""))


def parse_csv(block: Block, bad: list[BadRow] | None) -> list[Row]:
    """The records of a block as rows of texts."""
    rows = []
    text = decode(block.data)
    is_clean = text.isascii() or why_bad_bytes(text, block.path) is None
    names = block.names
    reader = _reader(text)
    line = block.first_line
    for cells in reader:
        number, line = line, block.first_line + reader.line_num
        if not cells:
            continue
        reason = None if is_clean else why_bad_bytes("\n".join(cells), block.path)
        if len(cells) != len(names):
            fields = f"{len(cells)} field{'s' if len(cells) > 1 else ''}"
            reason = reason or f"{fields}, where the header names {len(names)}. Mend it, or quote what holds commas."
        if reason is not None:
            report(block, number, reason, bad)
            continue
        values = [None if cell in NULL_WORDS else cell for cell in cells] if block.null_words else cells
        rows.append(Row(number, dict(zip(names, values, strict=True))))
    return rows
