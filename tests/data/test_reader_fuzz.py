"""Files with bytes changed, cut, lost, added or doubled: rows, or errors in words that name file and place.

Each kind is tried in a process of its own (this file, run as a program), so that a library that
crashes, hangs or takes memory without bound is seen as that.
"""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import ipc, parquet

from tessel.data.readers import check_inputs, parse_rows, read_blocks
from tessel.data.rows import BadRow, Row, why_no_text
from tessel.errors import TesselError

KINDS = {
    "a.jsonl": 400,
    "a.json": 150,
    "a.csv": 150,
    "a.txt": 60,
    "a.jsonl.gz": 60,
    "a.jsonl.zst": 60,
    "a.parquet": 400,
    "checked.parquet": 100,
    "a.arrow": 150,
    "file.arrow": 150,
    "compressed.arrow": 60,
}
SLOW = {"a.jsonl": 3000, "a.parquet": 3000, "checked.parquet": 1000}
SLOW_OF_OTHERS = 1000
HANG_S = 30
# What pyarrow's allocator and the libraries that are loaded on the way take, beside twice the file.
SLACK_BYTES = 48 << 20


def content(name: str) -> bytes:
    """A good file of that name, of 60 rows."""
    rows = [
        {"text": f'line {i} \u4f60 "x", \\ y\n' * (i % 4), "talk": [{"from": "a", "value": str(i)}], "n": i - 0.5}
        for i in range(60)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    if name.endswith("jsonl"):
        return lines
    if name.endswith(".json"):
        return json.dumps(rows).encode()
    if name.endswith(".txt"):
        return "".join(str(row["text"]) for row in rows).encode()
    if name.endswith(".csv"):
        text = io.StringIO()
        csv.writer(text).writerows([["text", "n"], *([row["text"], row["n"]] for row in rows)])
        return text.getvalue().encode()
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(rows)
    if name.endswith((".gz", ".zst")):
        with pyarrow.CompressedOutputStream(sink, "gzip" if name.endswith(".gz") else "zstd") as out:
            out.write(lines)
    elif name.endswith(".parquet"):
        parquet.write_table(table, sink, row_group_size=25, write_page_checksum=name.startswith("checked"))
    else:
        opened = ipc.new_stream if name == "a.arrow" else ipc.new_file
        options = ipc.IpcWriteOptions(compression="zstd" if name.startswith("compressed") else None)
        with opened(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=20)
    return bytes(sink.getvalue().to_pybytes())


def mutated(good: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(good)
    for _ in range(rng.integers(1, 4)):
        how, at = rng.integers(7), int(rng.integers(len(data)))
        if how == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            data[at] = int(rng.integers(256))
        elif how == 2:
            del data[at:]
        elif how == 3:
            del data[at : at + int(rng.integers(1, 30))]
        elif how == 4:
            data[at:at] = rng.bytes(int(rng.integers(1, 20)))
        elif how == 5:
            source = int(rng.integers(len(data)))
            data[at:at] = data[source : source + int(rng.integers(1, 60))]
        else:
            data[at : at + 4] = (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80")[rng.integers(4)]
        data = data or bytearray(b"x")
    return bytes(data)


def rows_of(path: Path, columns: tuple[str, ...] | None, bad: list[BadRow] | None) -> list[Row]:
    blocks = read_blocks(path, 1 << 10, columns, bad=bad)
    return [row for block in blocks for row in parse_rows(block, columns, bad)]


def plain_rows(data: bytes) -> list[Any]:
    """The objects of a .jsonl, by Python's own means."""
    rows = []
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            rows.append(value)
    return rows


def attempt(path: Path, data: bytes, columns: tuple[str, ...] | None) -> bool:
    """Read a file, stopping at what is wrong and passing over it; whether nothing was."""
    path.write_bytes(data)
    bad: list[BadRow] = []
    kept = rows_of(path, columns, bad)
    for row in kept:
        why_no_text(row.values, "text")
    if path.suffix == ".jsonl":
        assert repr([row.values for row in kept]) == repr(plain_rows(data))
    try:
        check_inputs([path], None)
        assert rows_of(path, columns, None) == kept or "nan" in repr(kept)
    except TesselError as error:
        message = str(error)
        assert bad and str(path) in message and len(message) < 500 and "Traceback" not in message
        assert any(f"{path}, {unit} {bad_row.number}:" in message for bad_row in bad for unit in ("line", "row"))
        return False
    assert not bad
    return True


def fuzz(name: str, count: int, first: int) -> None:
    """Main function of the program: prints how many files were still good, and by how much memory grew."""
    good = content(name)
    num_good = 0
    before = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        for seed in range(first, first + count):
            columns = ("text",) if seed % 2 else None
            if seed - first == 10:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.alarm(HANG_S)
            try:
                num_good += attempt(path, mutated(good, np.random.default_rng(seed)), columns)
            except BaseException:
                print(f"{name}, seed {seed}", file=sys.stderr)
                raise
            signal.alarm(0)
        grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        assert grown_bytes < 2 * len(good) + SLACK_BYTES, f"memory grew by {grown_bytes:,} bytes"
    print(json.dumps({"good": num_good, "grown": grown_bytes}))


def run(repository: Path, name: str, count: int, first: int) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__, name, str(count), str(first)],
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Changes that harm none and changes that harm were both among them.
    assert 0 < json.loads(done.stdout)["good"] < count or name.endswith((".gz", ".zst"))


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files(repository: Path, name: str) -> None:
    run(repository, name, KINDS[name], 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_mutated_files(repository: Path, name: str) -> None:
    run(repository, name, SLOW.get(name, SLOW_OF_OTHERS), 10_000)


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
