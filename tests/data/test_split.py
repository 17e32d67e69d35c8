"""`tessel split`: every document in one part, in order or drawn, and instructions cut alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tessel import commands
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.errors import TesselError, UsageError


def write(prefix: Path, num_documents: int = 40) -> Path:
    """Document i holds i, some of them nothing."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for i in range(num_documents):
            writer.add_documents(*(np.array(x, np.int32) for x in (([i] * 3, [1, 2], [2]) if i % 5 else ([], [], [0]))))
    return prefix


def documents(prefix: Path | str) -> list[int]:
    """The number in each document; -1 for an empty one."""
    dataset = IndexedDataset(prefix)
    entries = dataset.document_indices
    return [
        int(dataset.get(int(entries[i]))[0]) if entries[i] < entries[i + 1] else -1 for i in range(len(entries) - 1)
    ]


def split(*argv: object) -> None:
    commands.split([str(word) for word in argv])


def test_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = documents(write(tmp_path / "d"))
    split(tmp_path / "d", "--split", "90,5,5")
    parts = [documents(tmp_path / f"d_{name}") for name in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [36, 2, 2]
    assert parts[0] + parts[1] + parts[2] == whole
    assert f"wrote {tmp_path}/d_train.bin and .idx: 36 documents" in capsys.readouterr().out


def test_drawn(tmp_path: Path) -> None:
    write(tmp_path / "d")
    for output, seed in (("x", 1), ("y", 1), ("z", 2)):
        split(tmp_path / "d.idx", "--split", "50,50", "--seed", seed, "--output-prefix", tmp_path / output)
    x, y, z = (documents(tmp_path / f"{output}_train") for output in "xyz")
    assert x == y != z
    assert x != documents(tmp_path / "d")[:20]
    numbers = [number for number in x + documents(tmp_path / "x_valid") if number >= 0]
    assert sorted(numbers) == [i for i in range(40) if i % 5]
    assert [n for n in x if n >= 0] == sorted(n for n in x if n >= 0), "a part keeps the order of the data"


def test_many_parts_and_none(tmp_path: Path) -> None:
    write(tmp_path / "d")
    split(tmp_path / "d", "--split", "1,1,0,2")
    assert [len(documents(tmp_path / f"d_{i}")) for i in (1, 2, 4)] == [10, 10, 20]
    assert not (tmp_path / "d_3.idx").exists()


def test_instructions_are_cut_alike(tmp_path: Path) -> None:
    for field in ("input_ids", "labels"):
        write(tmp_path / f"d_packed_{field}_document")
    split(tmp_path / "d", "--split", "3,1", "--seed", 5)
    for part, number in (("train", 30), ("valid", 10)):
        ids = documents(tmp_path / f"d_{part}_packed_input_ids_document")
        assert ids == documents(tmp_path / f"d_{part}_packed_labels_document")
        assert len(ids) == number


@pytest.mark.parametrize("shares", ["100", "a,b", "-1,2", "0,0", "1,,2", ""])
def test_shares_that_are_none(tmp_path: Path, shares: str) -> None:
    write(tmp_path / "d")
    with pytest.raises(UsageError, match="--split is "):
        split(tmp_path / "d", f"--split={shares}")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d")
    with pytest.raises(TesselError, match=r"--split 1000,1 leaves no document for valid: .* has 40"):
        split(tmp_path / "d", "--split", "1000,1", "--output-prefix", tmp_path / "new/x")
    assert not (tmp_path / "new").exists()
    with pytest.raises(TesselError, match="does not exist"):
        split(tmp_path / "no", "--split", "1,1")
