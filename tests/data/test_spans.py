"""Places of lines in plain files: the bytes of `read_blocks`, and the right numbers of lines where they are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tessel import commands
from tessel.data.readers import LineCounter, has_spans, parse_rows, read_blocks, read_spans
from tessel.data.rows import BadRow
from tessel.errors import TesselError


def write_lines(path: Path, num_lines: int, seed: int = 0) -> bytes:
    """Lines of very different lengths, some of nothing; the last one does not end."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(num_lines) < 0.1, 0, rng.integers(1, 40, num_lines) ** 2)
    ends = [b"\r\n" if path.suffix == ".txt" and i % 11 == 0 else b"\n" for i in range(num_lines)]
    lines = [b'{"text": "%s"}' % (b"x" * length) if length else b"" for length in lengths.tolist()]
    data = b"".join(line + end for line, end in zip(lines, ends, strict=True))[:-1]
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("block_bytes", [1, 100, 5_000, 1 << 20])
def test_spans_are_the_file(tmp_path: Path, name: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessel.data.readers.spans._LOOK_BYTES", 64)
    data = write_lines(tmp_path / name, 300)
    spans = list(read_spans(tmp_path / name, block_bytes))
    assert b"".join(span.load().data for span in spans) == data
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    assert all(data[span.stop - 1] == ord("\n") for span in spans[:-1])
    assert len(spans) == 1 or max(span.num_bytes for span in spans) < block_bytes + 1_700
    counter = LineCounter()
    rows = [row for span in spans for row in parse_rows(span.load(counter.first_line(span)))]
    assert rows == [row for block in read_blocks(tmp_path / name) for row in parse_rows(block)]
    assert LineCounter().first_line(spans[-1]) == counter.first_line(spans[-1])
    assert counter.first_line(spans[0]) == 1, "back to the front"


def test_which_files_have_spans() -> None:
    assert [has_spans(name) for name in ("a.jsonl", "a.txt", "a.jsonl.gz", "a.csv", "a.json")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    spans = list(read_spans(tmp_path / "a.jsonl", 1))
    assert [row.values["text"] for span in spans for row in parse_rows(span.load())] == ["a", "b"]


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("spans", "stream"):
        monkeypatch.setattr(f"tessel.data.readers.{module}.MAX_ROW_BYTES", 1_000)
    (tmp_path / "a.txt").write_bytes(b"a\n" * 700 + b"b" * 5_000)
    with pytest.raises(TesselError, match=r"a.txt, line 701: longer than"):
        list(read_spans(tmp_path / "a.txt", 100))
    bad: list[BadRow] = []
    assert sum(span.num_bytes for span in read_spans(tmp_path / "a.txt", 100, bad)) == 1_400
    assert [row.number for row in bad] == [701]


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", 50)
    *_, last = read_spans(tmp_path / "a.txt", 500)
    (tmp_path / "a.txt").write_bytes(b"a\n")
    with pytest.raises(TesselError, match=r"a.txt has become shorter while it was read"):
        last.load()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(TesselError, match=r"a.txt cannot be read: No such file"):
        last.load()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_lines_are_numbered_far_into_a_file(
    tmp_path: Path, workers: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tessel.data.preprocess._BLOCK_BYTES", 300)
    lines = [json.dumps({"text": str(i)}) for i in range(500)]
    for i in (77, 78, 300, 499):
        lines[i] = "[]"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    argv = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "out"), "--workers", workers]
    argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "999"]
    with pytest.raises(TesselError, match=r"a.jsonl, line 78: a list, where an object is expected"):
        commands.preprocess(argv)
    commands.preprocess([*argv, "--on-error", "skip"])
    out = capsys.readouterr().out.splitlines()
    named = [line.split(": ")[0].split()[-1] for line in out if line.startswith("skipped")]
    assert named == ["78", "79", "301", "500"]
