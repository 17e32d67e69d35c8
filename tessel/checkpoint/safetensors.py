"""The safetensors file: a JSON header, then the tensors' bytes. Read by memory map, written as a stream.

    u64 little endian: header length | header, UTF-8 JSON padded with spaces | data
    header: {"__metadata__": {str: str}, NAME: {"dtype", "shape", "data_offsets": [begin, end]}, ...}

Offsets count from the start of the data. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from tessel.checkpoint.stored import StoredTensor, blocks, bytes_of
from tessel.errors import TesselError
from tessel.runtime.impostor import SNIFFED_BYTES, impostor
from tessel.runtime.stream import Stream

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's own limit; nothing is read before the length has passed it.
MAX_HEADER_BYTES = 100_000_000
# Converting and copying to the host goes piece by piece, so that a huge embedding takes no second copy of itself.
_WRITE_CHUNK_ELEMENTS = 16 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `begin` and `num_bytes` count bytes of the file `path`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    begin: int
    num_bytes: int

    def read(self, index: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor, or the box of it that `index` says, memory-mapped.

        Pages come from the file when touched, and writes stay in this process. `index` has a slice without
        a step for every dim; rows outside of it are not even mapped.
        """
        shape, begin, num_bytes = self.shape, self.begin, self.num_bytes
        if index is not None and shape:
            rows, row_bytes = index[0], num_bytes // max(shape[0], 1)
            begin, shape = begin + rows.start * row_bytes, (rows.stop - rows.start, *shape[1:])
            num_bytes = shape[0] * row_bytes
        inner = () if index is None else (slice(None), *index[1:])
        if num_bytes == 0:
            return torch.empty(shape, dtype=self.dtype)[inner]
        page_begin = begin - begin % mmap.ALLOCATIONGRANULARITY
        lead = begin - page_begin
        with open(self.path, "rb") as file:
            pages = mmap.mmap(file.fileno(), lead + num_bytes, access=mmap.ACCESS_COPY, offset=page_begin)
        if lead % self.dtype.itemsize:
            # An odd header length puts elements at odd addresses, which kernels may not assume: copy these.
            raw = torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes, offset=lead)
            taken = raw.view(*shape, self.dtype.itemsize)[inner].clone(memory_format=torch.contiguous_format)
            return taken.view(self.dtype).squeeze(-1)
        flat = torch.frombuffer(pages, dtype=self.dtype, count=num_bytes // self.dtype.itemsize, offset=lead)
        return flat.view(shape)[inner]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name, none of their data read.

    Raises:
        TesselError: it is not a whole safetensors file; says what it is where that can be seen.
    """
    raw = _raw_header(path)
    size = path.stat().st_size
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    data_begin = 8 + len(raw)
    infos = {name: _info(path, name, entry, data_begin) for name, entry in header.items() if name != "__metadata__"}
    end = max((info.begin + info.num_bytes for info in infos.values()), default=data_begin)
    if end > size:
        raise TesselError(
            f"{path} is truncated: it has {size:,} bytes of the {end:,} that its header promises. Download it again."
        )
    return infos


def header_text(path: Path) -> str:
    """The header as it stands in the file, padding included.

    Raises:
        TesselError: it is not a safetensors file.
    """
    try:
        return _raw_header(path).decode()
    except UnicodeDecodeError as error:
        raise _damaged(path, f"its header is not UTF-8 ({error})") from error


def _raw_header(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        refuse_impostor(path, file)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _damaged(path, f"it has {size} bytes, fewer than the 8 of the header's length")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise _damaged(path, f"its first 8 bytes give a header of {header_bytes:,} bytes")
        if header_bytes > size - 8:
            raise _damaged(path, f"its header should have {header_bytes:,} bytes and the file ends after {size:,}")
        return file.read(header_bytes)


def _info(path: Path, name: str, entry: Any, data_begin: int) -> TensorInfo:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"the header's entry of {name} is not one of a tensor") from error
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise TesselError(
            f"{path}: {name} has the dtype {dtype_name!r}, which is not known. Known: {', '.join(DTYPES)}."
        )
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise _damaged(path, f"the header's entry of {name} has a shape or offsets that are not whole numbers")
    dtype = DTYPES[dtype_name]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise _damaged(path, f"{name} of shape {shape} and dtype {dtype_name} cannot have {end - begin:,} bytes")
    return TensorInfo(name, dtype, tuple(shape), path, data_begin + begin, end - begin)


def _damaged(path: Path, why: str) -> TesselError:
    return TesselError(f"{path} is not a whole safetensors file: {why}. Take another copy of it.")


def refuse_impostor(path: Path, file: IO[bytes]) -> None:
    """Name the things that are often saved under the name of a weights file; leaves `file` at its start.

    Raises:
        TesselError: it is a git-lfs pointer, a web page, or empty.
    """
    start = file.read(SNIFFED_BYTES)
    file.seek(0)
    if not start:
        raise TesselError(f"{path} is empty. Download it again.")
    found = impostor(start)
    if found == "a git-lfs pointer":
        raise TesselError(f"{path} is {found}, not the file itself. Run `git lfs pull` in its repository.")
    if found == "a web page":
        raise TesselError(
            f"{path} is {found}, not weights. Download the file itself: on Hugging Face the address has "
            "/resolve/ where the page's has /blob/ or /tree/."
        )


def write_stored(path: Path, header: str, tensors: Iterable[StoredTensor]) -> str:
    """Write a file with this header, which says where each of `tensors` lies, in the order of their data.

    Returns the file's sha256. Memory: a block. The file is not synced to disk here.
    """
    text = header.encode()
    with Stream(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for block in blocks(tensor):
                file.write(bytes_of(block))
    return file.digest()


def new_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> str:
    """The header of a file that holds tensors of these dtypes and shapes, one after the other."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)  # the data begins at a multiple of 8


def write_file(path: Path, tensors: Sequence[tuple[str, Tensor]], dtype: torch.dtype) -> int:
    """Write tensors as `dtype` in one file, converting and copying to the host piece by piece.

    Returns the bytes of the tensors' data. The file is not synced to disk here.
    """
    header = new_header({name: (dtype, tuple(tensor.shape)) for name, tensor in tensors}, {"format": "pt"}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _, tensor in tensors:
            for chunk in _chunks(tensor, dtype):
                file.write(chunk)
    return sum(tensor.numel() for _, tensor in tensors) * dtype.itemsize


def _chunks(tensor: Tensor, dtype: torch.dtype) -> Iterable[memoryview]:
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(_WRITE_CHUNK_ELEMENTS):
        if piece.numel():
            yield memoryview(piece.to("cpu", dtype).view(torch.uint8).numpy())
