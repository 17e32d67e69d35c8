"""`tessel preprocess` from its flags: where the tools differ, parts of the input, skipped rows, second passes."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel import commands
from tessel.data.indexed import IndexedDataset
from tessel.data.metadata import read_metadata
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError, UsageError

NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "70000")


def run(folder: Path, *argv: object, name: str = "out") -> Path:
    """Preprocess with ids written as numbers; returns the prefix of the datasets."""
    words = [str(word) for word in argv]
    tokenizer = () if any(word.startswith(("--tokenizer", "--load")) for word in words) else NULL
    commands.preprocess([*words, *tokenizer, "--output-prefix", str(folder / name)])
    return folder / name


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def numbers(num_rows: int, num_words: int = 3) -> list[Any]:
    """Row i says i; some say nothing."""
    return [{"text": "" if i % 7 == 3 else " ".join([str(i)] * (1 + i % num_words))} for i in range(num_rows)]


def read(prefix: Path | str) -> list[list[list[int]]]:
    """Sequences of each document."""
    dataset = IndexedDataset(prefix)
    entries = dataset.document_indices.tolist()
    return [[dataset.get(i).tolist() for i in range(a, b)] for a, b in zip(entries[:-1], entries[1:], strict=True)]


def files(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_partitions_deal_documents_out_where_the_tool_does(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", numbers(50))
    whole = read(f"{run(tmp_path, '--input', source)}_text_document")
    argv = ("--input", source, "--partitions", 3, "--workers", 3)
    for compatible in ((), ("--compatible", "megatron", "--keep-sequential-samples"), ("--compatible", "mindspeed")):
        kept = read(f"{run(tmp_path, *argv, *compatible)}_text_document")
        assert kept == ([own for own in whole if own] if "mindspeed" in compatible else whole)
    for tool in ("megatron", "pai"):
        dealt = read(f"{run(tmp_path, *argv, '--compatible', tool, name=tool)}_text_document")
        assert dealt == [own for start in range(3) for own in whole[start::3]]
        assert [name for name in visible(tmp_path) if name.startswith(tool)] == [
            f"{tool}_text_document.{end}" for end in ("bin", "idx", "meta.json")
        ]


def test_mindspeed(tmp_path: Path) -> None:
    """int32 whatever the vocabulary, no empty document, long ones dropped with an entry left, padding."""
    source = write(tmp_path / "a.jsonl", numbers(60))
    small = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--append-eod")
    megatron = f"{run(tmp_path, '--input', source, *small)}_text_document"
    whole = read(megatron)
    assert IndexedDataset(megatron).dtype == np.uint16
    argv = ("--input", source, *small, "--compatible", "mindspeed")
    theirs = f"{run(tmp_path, *argv, name='b')}_text_document"
    assert IndexedDataset(theirs).dtype == np.int32
    assert read(theirs) == [own for own in whole if own]
    for n_subs in (1, 7):
        dropped = read(f"{run(tmp_path, *argv, '--seq-length', 4, '--n-subs', n_subs, name='c')}_text_document")
        assert dropped == [[ids for ids in own if len(ids) < 4] for own in whole if own]
    padded = read(f"{run(tmp_path, *argv, '--pad-to-multiple-of', 3, name='d')}_text_document")
    assert {len(own[0]) for own in padded} == {3, 6}
    # 101 is the number after the vocabulary's, which end of document belongs to.
    assert padded[0] == [[0, 101, 100]] and padded[2] == [[2, 2, 2, 101, 101, 100]]


def test_subsets_count_their_own_rows(tmp_path: Path) -> None:
    """A long row of one key takes the row at its place, empty ones aside, of the other; each subset counts anew."""
    rows = [{"a": str(i) if i % 2 else "", "b": "1 2 3" if i == 7 else str(100 + i)} for i in range(12)]
    source = write(tmp_path / "a.jsonl", rows)
    argv = ("--input", source, "--compatible", "mindspeed", "--json-keys", "a", "b", "--seq-length", 3)
    run(tmp_path, *argv)
    run(tmp_path, *argv, "--n-subs", 2, name="two")
    whole, two = (read(tmp_path / f"{name}_a_document") for name in ("out", "two"))
    # Row 7 is the eighth of all, where `a` has six texts; it is the second of its subset, where `a` says 9.
    assert whole == [[[i]] for i in (1, 3, 5, 7, 9, 11)]
    assert two == [[[1]], [[3]], [[5]], [[7]], [], [[11]]]
    assert read(tmp_path / "two_b_document") == read(tmp_path / "out_b_document")


def test_pai(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    """--load names the tokenizer; a sequence with an added token is left out without --extra-vocab-size."""
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    num_added = tokenizer.vocab_size - tokenizer.hf.vocab_size
    assert num_added > 0
    special = "<|endoftext|>"
    source = write(tmp_path / "a.jsonl", [{"text": "the fox"}, {"text": f"a {special}"}, {"text": ""}])
    argv = ("--input", source, "--compatible", "pai", "--load", tiny_tokenizer_folder, "--seq-length", 2048)
    argv = (*argv, "--patch-tokenizer-type", "Qwen2Tokenizer", "--append-eod")
    plain = tokenizer.batch_encoder(add_special_tokens=False)
    one, two = plain(["the fox", f"a {special}"])
    assert read(f"{run(tmp_path, *argv)}_text_document") == [[[*one, tokenizer.eod]], [], []]
    for room in (("--extra-vocab-size", num_added), ("--padded-vocab-size", tokenizer.vocab_size)):
        found = read(f"{run(tmp_path, *argv, *room)}_text_document")
        assert found == [[[*one, tokenizer.eod]], [[*two, tokenizer.eod]], []]


def test_both_names_of_a_tokenizer(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    """A tool's own command line with tessel's flag added: the added one counts."""
    source = write(tmp_path / "a.jsonl", [{"text": "the fox"}])
    run(tmp_path, "--input", source, "--tokenizer-model", "nowhere", "--tokenizer-name-or-path", tiny_tokenizer_folder)
    assert read(tmp_path / "out_text_document") == [[HuggingFaceTokenizer(tiny_tokenizer_folder).encode("the fox")]]


@pytest.mark.parametrize("num_shards", [2, 5])
def test_merged_shards_are_one_run(tmp_path: Path, num_shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("tessel.data.preprocess._BLOCK_BYTES", 400)
    sources: list[Path] = [write(tmp_path / "a.jsonl", numbers(300)), write(tmp_path / "tiny.jsonl", numbers(1))]
    sources.append(write(tmp_path / "b.jsonl.gz", numbers(2_000)))
    parquet.write_table(
        pyarrow.table({"text": [row["text"] for row in numbers(900)]}), tmp_path / "c.parquet", row_group_size=50
    )
    sources.append(tmp_path / "c.parquet")
    argv = ("--input", *sources, "--append-eod")
    whole = run(tmp_path, *argv)
    for shard in range(1, num_shards + 1):
        run(tmp_path, *argv, "--shard", f"{shard}/{num_shards}", name=f"parts/p{shard}")
    sizes = [IndexedDataset(tmp_path / f"parts/p{i}_text_document").num_documents for i in range(1, num_shards + 1)]
    assert sum(sizes) == 3_201 and min(sizes) > 0
    commands.merge_datasets(["--input", str(tmp_path / "parts"), "--output-prefix", str(tmp_path / "merged")])
    assert files(tmp_path / "merged") == files(f"{whole}_text_document")


def test_a_shard_may_hold_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", numbers(2))
    found = [read(f"{run(tmp_path, '--input', source, '--shard', f'{i}/3')}_text_document") for i in (1, 2, 3)]
    assert found == [[[[0]], [[1, 1]]], [], []]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "a/b"])
def test_a_shard_that_is_none(tmp_path: Path, shard: str) -> None:
    with pytest.raises(UsageError, match="--shard is .*: it must be I/N with I from 1 to N"):
        run(tmp_path, "--input", write(tmp_path / "a.jsonl", numbers(2)), "--shard", shard)


def test_shuffled_documents(tmp_path: Path) -> None:
    """One order for all keys, that of the seed alone, whatever the workers."""
    rows = [{"text": str(i), "other": f"{i} {i}"} for i in range(40)]
    argv = ("--input", write(tmp_path / "a.jsonl", rows), "--json-keys", "text", "other", "--shuffle")
    run(tmp_path, *argv, "--seed", 5, name="a")
    run(tmp_path, *argv, "--seed", 5, "--workers", 2, name="b")
    run(tmp_path, *argv, "--seed", 6, name="c")
    text = [own[0][0] for own in read(tmp_path / "a_text_document")]
    assert sorted(text) == list(range(40)) and text != list(range(40))
    assert [own[0] for own in read(tmp_path / "a_other_document")] == [[i, i] for i in text]
    assert files(tmp_path / "a_text_document") == files(tmp_path / "b_text_document")
    assert files(tmp_path / "a_text_document") != files(tmp_path / "c_text_document")


def test_skipped_rows_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = numbers(1_000)
    for i in range(0, 1_000, 37):
        rows[i] = ["{\n", {"text": None}, {"txt": "1"}, {"text": "word"}, '{"text": "\\ud800"}\n'][i % 5]
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(TesselError, match=r"a.jsonl, line 1: invalid JSON"):
        run(tmp_path, "--input", source, "--append-eod")
    assert visible(tmp_path) == ["a.jsonl"]
    argv = ("--input", source, "--append-eod", "--on-error", "skip")
    for workers in (1, 2):
        run(tmp_path, *argv, "--workers", workers, name=f"w{workers}")
    assert files(tmp_path / "w1_text_document") == files(tmp_path / "w2_text_document")
    good = [row["text"] for i, row in enumerate(numbers(1_000)) if i % 37]
    expected = [[[*map(int, text.split()), 70_000]] if text else [] for text in good]
    assert read(tmp_path / "w1_text_document") == expected
    out = capsys.readouterr().out.splitlines()
    assert f"skipped {source}, line 1: invalid JSON" in out[1] or f"skipped {source}, line 1: invalid JSON" in out[0]
    assert any("line 38: the object has no key 'text'" in line for line in out)
    assert any("NullTokenizer: 'word' is not an id" in line for line in out)
    assert out.count("28 rows were skipped (8 of them not named)") == 2


def test_a_damaged_file_ends_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    source = write(tmp_path / "a.jsonl.gz", [{"text": str(i)} for i in rng.integers(0, 60_000, 50_000).tolist()])
    source.write_bytes(source.read_bytes()[:-5_000])
    good = write(tmp_path / "b.jsonl", numbers(3))
    with pytest.raises(TesselError, match=r"a.jsonl.gz, line \d+: cannot be decompressed"):
        run(tmp_path, "--input", source, good)
    assert visible(tmp_path) == ["a.jsonl.gz", "b.jsonl"]
    run(tmp_path, "--input", source, good, "--on-error", "skip")
    found = read(tmp_path / "out_text_document")
    assert 10_000 < len(found) < 50_003 and found[-3:] == [[[0]], [[1, 1]], [[2, 2, 2]]]
    out = capsys.readouterr().out
    assert f"skipped {source}, row {len(found) - 2}: the file from here on is lost" in out
    assert "1 rows were skipped" in out


def test_lines_of_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessel.data.preprocess._BLOCK_BYTES", 400)
    run(tmp_path, "--input", write(tmp_path / "a.jsonl", numbers(300)), "--log-interval", 100)
    lines = [line for line in capsys.readouterr().err.splitlines() if " documents: " in line]
    assert [line.split()[0] for line in lines] == ["100", "200", "300"]
    assert all("tokens/s" in line and "MB/s" in line for line in lines)


def test_what_is_noted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", numbers(5))
    run(tmp_path, "--input", source, "--compatible", "mindspeed", "--seq-length", 64, "--shard", "1/1")
    noted = read_metadata(tmp_path / "out_text_document")
    assert noted is not None
    assert (noted["compatible"], noted["seq_length"], noted["shard"], noted["append_eod"]) == (
        "mindspeed", 64, "1/1", False,
    )  # fmt: skip
    assert noted["documents"] == 4 and noted["tokenizer"]["vocab_size"] == 70_001
    assert "pack" not in noted and "pad_to_multiple_of" not in noted


class FullDisk:
    """A disk with so much room for .bin files, all together."""

    def __init__(self, room_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from tessel.data import indexed

        self.room_bytes = room_bytes
        write_tokens = indexed.IndexedDatasetWriter._write

        def write(writer: indexed.IndexedDatasetWriter, tokens: Any) -> None:
            self.room_bytes -= np.asarray(tokens).nbytes
            with indexed.disk_errors(writer.prefix):
                if self.room_bytes < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
            write_tokens(writer, tokens)

        monkeypatch.setattr(indexed.IndexedDatasetWriter, "_write", write)


@pytest.mark.parametrize("room_bytes", [500, 2_500])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, workers: int, room_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first pass and in the second; what was there before stays."""
    source = write(tmp_path / "a.jsonl", numbers(300))
    argv = ("--input", source, "--shuffle", "--workers", workers)
    run(tmp_path, *argv)
    before, names = files(tmp_path / "out_text_document"), visible(tmp_path)
    with monkeypatch.context() as patched:
        FullDisk(room_bytes, patched)
        with pytest.raises(TesselError, match="The disk is full: writing"):
            run(tmp_path, *argv, "--seed", 7)
    assert files(tmp_path / "out_text_document") == before
    assert [name for name in visible(tmp_path) if "meta" not in name] == [name for name in names if "meta" not in name]


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    """Their temporary files and folders, but not those that a living process still writes."""
    import fcntl

    source = write(tmp_path / "a.jsonl", numbers(30))
    left = [tmp_path / ".out_text_document.bin.abc.tmp", tmp_path / ".out.xyz.tmp", tmp_path / ".out.alive.tmp"]
    left[0].write_bytes(b"tokens")
    for folder in left[1:]:
        folder.mkdir()
        (folder / ".claim").touch()
        (folder / "text.idx").write_bytes(b"x")
    other = tmp_path / ".other_text_document.bin.abc.tmp"
    other.write_bytes(b"of another dataset")
    with open(left[2] / ".claim", "rb+") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        run(tmp_path, "--input", source, "--shuffle")
        assert [path.exists() for path in left] == [False, False, True]
    assert other.exists()
