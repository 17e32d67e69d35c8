"""Damaged .bin/.idx pairs: whatever the bytes, an error in words or a correct read; and megatron-core's writer."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel.data.indexed import DTYPES, HEADER_BYTES, IndexedDataset, IndexedDatasetWriter
from tessel.errors import TesselError


def write(prefix: Path, rng: np.random.Generator) -> None:
    """A few documents of a few sequences, some of them empty, in a random type."""
    dtype = DTYPES[int(rng.integers(1, 9))]
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for _ in range(int(rng.integers(0, 6))):
            lengths = rng.integers(0, 5, int(rng.integers(0, 3)))
            writer.add_document(rng.integers(0, 100, int(lengths.sum())), lengths.tolist())


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one damage: cut, grown, zeroed, flipped, or a number of the header or index set to an odd one."""
    data = bytearray(content)
    kind = int(rng.integers(0, 6))
    at = int(rng.integers(0, max(len(data), 1)))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        return bytes(data[:at] + rng.bytes(int(rng.integers(1, 20))) + data[at:])
    if kind == 2 and data:
        data[at] ^= 1 << int(rng.integers(0, 8))
    elif kind == 3:
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    elif kind == 4 and len(data) > HEADER_BYTES:
        odd = rng.choice(np.array([-1, 0, 1, 255, 2**31 - 1, 2**31, 2**62, -(2**63), 2**63 - 1]))
        at = int(rng.choice([9, 18, 26])) if rng.random() < 0.5 else int(rng.integers(HEADER_BYTES, len(data)))
        packed = struct.pack("<q", int(odd))
        data[at : at + 8] = packed[: len(data[at : at + 8])]
    elif data:
        data[at:] = rng.bytes(len(data) - at)
    return bytes(data)


def is_consistent(indexed: IndexedDataset) -> bool:
    """Every sequence and every document can be read, and is as long as the index says."""
    for number in range(len(indexed)):
        tokens = indexed.get(number)
        if len(tokens) != indexed.lengths[number]:
            return False
    entries = indexed.document_indices
    return len(entries) == 0 or (
        entries[0] == 0 and entries[-1] == len(indexed) and bool((np.diff(entries) >= 0).all())
    )


def fuzz(folder: Path, seeds: range) -> tuple[int, int]:
    """How many damaged pairs were refused and how many were read."""
    refused = read = 0
    prefix = folder / "data"
    for seed in seeds:
        rng = np.random.default_rng(seed)
        write(prefix, rng)
        path = Path(f"{prefix}.{'bin' if rng.random() < 0.25 else 'idx'}")
        path.write_bytes(mutated(path.read_bytes(), rng))
        try:
            assert is_consistent(IndexedDataset(prefix)), seed
            read += 1
        except TesselError as error:
            assert str(prefix) in str(error)
            assert len(str(error)) > 40
            refused += 1
    return refused, read


def test_damaged_pairs(tmp_path: Path) -> None:
    refused, read = fuzz(tmp_path, range(150))
    assert refused > 60
    assert read > 5


@pytest.mark.slow
def test_many_damaged_pairs(tmp_path: Path) -> None:
    refused, read = fuzz(tmp_path, range(1000, 3000))
    assert refused > 800
    assert read > 80


def random_documents(rng: np.random.Generator, dtype: np.dtype[Any]) -> list[tuple[np.ndarray, list[int]]]:
    """Documents as (tokens, lengths of their sequences), with empty ones of both kinds among them."""
    limits = np.iinfo(dtype) if dtype.kind in "iu" else np.iinfo(np.int16)
    documents = []
    for _ in range(int(rng.integers(0, 20))):
        lengths = rng.integers(0, 12, int(rng.integers(0, 4))).tolist()
        tokens = rng.integers(limits.min, limits.max, sum(lengths), endpoint=True, dtype=np.int64)
        documents.append((tokens.astype(dtype), lengths))
    return documents


@pytest.mark.parametrize("seed", range(24))
def test_megatron_core_writes_and_reads_the_same(tmp_path: Path, seed: int) -> None:
    """Both writers give the same bytes for documents, items, merges and modes, and each reads the other's."""
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    dtype = DTYPES[seed % 8 + 1]
    documents = random_documents(rng, dtype)
    native = dtype.newbyteorder("=").type
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=native)
    by_item = bool(seed % 2) and dtype.kind in "i"  # torch has no unsigned types to hold items in
    with IndexedDatasetWriter(tmp_path / "ours", dtype) as writer:
        for tokens, lengths in documents:
            writer.add_document(tokens, lengths)
            if by_item:
                for piece in np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else []:
                    builder.add_item(torch.from_numpy(piece.copy()))
                builder.end_document()
            else:
                builder.add_document(torch.from_numpy(tokens.astype(np.int64)), lengths)
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    sequences = [piece for tokens, lengths in documents for piece in np.split(tokens, np.cumsum(lengths))[:-1]]
    read = IndexedDataset(tmp_path / "theirs")
    assert read.dtype == dtype
    assert [read.get(i).tolist() for i in range(len(read))] == [piece.tolist() for piece in sequences]
    assert np.diff(read.document_indices).tolist() == [len(lengths) for _, lengths in documents]
    if read.total_tokens:  # an empty .bin cannot be mapped there
        other = theirs.IndexedDataset(str(tmp_path / "ours"))
        assert [other[i].tolist() for i in range(len(other))] == [piece.tolist() for piece in sequences]
        assert other.document_indices.tolist() == read.document_indices.tolist()


def test_modes_of_megatron_core(tmp_path: Path) -> None:
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    torch = pytest.importorskip("torch")
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.int32, multimodal=True)
    builder.add_document(torch.tensor([1, 2, 3]), [2, 1], [0, 1])
    builder.finalize(str(tmp_path / "data.idx"))
    read = IndexedDataset(tmp_path / "data")
    assert read.modes is not None
    assert read.modes.tolist() == [0, 1]
    assert [read.get(i).tolist() for i in range(2)] == [[1, 2], [3]]
