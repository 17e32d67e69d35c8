from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tessel.data.indexed import DTYPES, HEADER_BYTES, IndexedDataset, IndexedDatasetWriter, optimal_dtype, strip_suffix
from tessel.errors import TesselError
from tessel.runtime.log import warn_once

from .datasets import write_random


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_written_data_is_read_back(tmp_path: Path, code: int) -> None:
    documents = [[1, 2, 3], [], [4], [5, 6]]
    with IndexedDatasetWriter(tmp_path / "data", DTYPES[code]) as writer:
        for document in documents:
            writer.add_document(document)
    dataset = IndexedDataset(tmp_path / "data")
    assert dataset.dtype == DTYPES[code]
    assert [dataset.get(i).tolist() for i in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.total_tokens == 6


def test_index_is_laid_out_as_the_format_says(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([1, 2, 300])
        writer.add_document([4, 5, 6], lengths=[1, 2])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 3)
    expected += struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<3q", 0, 1, 3)
    assert (tmp_path / "data.idx").read_bytes() == expected
    assert (tmp_path / "data.bin").read_bytes() == struct.pack("<6H", 1, 2, 300, 4, 5, 6)


def test_the_ways_of_adding_documents_agree(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [], [4, 5]]
    with IndexedDatasetWriter(tmp_path / "one", np.int32) as writer:
        for document in documents:
            writer.add_document(document)
        assert writer.num_tokens == 5
    with IndexedDatasetWriter(tmp_path / "many", np.int32) as writer:
        writer.add_documents(np.array([1, 2, 3, 4, 5]), np.array([3, 0, 2]))
    with IndexedDatasetWriter(tmp_path / "items", np.int32) as writer:
        for document in documents:
            writer.add_item(document)
            writer.end_document()
    for suffix in ("bin", "idx"):
        contents = {(tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "many", "items")}
        assert len(contents) == 1


def test_part_of_a_sequence(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.int32) as writer:
        writer.add_document([9])
        writer.add_document([1, 2, 3, 4])
    dataset = IndexedDataset(tmp_path / "data")
    assert dataset.get(1, 1, 2).tolist() == [2, 3]
    assert dataset.get(1, offset=3).tolist() == [4]
    with pytest.raises(TesselError, match="tokens 3 to 5 of sequence 1"):
        dataset.get(1, 3, 2)


def test_modes_are_known_by_the_file_size(tmp_path: Path) -> None:
    prefix = write_random(tmp_path / "data", [3, 4])
    with open(f"{prefix}.idx", "ab") as file:
        file.write(b"\x01\x00")
    modes = IndexedDataset(prefix).modes
    assert modes is not None
    assert modes.tolist() == [1, 0]


def test_empty_dataset(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.uint16):
        pass
    dataset = IndexedDataset(tmp_path / "data")
    assert len(dataset) == 0
    assert dataset.total_tokens == 0


@pytest.mark.parametrize(("vocab_size", "name"), [(None, "int32"), (65499, "uint16"), (65500, "int32")])
def test_width_follows_the_vocabulary(vocab_size: int | None, name: str) -> None:
    assert optimal_dtype(vocab_size).name == name


def test_suffix_is_accepted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warn_once.cache_clear()
    prefix = write_random(tmp_path / "data", [3])
    for suffix in (".bin", ".idx"):
        assert IndexedDataset(prefix + suffix).prefix == prefix
        assert IndexedDataset(prefix + suffix).prefix == prefix
        assert capsys.readouterr().err.count("without " + suffix) == 1
    write_random(tmp_path / "x.bin", [2])
    assert strip_suffix(str(tmp_path / "x.bin")) == str(tmp_path / "x.bin")


def _cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def _put(path: Path, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(bytes(whole))


# Two sequences: lengths at 34, pointers at 42, documents at 58.
DAMAGES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "magic": (lambda idx, bin_: _put(idx, 0, b"PK"), "not an index"),
    "empty": (lambda idx, bin_: idx.write_bytes(b"") and None, "not an index"),
    "header": (lambda idx, bin_: _cut(idx, HEADER_BYTES - 3), "truncated"),
    "version": (lambda idx, bin_: _put(idx, 9, b"\x02"), "version 2"),
    "dtype": (lambda idx, bin_: _put(idx, 17, b"\x09"), "code 9"),
    "truncated": (lambda idx, bin_: _cut(idx, idx.stat().st_size - 1), "is truncated"),
    "huge count": (lambda idx, bin_: _put(idx, 18, b"\xff" * 8), "is truncated"),
    "surplus": (lambda idx, bin_: idx.write_bytes(idx.read_bytes() + b"123") and None, "is damaged"),
    "length": (lambda idx, bin_: _put(idx, 34, struct.pack("<i", -1)), "sequence 0"),
    "pointer": (lambda idx, bin_: _put(idx, 50, struct.pack("<q", 1 << 40)), "sequence 1"),
    "negative pointer": (lambda idx, bin_: _put(idx, 50, struct.pack("<q", -8)), "sequence 1"),
    "short bin": (lambda idx, bin_: _cut(bin_, 10), "sequence 1 .* lies outside"),
    "empty bin": (lambda idx, bin_: _cut(bin_, 0), "lies outside"),
    "last document": (lambda idx, bin_: _put(idx, 74, struct.pack("<q", 1)), "document index"),
    "first document": (lambda idx, bin_: _put(idx, 58, struct.pack("<q", 1)), "document index"),
    "order": (lambda idx, bin_: _put(idx, 66, struct.pack("<q", 9)), "document index"),
}


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    prefix = write_random(tmp_path / "data", [3, 4])
    damage, message = DAMAGES[name]
    damage(Path(f"{prefix}.idx"), Path(f"{prefix}.bin"))
    with pytest.raises(TesselError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file_names_its_neighbours(tmp_path: Path, suffix: str) -> None:
    prefix = write_random(tmp_path / "wiki_text_document", [3])
    Path(f"{prefix}.{suffix}").unlink()
    with pytest.raises(TesselError, match="wiki_text_document"):
        IndexedDataset(prefix)
    with pytest.raises(TesselError, match=r"holds .*wiki_text_document"):
        IndexedDataset(tmp_path / "wiki_text_documnet")


@pytest.mark.parametrize("bad", [70000, -1])
def test_a_token_that_does_not_fit_is_refused(tmp_path: Path, bad: int) -> None:
    writer = IndexedDatasetWriter(tmp_path / "data", np.uint16)
    with pytest.raises(TesselError, match=f"token id {bad} does not fit uint16"), writer:
        writer.add_document([1, bad])
    assert list(tmp_path.iterdir()) == []


def test_nothing_appears_before_the_end(tmp_path: Path) -> None:
    prefix = write_random(tmp_path / "data", [3], seed=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError), IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2])
        raise ZeroDivisionError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
