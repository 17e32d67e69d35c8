"""Writing folders of torch.distributed.checkpoint as a stream: where each byte goes is known before any is read.

A .distcp file is a row of chunks, each a file of torch.save: a zip archive with a pickle, and the elements. The
archive is put together here, since its length must be known for the index, and its elements come in blocks.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tessel.checkpoint.stored import PlannedFile, StoredTensor, blocks, bytes_of
from tessel.checkpoint.torch_file import Deferred, pickled
from tessel.runtime.stream import Stream

_ALIGNMENT = 64
_LARGE = 2**32 - 1
_HAS_DESCRIPTOR = 8  # the flag of an entry whose checksum and sizes stand behind it
_DOS_EPOCH = 0x21  # 1980-01-01, the earliest date of a zip archive


@dataclass(frozen=True)
class Part:
    """A box of the tensor `key` of a checkpoint, which begins at `start` of the whole one of `shape`.

    `alias`: another key under which a reader finds the same bytes.
    """

    key: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    values: StoredTensor
    alias: str | None = None


@dataclass(frozen=True)
class Other:
    """An entry that is no tensor, as torch.save writes it."""

    key: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class _Placed:
    item: Part | Other
    offset: int
    length: int


@dataclass(frozen=True)
class DcpPlan:
    """The files of a folder, and its index."""

    files: tuple[PlannedFile, ...]
    metadata: bytes = field(repr=False)


def plan_folder(files: dict[str, Sequence[Part | Other]]) -> DcpPlan:
    """The plan of a folder whose .distcp files, by name, hold these items in this order."""
    index = Metadata(state_dict_metadata={}, storage_data={})
    planned = []
    for name, items in files.items():
        placed, offset = [], 0
        for item in items:
            length = len(item.content) if isinstance(item, Other) else _Archive.of(item.values).length
            placed.append(_Placed(item, offset, length))
            _note(index, item, _StorageInfo(name, offset, length))
            if isinstance(item, Part) and item.alias is not None:
                _note(index, replace(item, key=item.alias), _StorageInfo(name, offset, length))
            # Elements then lie at addresses that they can be used at where they are mapped.
            offset += -(-length // _ALIGNMENT) * _ALIGNMENT
        tensors = {f"{item.key} {list(item.start)}": item.values for item in items if isinstance(item, Part)}
        planned.append(PlannedFile(name, tensors, functools.partial(_write_file, tuple(placed))))
    return DcpPlan(tuple(planned), pickle.dumps(index))


def _note(index: Metadata, item: Part | Other, info: _StorageInfo) -> None:
    entries = index.state_dict_metadata
    if isinstance(item, Other):
        entries[item.key] = BytesStorageMetadata()
        index.storage_data[MetadataIndex(item.key)] = info
        return
    size = torch.Size(item.values.shape)
    entry = entries.get(item.key)
    if entry is None:
        properties = TensorProperties(dtype=item.values.dtype)
        entry = entries[item.key] = TensorStorageMetadata(properties, torch.Size(item.shape), [])
    assert isinstance(entry, TensorStorageMetadata)
    index.storage_data[MetadataIndex(item.key, torch.Size(item.start), len(entry.chunks))] = info
    entry.chunks.append(ChunkStorageMetadata(torch.Size(item.start), size))


def _write_file(placed: Sequence[_Placed], path: Path) -> str:
    with Stream(path) as file:
        for where in placed:
            file.write(bytes(where.offset - file.tell()))
            if isinstance(where.item, Other):
                file.write(where.item.content)
            else:
                _Archive.of(where.item.values).write(file, where.item.values)
            assert file.tell() == where.offset + where.length
    return file.digest()


def other(key: str, content: object) -> Other:
    """An entry with anything that torch.save takes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return Other(key, buffer.getvalue())


@dataclass(frozen=True)
class _Member:
    """A file in the archive, nothing compressed. `at`: where its local header begins."""

    name: bytes
    at: int
    num_bytes: int
    num_padding: int

    @property
    def is_large(self) -> bool:
        return self.num_bytes >= _LARGE

    def local(self) -> bytes:
        """The header in front of its bytes; the padding brings these to a multiple of 64."""
        extra = _zip64(0, 0) if self.is_large else b""
        extra += struct.pack("<2sH", b"FB", self.num_padding) + b"Z" * self.num_padding
        return b"PK\3\4" + self._middle(0, _LARGE if self.is_large else 0, len(extra)) + self.name + extra

    def descriptor(self, crc: int) -> bytes:
        """What follows its bytes, since the header was written before they were read."""
        return b"PK\7\10" + struct.pack("<IQQ" if self.is_large else "<III", crc, self.num_bytes, self.num_bytes)

    def central(self, crc: int) -> bytes:
        """Its entry in the archive's directory."""
        extra = _zip64(self.num_bytes, self.num_bytes) if self.is_large else b""
        middle = self._middle(crc, min(self.num_bytes, _LARGE), len(extra)) + struct.pack("<HHHII", 0, 0, 0, 0, self.at)
        return b"PK\1\2" + struct.pack("<H", 45) + middle + self.name + extra

    def _middle(self, crc: int, shown: int, num_extra: int) -> bytes:
        numbers = (crc, shown, shown, len(self.name), num_extra)
        return struct.pack("<HHHHHIIIHH", 45, _HAS_DESCRIPTOR, 0, 0, _DOS_EPOCH, *numbers)


def _zip64(*numbers: int) -> bytes:
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


class _Archive:
    """What torch.save writes for a tensor of this dtype and shape; the elements come last."""

    def __init__(self, pickle_bytes: bytes, num_bytes: int) -> None:
        self._small = {b"data.pkl": pickle_bytes, b"byteorder": b"little", b"version": b"3\n"}
        self._members: list[_Member] = []
        at = 0
        for name, size in [*((name, len(content)) for name, content in self._small.items()), (b"data/0", num_bytes)]:
            unpadded = _Member(b"archive/" + name, at, size, 0)
            begin = at + len(unpadded.local())
            self._members.append(_Member(unpadded.name, at, size, -begin % _ALIGNMENT))
            at = begin + -begin % _ALIGNMENT + size + len(unpadded.descriptor(0))
        self._end_of_data = at
        self.length = at + len(self._directory([0] * len(self._members)))

    @classmethod
    def of(cls, tensor: StoredTensor) -> _Archive:
        """The archive of a tensor; many tensors have the same."""
        return _archive(tensor.dtype, tensor.shape)

    def write(self, file: Stream, tensor: StoredTensor) -> None:
        """Write it at the file's position; memory: one block."""
        crcs = []
        contents: list[Iterable[bytes | memoryview]] = [[content] for content in self._small.values()]
        for member, content in zip(self._members, [*contents, map(bytes_of, blocks(tensor))], strict=True):
            file.write(member.local())
            crc = 0
            for part in content:
                crc = zlib.crc32(part, crc)
                file.write(part)
            file.write(member.descriptor(crc))
            crcs.append(crc)
        file.write(self._directory(crcs))

    def _directory(self, crcs: Sequence[int]) -> bytes:
        entries = b"".join(member.central(crc) for member, crc in zip(self._members, crcs, strict=True))
        count, at = len(self._members), self._end_of_data
        end = b""
        if at >= _LARGE:
            end = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(entries), at)
            end += b"PK\6\7" + struct.pack("<IQI", 0, at + len(entries), 1)
        shown = min(at, _LARGE)
        return entries + end + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(entries), shown, 0)


@functools.lru_cache(maxsize=256)
def _archive(dtype: torch.dtype, shape: tuple[int, ...]) -> _Archive:
    content, _ = pickled(Deferred(_Empty(dtype, shape)))
    return _Archive(content, math.prod(shape) * dtype.itemsize)


@dataclass(frozen=True)
class _Empty:
    """A tensor of which only the form is asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str = ""
    path: Path = Path()

    def read(self, index: object = None) -> torch.Tensor:
        raise NotImplementedError
