"""Raw text is tokenized once for each content, tokenizer and set of options."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessel.config.tokenizer import Tokenizer as Section
from tessel.data.indexed import IndexedDataset
from tessel.data.raw_text import default_cache_dir, preprocessed_prefix
from tessel.data.tokenizer import HuggingFaceTokenizer, NullTokenizer
from tessel.errors import TesselError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tiny_tokenizer_folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("the quick\nbrown fox\n")
    return path


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "text").iterdir())


def test_built_then_reused(
    tokenizer: HuggingFaceTokenizer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = preprocessed_prefix(source, tokenizer, ["text"], True, tmp_path / "cache")
    built = capsys.readouterr().out
    # A line before may name the tokenizing library.
    assert built.count("tokens, kept in") == 1 and "tokens, kept in" in built.splitlines()[-1]
    dataset = IndexedDataset(prefix)
    assert tokenizer.decode(dataset.get(1).tolist()) == "brown fox<|endoftext|>"
    written_ns = Path(dataset.bin_path).stat().st_mtime_ns

    # Another name and place, the same content.
    moved = tmp_path / "elsewhere" / "a.txt"
    moved.parent.mkdir()
    source.rename(moved)
    assert preprocessed_prefix(moved, tokenizer, ["text"], True, str(tmp_path / "cache")) == prefix
    reused = capsys.readouterr().out
    assert "tokenized before, reused from" in reused and reused.count("\n") == 1
    assert Path(dataset.bin_path).stat().st_mtime_ns == written_ns
    assert len(entries(tmp_path / "cache")) == 1


def test_what_changes_the_tokens_changes_the_entry(
    tokenizer: HuggingFaceTokenizer, tiny_tokenizer_folder: Path, source: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def prefix(path: Path = source, by: HuggingFaceTokenizer = tokenizer, key: str = "text", eod: bool = True) -> str:
        return preprocessed_prefix(path, by, [key], eod, cache)

    other_content = tmp_path / "b.txt"
    other_content.write_text("the quick\nbrown foy\n")
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "the quick", "other": "brown fox"}\n')
    found = [
        prefix(),
        prefix(other_content),
        prefix(eod=False),
        prefix(by=HuggingFaceTokenizer(tiny_tokenizer_folder, Section(eod_id=3))),
        prefix(rows),
        prefix(rows, key="other"),
    ]
    assert len(set(found)) == len(found)
    without_eod = IndexedDataset(prefix(eod=False))
    assert tokenizer.decode(without_eod.get(1).tolist()) == "brown fox"
    # A pad id changes no token, so it shares the entry.
    assert prefix(by=HuggingFaceTokenizer(tiny_tokenizer_folder, Section(pad_id=3))) == found[0]
    assert NullTokenizer(9).identity != tokenizer.identity


def test_a_damaged_entry_is_built_again(
    tokenizer: HuggingFaceTokenizer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = preprocessed_prefix(source, tokenizer, ["text"], True, tmp_path / "cache")
    good = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(good[:-4])
    assert preprocessed_prefix(source, tokenizer, ["text"], True, tmp_path / "cache") == prefix
    assert Path(f"{prefix}.bin").read_bytes() == good
    assert "is damaged and is built again" in capsys.readouterr().err
    assert len(entries(tmp_path / "cache")) == 1


def test_an_error_leaves_no_entry(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "fox"}\n{"txt": "fox"}\n')
    with pytest.raises(TesselError, match="line 2: the object has no key 'text'"):
        preprocessed_prefix(rows, tokenizer, ["text"], True, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    with pytest.raises(UsageError, match="read by one key; run `tessel preprocess`"):
        preprocessed_prefix(rows, tokenizer, ["text", "other"], True, tmp_path / "cache")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(TesselError, match="cannot be written .*--data-cache-path"):
        preprocessed_prefix(rows, tokenizer, ["text"], True, blocked)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TESSEL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache/tessel"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg/tessel"
    monkeypatch.setenv("TESSEL_CACHE", "~/mine")
    assert default_cache_dir() == tmp_path / "mine"


def test_default_cache_is_used(
    tokenizer: HuggingFaceTokenizer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSEL_CACHE", str(tmp_path / "default"))
    prefix = preprocessed_prefix(source, tokenizer, ["text"], True)
    assert Path(prefix).is_relative_to(tmp_path / "default/text")


def test_processes_at_once_share_one_whole_entry(repository: Path, tmp_path: Path) -> None:
    source = tmp_path / "ids.txt"
    source.write_text("1 2 3 4 5 6 7 8\n" * 20_000)
    code = (
        "import sys, time, pathlib\n"
        "from tessel.data.raw_text import preprocessed_prefix\n"
        "from tessel.data.indexed import IndexedDataset\n"
        "from tessel.data.tokenizer import NullTokenizer\n"
        "pathlib.Path(sys.argv[3]).touch()\n"
        "while not pathlib.Path(sys.argv[4]).exists(): time.sleep(0.001)\n"
        "prefix = preprocessed_prefix(sys.argv[1], NullTokenizer(9), ['text'], True, sys.argv[2])\n"
        "print(prefix, IndexedDataset(prefix).total_tokens)"
    )
    environment = os.environ | {"PYTHONPATH": str(repository)}
    ready = [tmp_path / f"ready{i}" for i in range(3)]
    go = tmp_path / "go"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(source), str(tmp_path / "cache"), str(mine), str(go)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mine in ready
    ]
    while not all(mine.exists() for mine in ready) and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    go.touch()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [errors for _, errors in outputs] == [""] * 3
    last_lines = {out.splitlines()[-1] for out, _ in outputs}
    assert len(last_lines) == 1 and last_lines.pop().endswith(" 180000")
    assert len(entries(tmp_path / "cache")) == 1
