"""Files to blocks, and blocks to rows, of every format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tessel.data.readers.array import json_blocks, parse_array
from tessel.data.readers.block import BLOCK_BYTES, Block, Blocks, Damage, format_of
from tessel.data.readers.csv_rows import csv_blocks, parse_csv
from tessel.data.readers.lines import line_blocks, parse_jsonl, parse_txt
from tessel.data.readers.stream import Stream
from tessel.data.readers.tables import arrow_blocks, parquet_blocks, parse_table
from tessel.data.rows import BadRow, Row, Text, why_no_text
from tessel.errors import TesselError


class Document(NamedTuple):
    """One row of a file: its number (from 1), and the value of each key that was asked for."""

    line: int
    texts: tuple[Text, ...]


def read_blocks(
    path: str | Path,
    block_bytes: int = BLOCK_BYTES,
    columns: Sequence[str] | None = None,
    *,
    bad: list[BadRow] | None = None,
    null_words: bool = False,
) -> Blocks:
    """Cut a file into blocks of whole rows, of about `block_bytes`; a longer row is a block of its own.

    Cheap, so that one process can feed many who parse: nothing is parsed but the pages of .parquet. Holds a few
    blocks at a time. Of .parquet and .arrow only `columns` are read (None: all), those of them that are there.
    With `bad`, a file that is damaged somewhere ends there, and what is lost is noted as one row. With
    `null_words`, cells of a .csv such as "" and NA are null, as where `datasets` reads them.

    Raises:
        TesselError: the file cannot be read to its end, and there is no `bad`; names file and line or row.
    """
    name = str(path)
    try:
        yield from _blocks(name, block_bytes, columns, null_words)
    except Damage as damage:
        if bad is None:
            form = format_of(name)
            unit = "row" if form is not None and form.kind in ("json", "parquet", "arrow") else "line"
            raise TesselError(f"{name}, {unit} {damage.number}: {damage.reason}") from damage
        bad.append(BadRow(damage.number, f"the file from here on is lost: {damage.reason}"))
    except OSError as error:
        raise TesselError(f"{name} cannot be read: {error.strerror or error}.") from error


def _blocks(path: str, block_bytes: int, columns: Sequence[str] | None, null_words: bool) -> Blocks:
    form = format_of(path)
    assert form is not None, "check_inputs has seen to it"
    if form.kind == "parquet":
        yield from parquet_blocks(path, columns, block_bytes)
    elif form.kind == "arrow":
        yield from arrow_blocks(path, columns, block_bytes)
    else:
        with Stream(path, form) as stream:
            if form.kind == "json":
                yield from json_blocks(path, stream, block_bytes)
            elif form.kind == "csv":
                yield from csv_blocks(path, stream, block_bytes, null_words)
            else:
                yield from line_blocks(path, stream, b"", form.kind, block_bytes)


def parse_rows(
    block: Block, columns: Sequence[str] | None = None, bad: list[BadRow] | None = None, *, lists: bool = False
) -> list[Row]:
    """The rows of a block, in order; those that hold nothing are passed over.

    A row has at least those of `columns` that the file gives it: that one is missing, or null, is for
    the reader of the row to say (`why_no_text`). Rows that cannot be read are noted in `bad`, if it is
    given. With `lists`, a JSON row that is a list, not an object, is given as the value of "".

    Raises:
        TesselError: a row cannot be read, and there is no `bad`; names file and line or row.
    """
    form = format_of(block.path)
    kind = block.kind or (form.kind if form is not None else "jsonl")
    if kind == "txt":
        return parse_txt(block, bad)
    if kind == "array":
        return parse_array(block, columns, bad, lists)
    if kind == "csv":
        return parse_csv(block, bad)
    if kind == "table":
        return parse_table(block, bad)
    return parse_jsonl(block, columns, bad, lists)


def parse_block(block: Block, keys: Sequence[str]) -> list[Document]:
    """The documents of a block, in order: a text or a list of texts for each of `keys`.

    Raises:
        TesselError: a row cannot be read, a key is missing, or its value is no text; names file and line or row.
    """
    documents = []
    for number, values in parse_rows(block, keys):
        for key in keys:
            if reason := why_no_text(values, key):
                raise TesselError(f"{block.where(number)}: {reason}")
        documents.append(Document(number, tuple(values[key] for key in keys)))
    return documents
