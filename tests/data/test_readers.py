"""Documents of .jsonl and .txt, and an error with file and line for what is none."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from tessel.data.readers import Block, Document, check_inputs, parse_block, read_blocks
from tessel.errors import TesselError, UsageError


def documents(path: Path, keys: tuple[str, ...] = ("text",), block_bytes: int = 1 << 20) -> list[Document]:
    return [document for block in read_blocks(path, block_bytes) for document in parse_block(block, keys)]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_of_jsonl(tmp_path: Path) -> None:
    lines = ['{"text": "one"}', "", '{"id": 3, "text": ["a", "b"]}', " ", '{"text": ""}\r', '{"text": "e\\u0301\\n"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert documents(path) == [(1, ("one",)), (3, (["a", "b"],)), (5, ("",)), (6, ("e\u0301\n",))]


def test_several_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": "one", "a": "two", "x": 5}\n')
    assert documents(path, ("a", "q")) == [(1, ("two", "one"))]


def test_lines_of_txt(tmp_path: Path) -> None:
    text = "first\n\nsecond\r\nthird\rfourth\u2028still\x0bfourth\n \nlast"
    path = write(tmp_path / "a.txt", text)
    assert [document.texts[0] for document in documents(path)] == [
        "first",
        "second",
        "third",
        "fourth\u2028still\x0bfourth",
        " ",
        "last",
    ]


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_blocks_change_nothing(tmp_path: Path, block_bytes: int) -> None:
    rows = [{"text": "\u4f60\u597d " * (i % 5)} for i in range(40)]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert documents(path, block_bytes=block_bytes) == [(i + 1, (row["text"],)) for i, row in enumerate(rows)]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello\n")) == [(1, ("hello",))]
    assert documents(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "hello"}\n')) == [(1, ("hello",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"line 3: invalid JSON \(Expecting ',' delimiter at column 13\): .*one JSON object"),
        ("[" * 100_000, r"line 3: invalid JSON"),
        ('{"text": ' + "1" * 5000 + "}", "line 3: (invalid JSON|'text' is a number)"),
        ('["x"]', r'line 3: a list, where an object is expected, as in {"text": ...}'),
        ('"x"', "line 3: a string, where an object"),
        ('{"txt": "x", "id": 1}', "line 3: the object has no key 'text'; it has txt. Choose with --json-keys"),
        ('{"a": "x", "b": 1}', "line 3: the object has no key 'text'; it has a, b"),
        ("{}", "line 3: the object has no key 'text'; it is empty"),
        ('{"text": 5}', "line 3: 'text' is a number, where text is expected"),
        ('{"text": null}', "line 3: 'text' is null, where text is expected"),
        ('{"text": {"a": "b"}}', "line 3: 'text' is an object, where text"),
        ('{"text": ["a", true]}', "line 3: 'text' is a list with a truth value, where text"),
        ('{"text": "a\\ud800b"}', "line 3: 'text' holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine"}}\n')
    with pytest.raises(TesselError, match=message) as caught:
        documents(path, block_bytes=4)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"latin{suffix}", b'{"text": "a"}\n{"text": "caf\xe9 au lait"}\n')
    with pytest.raises(TesselError, match=r"line 2: not UTF-8 \(invalid continuation byte at byte 0xe9\).*iconv"):
        documents(path)


def test_inputs_are_checked(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", "{}")
    text = write(tmp_path / "good.txt", "a")
    assert check_inputs([str(good)], ["a", "b"]) == [good]
    assert check_inputs([good, text], ["text"]) == [good, text]
    with pytest.raises(TesselError, match=r"goood.jsonl does not exist.*good.jsonl"):
        check_inputs([tmp_path / "goood.jsonl"], ["text"])
    with pytest.raises(TesselError, match=r"\.docx is not read; \.jsonl, .* and \.txt are.*\.zst"):
        check_inputs([write(tmp_path / "a.docx", "x")], ["text"])
    with pytest.raises(TesselError, match="no extension is not read"):
        check_inputs([write(tmp_path / "corpus", "x")], ["text"])
    with pytest.raises(TesselError, match=r"empty.txt is empty"):
        check_inputs([write(tmp_path / "empty.txt", "")], ["text"])
    with pytest.raises(UsageError, match="has lines, not keys"):
        check_inputs([text], ["content"])
    with pytest.raises(UsageError, match="names text twice"):
        check_inputs([good], ["text", "text"])
    with pytest.raises(UsageError, match="at least one"):
        check_inputs([], ["text"])


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "a")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the super-user may read any file
    with pytest.raises(TesselError, match="a.txt cannot be read: permission denied"):
        check_inputs([path], ["text"])


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    line = json.dumps({"text": "words " * 160}) + "\n"
    peaks = {}
    for num_lines in (3_000, 24_000):
        path = write(tmp_path / f"{num_lines}.jsonl", line * num_lines)
        tracemalloc.start()
        count = sum(len(parse_block(block, ["text"])) for block in read_blocks(path))
        peaks[num_lines] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == num_lines
    assert peaks[24_000] < 1.1 * peaks[3_000]


def test_a_block_knows_its_lines() -> None:
    block = Block("x.jsonl", 11, b'{"text": "a"}\n{"text": "b"}\n')
    assert parse_block(block, ["text"]) == [(11, ("a",)), (12, ("b",))]
