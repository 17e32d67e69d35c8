"""`tessel preprocess` writes Megatron's bytes, whatever the number of workers, and whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel.config.preprocess import PreprocessConfig
from tessel.config.tokenizer import Tokenizer as Section
from tessel.data.indexed import IndexedDataset
from tessel.data.metadata import metadata_path, read_metadata
from tessel.data.preprocess import preprocess, preprocess_files
from tessel.data.readers import Block
from tessel.data.tokenizer import HuggingFaceTokenizer, NullTokenizer, Tokenizer
from tessel.data.workers import encode_blocks
from tessel.errors import TesselError, UsageError

Rows = Sequence[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tiny_tokenizer_folder)


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def random_rows(num_rows: int) -> list[dict[str, Any]]:
    """Texts, lists of sentences and empty ones of both."""
    rng = np.random.default_rng(5)
    words = "the quick brown fox \u4f60\u597d <|endoftext|> jumps \n over".split(" ")

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(0, 30)))

    return [
        {"text": [text() for _ in range(rng.integers(0, 4))] if rng.random() < 0.3 else text(), "other": text()}
        for _ in range(num_rows)
    ]


def files_of(folder: Path, prefix: str) -> dict[str, bytes]:
    return {path.name.removeprefix(prefix): path.read_bytes() for path in folder.glob(f"{prefix}*.*")}


@pytest.mark.parametrize("append_eod", [False, True])
def test_bytes_are_those_of_megatrons_builder(
    tokenizer: HuggingFaceTokenizer, tmp_path: Path, append_eod: bool
) -> None:
    """The loop of Megatron-LM's tools/preprocess_data.py, on transformers and megatron-core's own classes."""
    transformers = pytest.importorskip("transformers")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.source)
    rows = random_rows(120)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), megatron.DType.optimal_dtype(len(theirs)))
    for row in rows:
        sentences = row["text"] if isinstance(row["text"], list) else [row["text"]]
        sequences = [ids for ids in (list(theirs(sentence).input_ids) for sentence in sentences) if ids]
        if sequences and append_eod:
            sequences[-1].append(theirs.eos_token_id)
        builder.add_document(np.array(sum(sequences, [])), [len(ids) for ids in sequences])
    builder.finalize(str(tmp_path / "theirs.idx"))

    source = write_rows(tmp_path / "a.jsonl", rows)
    (written,) = preprocess_files([source], tmp_path / "ours", tokenizer, ["text"], append_eod=append_eod)
    assert Path(f"{written.prefix}.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert Path(f"{written.prefix}.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    read = megatron.IndexedDataset(written.prefix)
    assert (len(read), len(read.document_indices) - 1) == (written.num_sequences, 120)
    assert written.num_tokens == sum(len(read[i]) for i in range(len(read)))
    assert tokenizer.decode(read[0].tolist()).startswith(rows[0]["text"][:5])


def test_workers_change_no_byte(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    # Larger than the blocks that are handed out, in two files.
    rows = random_rows(4_000)
    sources = [write_rows(tmp_path / f"{i}.jsonl", rows * (4 - i)) for i in range(2)]
    assert sum(source.stat().st_size for source in sources) > 6 << 19
    for num_workers in (1, 3):
        preprocess_files(
            sources,
            tmp_path / f"w{num_workers}",
            tokenizer,
            ["text", "other"],
            append_eod=True,
            num_workers=num_workers,
        )
    one, three = files_of(tmp_path, "w1"), files_of(tmp_path, "w3")
    assert sorted(one) == [f"_{key}_document.{end}" for key in ("other", "text") for end in ("bin", "idx", "meta.json")]
    assert one == three
    assert IndexedDataset(tmp_path / "w1_other_document").num_documents == 28_000


def test_lines_of_txt_are_documents(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("the quick\n\nbrown fox\n")
    (written,) = preprocess_files([source], tmp_path / "out", tokenizer, ["text"], append_eod=True)
    assert written == (str(tmp_path / "out_text_document"), 2, 2, written.num_tokens)
    dataset = IndexedDataset(written.prefix)
    texts = [tokenizer.decode(dataset.get(i).tolist()) for i in range(2)]
    assert texts == ["the quick<|endoftext|>", "brown fox<|endoftext|>"]


def test_empty_documents_keep_their_entry(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": "fox"}, {"text": []}, {"text": ["", "a", ""]}]
    (written,) = preprocess_files(
        [write_rows(tmp_path / "a.jsonl", rows)], tmp_path / "out", tokenizer, ["text"], append_eod=True
    )
    dataset = IndexedDataset(written.prefix)
    assert dataset.document_indices.tolist() == [0, 0, 1, 1, 2]
    assert [dataset.get(i)[-1] for i in range(2)] == [tokenizer.eod] * 2
    assert dataset.get(1).tolist() == [*tokenizer.encode("a"), tokenizer.eod]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_498, "uint16"), (65_499, "int32")])
def test_type_of_tokens_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    """NullTokenizer's vocabulary is one larger, and u16 is for those under 65,500."""
    source = tmp_path / "a.txt"
    source.write_text("0 5 65498\n" if vocab_size == 65_498 else "0 5 65499\n")
    (written,) = preprocess_files([source], tmp_path / "out", NullTokenizer(vocab_size), ["text"], append_eod=False)
    dataset = IndexedDataset(written.prefix)
    assert dataset.dtype.name == dtype
    assert dataset.get(0).tolist() == [0, 5, vocab_size]


def test_metadata_lies_beside_and_is_not_needed(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": "fox"}])
    (written,) = preprocess_files([source], tmp_path / "out", tokenizer, ["text"], append_eod=True)
    metadata = read_metadata(written.prefix)
    assert metadata is not None
    assert metadata["tokenizer"]["identity"] == tokenizer.identity
    assert metadata["tokenizer"]["vocab_size"] == 307
    assert (metadata["documents"], metadata["sequences"], metadata["append_eod"]) == (1, 1, True)
    metadata_path(written.prefix).write_text("{")
    assert read_metadata(written.prefix) is None
    metadata_path(written.prefix).unlink()
    assert read_metadata(written.prefix) is None
    assert len(IndexedDataset(written.prefix)) == 1


def test_the_verb_says_what_it_wrote(
    tiny_tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "the fox"}] * 3)
    cfg = PreprocessConfig(
        input=(str(tmp_path / "a.jsonl"),),
        output_prefix=str(tmp_path / "new/folder/out"),
        append_eod=True,
        tokenizer=Section(tokenizer_name_or_path=str(tiny_tokenizer_folder)),
    )
    before = signal.getsignal(signal.SIGTERM)
    preprocess(cfg)
    assert signal.getsignal(signal.SIGTERM) is before
    out = capsys.readouterr().out
    assert f"wrote {tmp_path}/new/folder/out_text_document.bin and .idx: 3 documents" in out
    assert "documents/s" in out and "tokens/s" in out


def assert_nothing_written(folder: Path, *inputs: Path) -> None:
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(inputs)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("last", "message"),
    [(b'{"text": 5}\n', "line 20001: 'text' is a number"), (b'{"text": "\xff"}\n', "line 20001: not UTF-8")],
)
def test_a_bad_line_leaves_nothing_behind(
    tokenizer: HuggingFaceTokenizer, tmp_path: Path, num_workers: int, last: bytes, message: str
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "the quick brown fox jumps over"}\n' * 20_000 + last)
    with pytest.raises(TesselError, match=message):
        preprocess_files([source], tmp_path / "out", tokenizer, ["text"], append_eod=True, num_workers=num_workers)
    assert_nothing_written(tmp_path, source)


def test_a_word_that_is_no_id_is_named(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("1 2\n3 4\n5 six\n")
    with pytest.raises(TesselError, match=r"a.txt, line 3: NullTokenizer: 'six' is not an id from 0 to 9"):
        preprocess_files([source], tmp_path / "out", NullTokenizer(9), ["text"], append_eod=False)
    assert_nothing_written(tmp_path, source)


def test_an_error_keeps_what_was_there(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": "fox"}])
    preprocess_files([source], tmp_path / "out", tokenizer, ["text"], append_eod=True)
    before = files_of(tmp_path, "out")
    write_rows(source, [{"text": "other"}, {"txt": "fox"}])
    with pytest.raises(TesselError, match="no key 'text'"):
        preprocess_files([source], tmp_path / "out", tokenizer, ["text"], append_eod=True)
    assert files_of(tmp_path, "out") == before


def test_what_cannot_be_is_refused(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": "fox"}])
    blank = tmp_path / "blank.txt"
    blank.write_text("\n\n")
    without_eod, outside = NullTokenizer(9), NullTokenizer(9, Section(eod_id=70_000))
    without_eod.eod = None

    def run(path: Path = source, by: Tokenizer = tokenizer, num_workers: int = 1) -> None:
        preprocess_files([path], tmp_path / "out", by, ["text"], append_eod=True, num_workers=num_workers)

    with pytest.raises(UsageError, match="--workers 0"):
        run(num_workers=0)
    with pytest.raises(
        UsageError, match="has no end-of-sequence token to end documents with; give its id with --eod-id"
    ):
        run(by=without_eod)
    with pytest.raises(UsageError, match="--eod-id 70000: the tokenizer's ids are 0 to 9"):
        run(by=outside)
    with pytest.raises(TesselError, match="blank.txt holds no document"):
        run(blank)
    with pytest.raises(TesselError, match="--output-prefix: the folder .*blank.txt cannot be made or written to"):
        preprocess_files([source], blank / "out", tokenizer, ["text"], append_eod=True)
    assert_nothing_written(tmp_path, source, blank)


def end_process(block: Block) -> None:
    os._exit(7)


def test_a_dead_worker_is_an_error() -> None:
    blocks = [Block("a.txt", 1 + i, b"x\n") for i in range(9)]
    with pytest.raises(TesselError, match=r"A worker process ended with exit code 7 while encoding a.txt near line 1"):
        list(encode_blocks(blocks, end_process, 2))


def processes_with(mark: str) -> list[int]:
    """Processes whose environment holds `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes() and (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until(condition: Any, what: str, limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} took more than {limit_s} s"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle(
    tokenizer: HuggingFaceTokenizer, repository: Path, tmp_path: Path, by: signal.Signals
) -> None:
    """No .idx, no process left; SIGTERM leaves no temporary file either; a rerun gives the right bytes."""
    source = write_rows(tmp_path / "a.jsonl", [{"text": "the quick brown fox jumps over the lazy dog " * 60}] * 1_500)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tessel", "preprocess", "--input", str(source), "--output-prefix", str(out / "p")]
    command += ["--workers", "2", "--append-eod", "--tokenizer-name-or-path", str(tokenizer.source)]
    mark = f"TESSEL_TEST_MARK={tmp_path}"
    environment = os.environ | {"PYTHONPATH": str(repository), "TESSEL_TEST_MARK": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or any(p.stat().st_size for p in out.glob(".p*")), "the start")
        assert process.poll() is None, "it ended before it could be killed"
        assert len(processes_with(mark)) > 2
        process.send_signal(by)
        process.wait(30)
        wait_until(lambda: not processes_with(mark), "the end of the workers", 30)
    finally:
        process.kill()
        process.wait()
    visible = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    assert visible == []
    if by == signal.SIGTERM:
        assert list(out.iterdir()) == []
        assert process.returncode == 128 + signal.SIGTERM
        return
    (again,) = preprocess_files([source], out / "p", tokenizer, ["text"], append_eod=True)
    assert again.num_documents == len(IndexedDataset(out / "p_text_document")) == 1_500
