"""Every format gives the same rows, however it is cut; and an error with file and row for what is damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow
import pytest
from pyarrow import ipc, parquet

from tessel.data.readers import check_inputs, parse_rows, read_blocks, stream
from tessel.data.readers.array import Scanner
from tessel.data.readers.csv_rows import _last_record
from tessel.data.rows import BadRow, Row, why_no_text
from tessel.errors import TesselError

Rows = list[dict[str, Any]]


def rows_of(
    path: Path,
    columns: Sequence[str] | None = None,
    block_bytes: int = 1 << 20,
    bad: list[BadRow] | None = None,
    **options: Any,
) -> list[Row]:
    blocks = list(read_blocks(path, block_bytes, columns, bad=bad, **options))
    assert sum(block.num_bytes for block in blocks) <= path.stat().st_size
    return [row for block in blocks for row in parse_rows(block, columns, bad)]


def values_of(path: Path, columns: Sequence[str] | None = None, block_bytes: int = 1 << 20) -> Rows:
    return [row.values for row in rows_of(path, columns, block_bytes)]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_csv(path: Path, rows: Rows, terminator: str = "\n") -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator=terminator, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return write(path, text.getvalue())


def write_arrow(path: Path, rows: Rows, is_file: bool = False) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    opened = ipc.new_file if is_file else ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def write_parquet(path: Path, rows: Rows, **options: Any) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def write_compressed(path: Path, content: str) -> Path:
    kind = "gzip" if path.suffix == ".gz" else "zstd"
    with pyarrow.CompressedOutputStream(str(path), kind) as out:
        out.write(content.encode())
    return path


def texts(seed: int, num_rows: int) -> Rows:
    """Texts of what the formats treat as special."""
    rng = np.random.default_rng(seed)
    alphabet = [
        '"',
        "\\",
        ",",
        "\n",
        "\r",
        "\r\n",
        "[",
        "]",
        "{",
        "}",
        "a",
        "\u4f60",
        "\U0001f600",
        " ",
        '\\"',
        "7",
        "",
    ]

    def text() -> str:
        return "".join(rng.choice(alphabet, rng.integers(0, 12)))

    return [{"text": text(), "other, one": text(), "n": f"x{i}"} for i in range(num_rows)]


@pytest.mark.parametrize("block_bytes", [1, 13, 64, 1 << 20])
@pytest.mark.parametrize("seed", [1, 2])
def test_formats_agree_however_they_are_cut(tmp_path: Path, block_bytes: int, seed: int) -> None:
    rows = texts(seed, 60)
    lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))
    files = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "lines.json", lines),
        write(tmp_path / "a.json", json.dumps(rows)),
        write(tmp_path / "indented.json", "\ufeff\n " + json.dumps(rows, indent=2, ensure_ascii=False) + " \n"),
        write_compressed(tmp_path / "a.jsonl.gz", lines),
        write_compressed(tmp_path / "a.jsonl.zst", lines),
        write_compressed(tmp_path / "a.json.gz", json.dumps(rows)),
        write_csv(tmp_path / "a.csv", rows),
        write_csv(tmp_path / "windows.csv", rows, "\r\n"),
        write_csv(tmp_path / "old.csv", rows, "\r"),
        write_parquet(tmp_path / "a.parquet", rows, row_group_size=25),
        write_arrow(tmp_path / "a.arrow", rows),
        write_arrow(tmp_path / "file.arrow", rows, is_file=True),
    ]
    for file in files:
        assert values_of(file, None, block_bytes) == rows, file
        if file.suffix in (".parquet", ".arrow"):
            assert values_of(file, ["n", "none"], block_bytes) == [{"n": row["n"]} for row in rows]
            assert [row.number for row in rows_of(file, None, block_bytes)] == list(range(1, 61))


def test_nested_values_and_nulls(tmp_path: Path) -> None:
    rows: Rows = [{"talk": [{"from": "a", "value": "b"}], "n": 1.5, "t": True, "none": None}, {"talk": [], "n": -2.0}]
    whole = [{"t": None, "none": None, **row} for row in rows]
    for file in (write_parquet(tmp_path / "a.parquet", whole), write_arrow(tmp_path / "a.arrow", whole)):
        assert values_of(file) == whole
    assert values_of(write(tmp_path / "a.json", json.dumps(rows))) == rows


def test_what_orjson_would_change_is_read_as_json_reads_it(tmp_path: Path) -> None:
    numbers = ["1" * 19, "1" * 20, "-" + "9" * 19, "18446744073709551615", "1e400", "NaN", "-Infinity", "-0", "0.1e-7"]
    lines = [f'{{"text": "a", "x": {{"deep": [{number}]}}}}' for number in numbers]
    lines += ['{"a": 1, "a": 2}', '{"x": "\\ud800"}', '{"x": "\\ud83d\\ude00"}', '{"x": 1.7976931348623157e308}']
    expected = [json.loads(line) for line in lines]
    files = [write(tmp_path / "a.jsonl", "\n".join(lines)), write(tmp_path / "a.json", f"[{','.join(lines)}]")]
    for file in files:
        for columns in (None, ["text"], ["x"]):
            found = values_of(file, columns)
            assert repr(found if columns != ["text"] else found[9:]) == repr(
                expected if columns != ["text"] else expected[9:]
            )


def test_orjson_gives_what_json_gives() -> None:
    """Or refuses, on random texts near JSON: it is never a matter of what it was given."""
    rng = np.random.default_rng(3)
    pieces = [
        '"',
        "\\u12",
        "\\n",
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "1",
        ".5",
        "e9",
        "-",
        "null",
        "true",
        " ",
        "a",
        "\t",
        "é",
    ]
    num_equal = 0
    for _ in range(4000):
        middle = "".join(rng.choice(pieces, rng.integers(1, 9)))
        for text in (middle, f"[{middle}]", f'{{"a":{middle}}}', f'"{middle}"'):
            try:
                value = orjson.loads(text)
            except ValueError:
                continue
            assert json.loads(text) == value, text
            num_equal += 1
    assert num_equal > 400


def test_csv_cells_are_texts_as_they_stand(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'a,b\r\n007, x \r\n\r\nNA,"12"" ""pipe"\n5" long,\n"x" y,nan')
    expected = [("007", " x "), ("NA", '12" "pipe'), ('5" long', ""), ("x y", "nan")]
    assert [tuple(row.values()) for row in values_of(path)] == expected
    assert [row.number for row in rows_of(path)] == [2, 4, 5, 6]
    nulls = [tuple(row.values.values()) for row in rows_of(path, null_words=True)]
    assert nulls == [("007", " x "), (None, '12" "pipe'), ('5" long', None), ("x y", None)]
    # A row is numbered by the line on which it begins.
    path = write(tmp_path / "b.csv", "\n\na\n" + '"1\n2\r3"\nx\n' * 3)
    assert [row.number for row in rows_of(path, block_bytes=9)] == [4, 7, 8, 11, 12, 15]


def test_records_end_where_the_csv_module_has_them_end() -> None:
    rng = np.random.default_rng(4)
    for _ in range(3000):
        data = "".join(rng.choice(['"', ",", "\n", "\r", "x", '""', "\r\n"], rng.integers(1, 14)))
        end, _ = _last_record(data.encode())
        whole = list(csv.reader(io.StringIO(data + "|", newline="")))
        parts = [
            *csv.reader(io.StringIO(data[:end], newline="")),
            *csv.reader(io.StringIO(data[end:] + "|", newline="")),
        ]
        assert parts == whole, (data, end)


def test_elements_are_found_in_any_chunks() -> None:
    rng = np.random.default_rng(5)
    pieces = ['"', "\\", "\\\\", '\\"', ",", "[", "]", "{", "}", "x"]
    for _ in range(300):
        data = "".join(rng.choice(pieces, rng.integers(1, 40))).encode()
        whole, end = Scanner(depth=1).feed(data)
        scanner, found, at = Scanner(depth=1), [], 0
        while at < len(data):
            size = int(rng.integers(1, 5))
            separators, part_end = scanner.feed(data[at : at + size])
            found += (separators + at).tolist()
            if part_end is not None:
                assert end == at + part_end
                break
            at += size
        assert found == whole.tolist()


def test_lists_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '[{"q": 1}, {"q": 2}]\n{"q": 3}\n')
    (block,) = read_blocks(path)
    assert parse_rows(block, None, lists=True) == [(1, {"": [{"q": 1}, {"q": 2}]}), (2, {"q": 3})]
    with pytest.raises(TesselError, match="line 1: a list, where an object is expected"):
        parse_rows(block)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    row = {"text": 'some "quoted" words\n' * 40, "n": [1, {"a": "b"}]}
    peaks: dict[str, list[int]] = {}
    for num_rows in (500, 3_000):
        rows = [row] * num_rows
        for path in (
            write(tmp_path / "a.json", json.dumps(rows)),
            write_compressed(tmp_path / "a.jsonl.gz", "".join(json.dumps(row) + "\n" for row in rows)),
            write_csv(tmp_path / "a.csv", rows),
        ):
            tracemalloc.start()
            count = sum(len(parse_rows(block)) for block in read_blocks(path, 1 << 16))
            peaks.setdefault(path.name, []).append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert count == num_rows
    assert all(larger < 1.1 * smaller for smaller, larger in peaks.values()), peaks


def test_a_row_that_no_memory_should_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_ROW_BYTES", 1 << 20)
    long = "x" * (3 << 20)
    for path in (
        write(tmp_path / "a.jsonl", f'{GOOD}\n{{"text": "{long}'),
        write(tmp_path / "a.json", f'[{GOOD}, {{"text": "{long}'),
        write(tmp_path / "a.csv", f'text\n"{long}'),
        write_compressed(tmp_path / "a.txt.zst", f"short\n{long}"),
    ):
        with pytest.raises(TesselError, match=r"(line|row) 2: longer than 1 MiB, which no document should be"):
            rows_of(path, block_bytes=1 << 16)


GOOD = '{"text": "fine"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", f"[{GOOD}, {GOOD}, 5]", r'row 3: a number, where an object is expected, as in {"text": ...}'),
        ("a.json", f'[{GOOD}, {{"text": 1,}}, {GOOD}]', r"row 2: invalid JSON \(.* at column \d+\).*array of objects"),
        ("a.json", f"[{GOOD},, {GOOD}]", "row 2: invalid JSON: nothing stands between two commas"),
        ("a.json", f"[{GOOD}, null]", "row 2: null, where an object"),
        ("a.json", f"[{GOOD}, {GOOD}", "row [12]: the file ends within its array"),
        ("a.json", f'[{GOOD}, {{"text": "', "row 2: the file ends within its array"),
        ("a.json", f"[{GOOD}]\n[{GOOD}]", "row 2: something follows the end of the array.*rename the file to .jsonl"),
        ("a.json", '{\n "text": "a"\n}\n', "line 1: invalid JSON .*one array of objects, or one object a line"),
        ("a.json", b'[{"text": "caf\xe9"}]', "row 1: not UTF-8 .*0xe9"),
        ("a.json", "  \n ", None),
        ("a.json", "[]", None),
        ("a.csv", "text,b\nx,y\nz\n", "line 3: 1 field, where the header names 2"),
        ("a.csv", "text,b\nx,y\n1,2,3\n", "line 3: 3 fields, where the header names 2"),
        ("a.csv", 'text,b\nx,y\nz,"open\n\n', "line 3: a quote opens here or in this record and is never closed"),
        ("a.csv", "text,b,text\nx,y,z\n", "line 1: the header names the column 'text' twice"),
        ("a.csv", b"text,b\nx,y\ncaf\xe9,z\n", "line 3: not UTF-8"),
        ("a.csv", "\n\n", "line 1: there is no header"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "fine"}\n' * 9, mtime=0)[:-9],
            "cannot be decompressed .*is cut off or damaged",
        ),
        ("a.jsonl.gz", GOOD, "line 1: cannot be decompressed"),
        ("a.jsonl.zst", GOOD, "line 1: cannot be decompressed"),
        ("a.json.gz", gzip.compress(f"[{GOOD}".encode(), mtime=0)[:-3], "row 1: cannot be decompressed"),
        ("a.parquet", "PAR1 nothing", "row 1: not a whole Parquet file .*is cut off or damaged"),
        ("a.arrow", "nothing at all", "row 1: not a whole Arrow file or stream"),
        ("a.arrow", b"ARROW1\0\0 nothing at all", "row 1: not a whole Arrow file or stream"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes | str, message: str | None) -> None:
    path = write(tmp_path / name, content)
    for block_bytes in (4, 1 << 20):
        if message is None:
            assert rows_of(path, block_bytes=block_bytes) == []
            continue
        with pytest.raises(TesselError, match=message) as caught:
            rows_of(path, ["text"], block_bytes)
        assert str(path) in str(caught.value) and len(str(caught.value)) < 500
        bad: list[BadRow] = []
        rows_of(path, ["text"], block_bytes, bad)
        assert bad


def test_bad_rows_can_be_passed_over(tmp_path: Path) -> None:
    bad: list[BadRow] = []
    path = write(tmp_path / "a.jsonl", f"{GOOD}\n{{nonsense\n\n{GOOD}\n".encode() + b'{"text": "\xff"}\n7\n')
    assert [row.number for row in rows_of(path, bad=bad)] == [1, 4]
    assert [number for number, _ in bad] == [2, 5, 6] and "a.jsonl" not in bad[0].reason

    bad = []
    path = write(tmp_path / "a.txt", b"one\n\xff\r\n\ntwo")
    assert rows_of(path, bad=bad) == [(1, {"text": "one"}), (4, {"text": "two"})]
    assert [number for number, _ in bad] == [2]

    bad = []
    path = write(tmp_path / "a.csv", b'a,b\n1,2\n3\n"\xff\n",x\n5,6\n')
    assert [row.number for row in rows_of(path, bad=bad)] == [2, 6]
    assert [number for number, _ in bad] == [3, 4]

    bad = []
    path = write(tmp_path / "a.json", f"[{GOOD}, {{}}}}, {GOOD}")
    assert len(rows_of(path, bad=bad)) == 2 and "a bracket too many" in bad[0].reason

    bad = []
    lines = "".join(f'{{"text": "{i}"}}\n' for i in range(20_000)).encode()
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(lines)[:-9])
    rows = rows_of(path, bad=bad, block_bytes=1 << 10)
    assert len(rows) > 10_000 and bad[0].number == len(rows) + 1 and "the file from here on is lost" in bad[0].reason


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_texts_of_tables_that_are_not_utf8(tmp_path: Path, kind: str) -> None:
    bytes_of = pyarrow.array([b"fine", b"caf\xe9", b"fine"])
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 3, bytes_of.buffers())})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(TesselError, match=r"row 2: not UTF-8 \(.* at byte 0xe9\)"):
        rows_of(path)
    bad: list[BadRow] = []
    assert [row.number for row in rows_of(path, bad=bad)] == [1, 3] and [number for number, _ in bad] == [2]


def test_a_table_that_points_outside_itself_is_refused(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", [{"text": "a" * 40}] * 3)
    offsets = np.array([0, 40, 80, 120], np.int32).tobytes()
    data = path.read_bytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, np.array([0, 40, 1 << 30, 120], np.int32).tobytes()))
    with pytest.raises(TesselError, match="row 1: not a whole Arrow file or stream .*: it is cut off or damaged"):
        rows_of(path)


def test_a_truncated_parquet_or_arrow_is_named(tmp_path: Path) -> None:
    rows = texts(6, 200)
    for path in (write_parquet(tmp_path / "a.parquet", rows), write_arrow(tmp_path / "a.arrow", rows)):
        path.write_bytes(path.read_bytes()[:-300])
        with pytest.raises(TesselError, match=r"a\.(parquet|arrow), row \d+: not a whole"):
            rows_of(path)
    with pytest.raises(TesselError, match="a.parquet: not a whole Parquet file"):
        check_inputs([tmp_path / "a.parquet"], ["text"])
    assert check_inputs([tmp_path / "a.parquet"], ["text"], may_skip=True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"text": "x"}, None),
        ({"text": ["x", "\u4f60"]}, None),
        ({"text": []}, None),
        ({"txt": "x"}, "has no key 'text'; it has txt"),
        ({"text": None}, "'text' is null"),
        ({"text": b"x"}, "'text' is bytes"),
        ({"text": ["x", 5]}, "'text' is a list with a number"),
        ({"text": np.float32(1)}, "'text' is of type float32"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_what_is_no_text(values: dict[str, Any], reason: str | None) -> None:
    found = why_no_text(values, "text")
    assert found is None if reason is None else reason in (found or "")
