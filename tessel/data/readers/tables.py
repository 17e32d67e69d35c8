""".parquet and .arrow (files and streams, as Hugging Face's `datasets` writes them), by pyarrow.

Batches are decoded by the process that reads, which costs little, and handed on as streams of Arrow;
whoever parses makes Python's values of them. Of the columns only those asked for are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tessel.data.readers.block import Block, Blocks, Damage, report
from tessel.data.rows import BadRow, Row

if TYPE_CHECKING:
    import pyarrow

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
        with _open_arrow(path) as (schema, _):
            return list(schema.names)
    except _errors() as error:
        raise Damage(1, _reason(error, kind)) from error


def parquet_blocks(path: str, columns: Sequence[str] | None, block_bytes: int) -> Blocks:
    """Blocks of rows, of one row group each.

    Raises:
        Damage: the file, or a page of it, cannot be read.
    """
    import pyarrow.parquet as parquet

    row = 1
    size_bytes = os.path.getsize(path)
    try:
        # A row group's columns are read in pieces; whole ones may be gigabytes.
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, page_checksum_verification=True) as file:
            metadata = file.metadata
            num_rows = max(metadata.num_rows, 1)
            wanted = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
            for group in range(metadata.num_row_groups):
                batch_rows = _batch_rows(metadata.row_group(group), wanted, block_bytes)
                for batch in file.iter_batches(batch_rows, [group], wanted, use_threads=False):
                    share = size_bytes * batch.num_rows // num_rows
                    yield from _blocks(path, row, batch, share, block_bytes)
                    row += batch.num_rows
    except _errors() as error:
        raise Damage(row, _reason(error, "parquet")) from error


def _batch_rows(group: Any, wanted: Sequence[str] | None, block_bytes: int) -> int:
    num_bytes = 0
    for i in range(group.num_columns):
        column = group.column(i)
        if wanted is None or column.path_in_schema.split(".")[0] in wanted:
            num_bytes += column.total_uncompressed_size
    return max(1, min(_MAX_BATCH_ROWS, block_bytes * group.num_rows // max(num_bytes, 1)))


def arrow_blocks(path: str, columns: Sequence[str] | None, block_bytes: int) -> Blocks:
    """Blocks of rows of a file or a stream.

    Raises:
        Damage: the file, or a batch of it, cannot be read.
    """
    row = 1
    size_bytes = os.path.getsize(path)
    try:
        with _open_arrow(path) as (schema, batches):
            wanted = None if columns is None else [name for name in schema.names if name in columns]
            for batch in batches:
                share = min(batch.nbytes, size_bytes)
                if wanted is not None:
                    batch = batch.select(wanted)
                _validate(batch)
                yield from _blocks(path, row, batch, share, block_bytes)
                row += batch.num_rows
    except _errors() as error:
        raise Damage(row, _reason(error, "arrow")) from error


class _open_arrow:
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


def _blocks(path: str, row: int, batch: pyarrow.RecordBatch, num_bytes: int, block_bytes: int) -> Blocks:
    """A batch as blocks; several where it is much larger than a block."""
    num_parts = max(1, min(batch.num_rows, batch.nbytes // (2 * block_bytes)))
    part_rows = -(-batch.num_rows // num_parts)
    for begin in range(0, batch.num_rows, max(part_rows, 1)):
        part = batch.slice(begin, part_rows)
        share = num_bytes * part.num_rows // batch.num_rows
        yield Block(path, row + begin, _to_bytes(part), "table", num_bytes=share)


def _to_bytes(batch: pyarrow.RecordBatch) -> bytes:
    import pyarrow
    from pyarrow import ipc

    batch = batch.replace_schema_metadata(None)
    sink = pyarrow.BufferOutputStream()
    with ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def parse_table(block: Block, bad: list[BadRow] | None) -> list[Row]:
    """The rows of a block, as Python's values."""
    from pyarrow import ipc

    with ipc.open_stream(block.data) as stream:
        batch = stream.read_next_batch()
    try:
        return _rows(batch, block.first_line)
    except _errors():
        pass
    rows = []
    for i in range(batch.num_rows):
        try:
            rows.extend(_rows(batch.slice(i, 1), block.first_line + i))
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 ({error.reason} at byte 0x{error.object[error.start]:02x})."
            report(block, block.first_line + i, f"{reason} Write the file again, its texts in UTF-8.", bad)
        except _errors() as error:
            report(block, block.first_line + i, f"a value has no counterpart in Python ({_first_line(error)}).", bad)
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
