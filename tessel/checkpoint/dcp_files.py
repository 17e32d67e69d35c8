"""Folders of torch.distributed.checkpoint (DCP): what they hold, and boxes of tensors out of them, memory-mapped.

    .metadata      a pickle: each tensor's whole shape and dtype, the chunks it is cut into, and where each lies
    __R_K.distcp   chunk after chunk, each a file of torch.save of its own

No class of DCP's is reached: what the pickles name becomes records that hold what they were given.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessel.checkpoint import torch_file
from tessel.checkpoint.safe_pickle import Record, load_records
from tessel.checkpoint.stored import Index, Piece, bounds
from tessel.errors import TesselError

METADATA = ".metadata"
_DTYPES = {str(dtype): dtype for dtype in torch_file.STORAGE_KINDS}
# What the .metadata of any version of DCP or Megatron may name, all of it made into records.
_RECORDED = (
    "torch.distributed.checkpoint.",
    "torch.serialization._get_layout",
    "megatron.core.dist_checkpointing.",
    "pathlib.",
)
_METADATA_KNOWN = {**_DTYPES, "torch.Size": tuple, "builtins.set": set, "collections.OrderedDict": dict}
_STORAGES = {f"torch.{kind}": dtype for dtype, kind in torch_file.STORAGE_KINDS.items()}
_CHUNK_KNOWN = {**_STORAGES, "collections.OrderedDict": dict}
_DAMAGE = (
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
)
# Entries that are no tensors hold a few numbers each, or the state of a generator.
_MAX_BYTES_ENTRY = 64 * 2**20
_LOCAL_HEADER_BYTES = 30


class _Pages:
    """Memory maps of a folder's files, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, mmap.mmap] = {}
        self._layouts: dict[bytes, _Layout] = {}

    def of(self, name: str) -> mmap.mmap:
        """All of a file. Private: what were written to it would stay in memory, and nothing is."""
        if name not in self._maps:
            with open(self.folder / name, "rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[name]

    def layout(self, content: bytes, what: str) -> _Layout:
        """What a chunk's pickle says; most chunks have the same."""
        if content not in self._layouts:
            self._layouts[content] = _layout(content, what)
        return self._layouts[content]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_maps": {}, "_layouts": {}}  # another process maps them itself


class _Window(io.RawIOBase):
    """A part of mapped pages, as a file."""

    def __init__(self, pages: mmap.mmap, begin: int, length: int) -> None:
        super().__init__()
        if begin < 0 or length < 0 or begin + length > len(pages):
            raise ValueError("it ends in the middle of a tensor")
        self._pages, self._begin, self._length, self._at = pages, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence], 0)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        begin = self._begin + self._at
        self._at += size
        return self._pages[begin : begin + size]


@dataclass(frozen=True)
class _Layout:
    """How a tensor lies in its storage, all in elements."""

    dtype: torch.dtype
    key: str
    num_elements: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _layout(content: bytes, what: str) -> _Layout:
    """What the pickle of a saved tensor says of it."""
    found = load_records(content, _CHUNK_KNOWN, ("torch._utils._rebuild_tensor_v2",), what)
    if not isinstance(found, Record) or len(found.values) < 4:
        raise ValueError("it holds no tensor")
    (_, dtype, key, _, num_elements), offset, shape, strides = found.values[:4]
    numbers = (num_elements, offset, *shape, *strides)
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(shape) != len(strides):
        raise ValueError("a tensor's shape is no list of sizes")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if dtype not in torch_file.STORAGE_KINDS or (math.prod(shape) and last >= num_elements):
        raise ValueError("a tensor is larger than what is stored of it")
    return _Layout(dtype, str(key), num_elements, offset, tuple(shape), tuple(strides))


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, stored as one file of torch.save inside a larger one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int
    pages: _Pages = field(repr=False)

    @property
    def path(self) -> Path:
        return self.pages.folder / self.file

    def read(self, index: Index | None = None) -> Tensor:
        """The chunk, or the box of it that `index` says.

        Raises:
            TesselError: the file is damaged, or not what the index says.
        """
        box = bounds(index, self.shape)
        if any(low >= high for low, high in box):
            return torch.empty([max(high - low, 0) for low, high in box], dtype=self.dtype)
        try:
            return self._read(box)
        except _DAMAGE as error:
            raise damaged(self.path, f"{self.name}: {error}") from error

    def _read(self, box: Sequence[tuple[int, int]]) -> Tensor:
        pages = self.pages.of(self.file)
        with zipfile.ZipFile(_Window(pages, self.offset, self.length)) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            layout = self.pages.layout(_small(archive, names["data.pkl"]), str(self.path))
            data = archive.getinfo(names[f"data/{layout.key}"])
        if (layout.shape, layout.dtype) != (self.shape, self.dtype):
            raise ValueError(f"it is not the tensor that {METADATA} says")
        itemsize = self.dtype.itemsize
        num_bytes = layout.num_elements * itemsize
        begin = self.offset + data.header_offset
        header = pages[begin : begin + _LOCAL_HEADER_BYTES]
        begin += _LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", header[26:30]))
        if data.compress_type != zipfile.ZIP_STORED or data.file_size != num_bytes:
            raise ValueError("its size is not that of its storage")
        if begin + num_bytes > self.offset + self.length:
            raise ValueError("it ends in the middle of a tensor")
        raw = torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes, offset=begin)
        strides = [stride * itemsize for stride in layout.strides]
        values = raw.as_strided((*self.shape, itemsize), (*strides, 1), layout.offset * itemsize)
        for dim, (low, high) in enumerate(box):
            values = values.narrow(dim, low, high - low)
        if values.data_ptr() % itemsize or not values.is_contiguous():
            # DCP puts no space between chunks: elements may lie at odd addresses.
            values = values.clone(memory_format=torch.contiguous_format)
        return values.view(self.dtype).view([high - low for low, high in box])


def _small(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > 2**20 or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("the pickle of a tensor is too large")
    return archive.read(info)


@dataclass(frozen=True)
class ChunkedTensor:
    """A whole tensor of the folder. `groups`: its chunks by where they begin along the first `depth` dims.

    Along those dims every chunk has size 1, as Megatron's stacked layers and experts have.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    depth: int
    groups: Mapping[tuple[int, ...], Sequence[Piece]] = field(repr=False)

    @property
    def chunks(self) -> Iterator[Piece]:
        """All chunks."""
        return itertools.chain.from_iterable(self.groups.values())

    def read(self, index: Index | None = None) -> Tensor:
        """The tensor, or the box of it that `index` says: of each chunk, what lies in the box is read."""
        box = bounds(index, self.shape)
        starts = itertools.product(*(range(low, high) for low, high in box[: self.depth]))
        pieces = [piece for start in starts for piece in self.groups.get(start, ())]
        found = [(piece, overlap) for piece in pieces if (overlap := piece.overlap(box)) is not None]
        if len(found) == 1 and found[0][1] == box:
            return found[0][0].read(box)
        values = torch.empty([high - low for low, high in box], dtype=self.dtype)
        for piece, overlap in found:
            target = tuple(slice(low - base, high - base) for (low, high), (base, _) in zip(overlap, box, strict=True))
            values[target] = piece.read(overlap)
        return values


@dataclass(frozen=True)
class DcpFolder:
    """What a folder holds: whole tensors, and other entries, each by its name."""

    path: Path
    tensors: Mapping[str, ChunkedTensor]
    others: Mapping[str, Chunk] = field(repr=False)

    def other(self, name: str, max_bytes: int = _MAX_BYTES_ENTRY) -> Any:
        """An entry that is no tensor, through the allow-list of `torch_file`; None where there is none.

        Raises:
            TesselError: it is damaged, or asks for more than a checkpoint may hold.
        """
        entry = self.others.get(name)
        if entry is None:
            return None
        if entry.length > max_bytes:
            raise damaged(entry.path, f"{name} has {entry.length:,} bytes")
        with tempfile.NamedTemporaryFile(prefix=f"{entry.file}.", suffix=".pt") as copy:
            try:
                copy.write(_Window(entry.pages.of(entry.file), entry.offset, entry.length).read())
            except _DAMAGE as error:
                raise damaged(entry.path, f"{name}: {error}") from error
            copy.flush()
            return torch_file.load(Path(copy.name))


def damaged(path: Path, why: object) -> TesselError:
    """The error for a file that cannot be read."""
    reason = (str(why) or type(why).__name__).splitlines()[0][:300]
    return TesselError(f"{path} is damaged ({reason}). Take another copy of the checkpoint.")


def read_folder(folder: Path) -> DcpFolder:
    """The tensors of a DCP folder; of the .distcp files nothing is read yet.

    Raises:
        TesselError: files are missing, the index is damaged, or names a file outside the folder.
    """
    path = folder / METADATA
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TesselError(f"{path} cannot be read ({error.strerror}): it is the index of the .distcp files.") from error
    found = load_records(content, _METADATA_KNOWN, _RECORDED, str(path))
    try:
        return _folder(folder, found)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise damaged(path, error) from error


def _folder(folder: Path, found: Any) -> DcpFolder:
    pages = _Pages(folder)
    places = _places(found.storage_data)
    missing = sorted(name for name in {info.relative_path for info in places.values()} if not (folder / name).is_file())
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise TesselError(
            f"{folder} lacks {', '.join(missing[:10])}{more}, which its {METADATA} names. Copy the whole folder."
        )
    tensors, others = {}, {}
    for name, entry in found.state_dict_metadata.items():
        if hasattr(entry, "chunks"):
            tensors[str(name)] = _tensor(str(name), entry, places, pages)
        elif (name, None) in places:
            info = places[name, None]
            others[str(name)] = Chunk(str(name), torch.uint8, (), info.relative_path, info.offset, info.length, pages)
    return DcpFolder(folder, tensors, others)


def _places(storage_data: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], Any]:
    """Where each chunk lies, by its tensor's name and where it begins."""
    places: dict[tuple[str, tuple[int, ...] | None], Any] = {}
    for index, info in storage_data.items():
        name = info.relative_path
        # A plain name: an index from elsewhere must not make us open files outside its folder.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"{str(name)[:100]!r} is not the name of a file in that folder")
        if not all(isinstance(number, int) and number >= 0 for number in (info.offset, info.length)):
            raise ValueError(f"{index.fqn} lies nowhere")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is compressed, which cannot be read here")
        offset = getattr(index, "offset", None)
        places[index.fqn, None if offset is None else tuple(offset)] = info
    return places


def _tensor(name: str, entry: Any, places: Mapping[Any, Any], pages: _Pages) -> ChunkedTensor:
    dtype, shape = entry.properties.values[0], tuple(entry.size)
    if not isinstance(dtype, torch.dtype) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{name} has no shape or no dtype")
    pieces = []
    for chunk in entry.chunks:
        start, size = tuple(chunk.offsets), tuple(chunk.sizes)
        fits = len(start) == len(size) == len(shape) and all(
            begin >= 0 and length >= 0 and begin + length <= whole
            for begin, length, whole in zip(start, size, shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{name} has a chunk outside of it")
        if math.prod(size) == 0:
            continue
        info = places[name, start]
        source = Chunk(name, dtype, size, info.relative_path, info.offset, info.length, pages)
        pieces.append(Piece(start, size, source, (0,) * len(size)))
    distinct = len({piece.start for piece in pieces}) == len(pieces)
    if not distinct or sum(math.prod(piece.size) for piece in pieces) != math.prod(shape):
        raise ValueError(f"the chunks of {name} do not make up its shape {shape}")
    depth = 0
    while depth < len(shape) and all(piece.size[depth] == 1 for piece in pieces):
        depth += 1
    groups: dict[tuple[int, ...], list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.start[:depth], []).append(piece)
    path = pieces[0].source.path if pieces else pages.folder
    return ChunkedTensor(name, dtype, shape, path, depth, groups)
