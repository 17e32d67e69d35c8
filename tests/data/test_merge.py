"""Datasets merged: the bytes of megatron-core's builder, kinds that do not go together, and what is noted."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tessel import commands
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.data.metadata import read_metadata, write_metadata
from tessel.data.rewrite import copy_all, copy_documents
from tessel.errors import TesselError, UsageError


def write(prefix: Path, seed: int, dtype: str = "<u2", modes: bool = False, num_documents: int = 30) -> Path:
    """Documents of none to three sequences, some of them empty."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, dtype, multimodal=modes) as writer:
        for _ in range(num_documents):
            for _ in range(rng.integers(0, 4)):
                writer.add_item(rng.integers(0, 300, rng.integers(0, 20)), mode=int(rng.integers(0, 2)))
            writer.end_document()
    return prefix


def contents(prefix: Path | str) -> list[list[tuple[list[int], int | None]]]:
    """Tokens and mode of each sequence of each document."""
    dataset = IndexedDataset(prefix)
    modes = dataset.modes
    entries = dataset.document_indices.tolist()
    return [
        [(dataset.get(i).tolist(), None if modes is None else int(modes[i])) for i in range(first, end)]
        for first, end in zip(entries[:-1], entries[1:], strict=True)
    ]


def files(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def merge(*argv: object) -> None:
    commands.merge_datasets([str(word) for word in argv])


@pytest.mark.parametrize("modes", [False, True])
def test_a_folder_is_merged_in_the_order_of_names(
    tmp_path: Path, modes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    names = ["b", "a_10", "a_9", "c"]
    for seed, name in enumerate(names):
        write(tmp_path / "in" / name, seed, modes=modes)
    (tmp_path / "in" / "notes.txt").write_text("not of it")
    merge("--input", tmp_path / "in", "--output-prefix", tmp_path / "out", *(["--multimodal"] if modes else []))
    assert contents(tmp_path / "out") == [one for name in sorted(names) for one in contents(tmp_path / "in" / name)]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.uint16, multimodal=modes)
    for name in sorted(names):
        builder.add_index(str(tmp_path / "in" / name))
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert files(tmp_path / "out") == files(tmp_path / "theirs")
    assert f"merged 4 datasets into {tmp_path}/out.bin and .idx: 120 documents" in capsys.readouterr().out


def test_prefixes_are_merged_as_they_are_named(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write(tmp_path / name, seed)
    merge("--input", tmp_path / "b", tmp_path / "a.idx", tmp_path / "b", "--output-prefix", tmp_path / "new/out")
    b, a = contents(tmp_path / "b"), contents(tmp_path / "a")
    assert contents(tmp_path / "new/out") == b + a + b


@pytest.mark.parametrize("verb", ["merge-datasets", "preprocess"])
def test_groups_by_key(tmp_path: Path, verb: str) -> None:
    """MindSpeed-LLM's --merge-group-keys, of its own tool as well."""
    folder = tmp_path / "in"
    for seed, name in enumerate(["000_packed_input_ids", "001_packed_input_ids", "000_packed_labels", "other"]):
        write(folder / f"{name}_document", seed)
    argv = ["--input", str(folder), "--output-prefix", str(tmp_path / "all"), "--merge-group-keys"]
    commands.VERBS[verb]([*argv, "packed_input_ids_document", "packed_labels_document"])
    ids = [contents(folder / f"{name}_packed_input_ids_document") for name in ("000", "001")]
    assert contents(tmp_path / "all_packed_input_ids_document") == ids[0] + ids[1]
    assert contents(tmp_path / "all_packed_labels_document") == contents(folder / "000_packed_labels_document")
    with pytest.raises(UsageError, match="no dataset .* holds 'images' in its name"):
        commands.VERBS[verb]([*argv, "images"])


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a", 0)
    write(tmp_path / "in" / "b", 1, dtype="<i4")
    argv = ("--input", tmp_path / "in", "--output-prefix", tmp_path / "out")
    with pytest.raises(TesselError, match=r"in/a holds uint16 and .*in/b int32"):
        merge(*argv)
    write(tmp_path / "in" / "b", 1, modes=True)
    with pytest.raises(TesselError, match=r"in/b has a mode for each sequence and .*in/a has none"):
        merge(*argv)
    with pytest.raises(UsageError, match=r"--output-prefix: .* is one of the datasets to merge"):
        merge("--input", tmp_path / "in", "--output-prefix", tmp_path / "in" / "b")
    (tmp_path / "in" / "b.idx").unlink()
    with pytest.raises(TesselError, match=re.escape(f"{tmp_path}/in/b.bin has no .idx beside it: it is not whole")):
        merge(*argv)
    (tmp_path / "in" / "b.bin").unlink()
    with pytest.raises(TesselError, match="--multimodal: .*in/a has no modes"):
        merge(*argv, "--multimodal")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no dataset .* is there"):
        merge("--input", tmp_path / "empty", "--output-prefix", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "in"]


def test_what_is_noted_stays_where_all_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = {"tokenizer": {"identity": "T:1", "eod": 3}, "append_eod": True, "shard": "1/2"}
    for seed, name in enumerate("ab"):
        write(tmp_path / name, seed)
        write_metadata(tmp_path / name, note | {"inputs": [f"{name}.jsonl"], "documents": 30})
    argv = ("--input", tmp_path / "a", tmp_path / "b", "--output-prefix", tmp_path / "out")
    merge(*argv)
    noted = read_metadata(tmp_path / "out")
    assert noted is not None
    assert (noted["tokenizer"], noted["documents"], noted["inputs"]) == (note["tokenizer"], 60, ["a.jsonl", "b.jsonl"])
    assert "shard" not in noted
    write_metadata(tmp_path / "b", note | {"tokenizer": {"identity": "T:2"}})
    merge(*argv)
    assert read_metadata(tmp_path / "out") is None
    assert "made with different tokenizers" in capsys.readouterr().err


def test_any_order_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across the pieces that are held in memory, and from a .bin whose sequences do not follow one another."""
    monkeypatch.setattr("tessel.data.rewrite._CHUNK_DOCUMENTS", 13)
    monkeypatch.setattr("tessel.data.rewrite._CHUNK_TOKENS", 40)
    source = IndexedDataset(write(tmp_path / "a", 0, modes=True, num_documents=100))
    documents = contents(tmp_path / "a")
    order = np.random.default_rng(1).integers(0, 100, 250)
    with IndexedDatasetWriter(tmp_path / "b", source.dtype, multimodal=True) as writer:
        copy_documents(source, order, writer)
        copy_all(source, writer)
        copy_documents(source, order[:0], writer)
    assert contents(tmp_path / "b") == [documents[i] for i in order] + documents
    reversed_pointers = IndexedDataset(tmp_path / "a")
    reversed_pointers.pointers = source.pointers[::-1].copy()
    reversed_pointers.lengths = source.lengths[::-1].copy()
    with IndexedDatasetWriter(tmp_path / "c", source.dtype, multimodal=True) as writer:
        copy_all(reversed_pointers, writer)
    sequences = [tokens for document in documents for tokens, _ in document]
    assert [tokens for document in contents(tmp_path / "c") for tokens, _ in document] == sequences[::-1]


def test_an_empty_dataset_is_of_any_kind(tmp_path: Path) -> None:
    write(tmp_path / "a", 0, modes=True)
    with IndexedDatasetWriter(tmp_path / "none", "<u2"):
        pass
    merge("--input", tmp_path / "none", tmp_path / "a", tmp_path / "none", "--output-prefix", tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "a")
