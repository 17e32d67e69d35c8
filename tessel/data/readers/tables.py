""".parquet and .arrow (files and streams, as Hugging Face's `datasets` writes them), by pyarrow.

Batches are decoded by the process that reads, which costs little, and handed on as streams of Arrow;
whoever parses makes Python's values of them. Of the columns only those asked for are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tessel.data.readers.block import Block, Blocks, Damage, report
from tessel.data.rows import BadRow, Row

if TYPE_CHECKING:
    import pyarrow

    # And the bytes of the file that each stands for.
    Batches = Iterator[tuple[pyarrow.RecordBatch, int]]

# Few enough that a row group of long texts among short ones fits into memory.
_MAX_BATCH_ROWS = 8192
_BUFFER_BYTES = 1 << 20
_MAGIC = b"ARROW1"
_BAD_TEXT = re.compile("utf-?8", re.IGNORECASE)


def _errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises on damaged files."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError)


def table_columns(path: str, kind: str) -> list[str]:
    """The columns of a file.

    Raises:
        Damage: it is no such file.
    """
    import pyarrow.parquet as parquet

    try:
        if kind == "parquet":
            return list(parquet.read_schema(path).names)
        with _OpenArrow(path) as (schema, _):
            return list(schema.names)
    except _errors() as error:
        raise Damage(1, _reason(error, kind)) from error


def parquet_blocks(path: str, columns: Sequence[str] | None, block_bytes: int) -> Blocks:
    """Blocks of rows.

    Raises:
        Damage: the file, or a page of it, cannot be read.
    """
    import pyarrow.parquet as parquet

    def batches() -> Batches:
        # Columns are read in pieces; those of a row group may be gigabytes.
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, page_checksum_verification=True) as file:
            wanted = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
            # Nothing is asked of the row groups: for damaged ones pyarrow may end the process.
            row_bytes = os.path.getsize(path) / max(file.metadata.num_rows, 1)
            batch_rows = max(1, min(int(block_bytes / row_bytes), _MAX_BATCH_ROWS))
            for batch in file.iter_batches(batch_rows, columns=wanted, use_threads=False):
                yield batch, int(batch.num_rows * row_bytes)

    return _blocks(path, batches(), "parquet", block_bytes)


def arrow_blocks(path: str, columns: Sequence[str] | None, block_bytes: int) -> Blocks:
    """Blocks of rows of a file or a stream.

    Raises:
        Damage: the file, or a batch of it, cannot be read.
    """

    def batches() -> Batches:
        with _OpenArrow(path) as (schema, all_batches):
            wanted = None if columns is None else [name for name in schema.names if name in columns]
            for batch in all_batches:
                _validate(batch)
                num_bytes = min(batch.nbytes, os.path.getsize(path))
                yield batch if wanted is None else batch.select(wanted), num_bytes

    return _blocks(path, batches(), "arrow", block_bytes)


class _OpenArrow:
    """The schema and the batches of an Arrow file or stream, mapped into memory."""

    def __init__(self, path: str) -> None:
        import pyarrow

        self._source = pyarrow.memory_map(path)

    def __enter__(self) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
        from pyarrow import ipc

        is_file = self._source.read(len(_MAGIC)) == _MAGIC
        self._source.seek(0)
        if is_file:
            file = ipc.open_file(self._source)
            return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        stream = ipc.open_stream(self._source)
        return stream.schema, iter(stream)

    def __exit__(self, *args: object) -> None:
        self._source.close()


def _validate(batch: pyarrow.RecordBatch) -> None:
    """See that the batch points to nothing outside itself, which nobody else does before following it.

    Raises:
        ArrowInvalid: it does.
    """
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            # Bytes that are not UTF-8 are found again, and their row named, by who parses.
            is_flat = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
            if not (is_flat and _BAD_TEXT.search(str(error))):
                raise


def _blocks(path: str, batches: Batches, kind: str, block_bytes: int) -> Blocks:
    """Small batches joined, large ones parted.

    Raises:
        Damage: a batch cannot be read.
    """
    held = _Held(path)
    try:
        for batch, num_bytes in batches:
            num_parts = max(1, min(batch.num_rows, batch.nbytes // (2 * block_bytes)))
            part_rows = max(1, -(-batch.num_rows // num_parts))
            for begin in range(0, batch.num_rows, part_rows):
                part = batch.slice(begin, part_rows)
                held.add(part, num_bytes * part.num_rows // batch.num_rows)
                if held.size >= block_bytes:
                    yield held.block()
    except _errors() as error:
        if held.batches:
            yield held.block()
        raise Damage(held.row, _reason(error, kind)) from error
    if held.batches:
        yield held.block()


class _Held:
    """Batches that will be the next block."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.row = 1  # its first
        self._clear()

    def _clear(self) -> None:
        self.batches: list[pyarrow.RecordBatch] = []
        self.size = 0
        self._num_bytes = 0

    def add(self, batch: pyarrow.RecordBatch, num_bytes: int) -> None:
        self.batches.append(batch)
        self.size += batch.nbytes
        self._num_bytes += num_bytes

    def block(self) -> Block:
        import pyarrow
        from pyarrow import ipc

        sink = pyarrow.BufferOutputStream()
        with ipc.new_stream(sink, self.batches[0].schema.remove_metadata()) as writer:
            for batch in self.batches:
                writer.write_batch(batch.replace_schema_metadata(None))
        block = Block(self._path, self.row, sink.getvalue().to_pybytes(), "table", num_bytes=self._num_bytes)
        self.row += sum(batch.num_rows for batch in self.batches)
        self._clear()
        return block


def parse_table(block: Block, bad: list[BadRow] | None) -> list[Row]:
    """The rows of a block, as Python's values."""
    from pyarrow import ipc

    rows: list[Row] = []
    first = block.first_line
    with ipc.open_stream(block.data) as stream:
        for batch in stream:
            try:
                rows.extend(_rows(batch, first))
            except _errors():
                rows.extend(_rows_singly(block, batch, first, bad))
            first += batch.num_rows
    return rows


def _rows_singly(block: Block, batch: pyarrow.RecordBatch, first: int, bad: list[BadRow] | None) -> list[Row]:
    rows: list[Row] = []
    for i in range(batch.num_rows):
        try:
            rows.extend(_rows(batch.slice(i, 1), first + i))
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 ({error.reason} at byte 0x{error.object[error.start]:02x})."
            report(block, first + i, f"{reason} Write the file again, its texts in UTF-8.", bad)
        except _errors() as error:
            report(block, first + i, f"a value has no counterpart in Python ({_first_line(error)}).", bad)
    return rows


def _rows(batch: pyarrow.RecordBatch, first: int) -> list[Row]:
    names = batch.schema.names
    if not names:
        return [Row(first + i, {}) for i in range(batch.num_rows)]
    columns = [column.to_pylist() for column in batch.columns]
    return [
        Row(number, dict(zip(names, values, strict=True)))
        for number, values in enumerate(zip(*columns, strict=True), first)
    ]


def _reason(error: Exception, kind: str) -> str:
    what = "Parquet file" if kind == "parquet" else "Arrow file or stream"
    return f"not a whole {what} ({_first_line(error)}): it is cut off or damaged. Fetch or make it again."


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0].rstrip(".")
    return line if len(line) <= 160 else line[:157] + "..."
