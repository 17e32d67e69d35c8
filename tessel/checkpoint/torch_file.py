"""Files of torch.save: read by memory map, through an allow-list; written as a stream, tensor by tensor.

A file is a zip archive, nothing in it compressed: NAME/data.pkl, the pickle, in which tensors refer to
storages by number, and NAME/data/0, 1, ...: their bytes. A pickle runs what it names, so it is read with
`weights_only=True` and the list below; files whose pickle has a newer protocol than that can read
(MindSpeed's second converter writes them) go through an unpickler of our own with the same list.
Enumerations of Megatron's, which is not installed here, become the `Foreign` values they hold.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import pickletools
import signal
import struct
import types
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessel.checkpoint.safetensors import refuse_impostor
from tessel.checkpoint.stored import Index, StoredTensor, blocks, bytes_of
from tessel.errors import TesselError
from tessel.runtime.stream import Stream

# Modules whose classes are only ever stood in for: what they would do is not known here, and not done.
_FOREIGN_MODULES = ("megatron.", "mindspeed.", "mindspeed_llm.", "modellink.", "transformer_engine.")
_MINDSPORE = ("mindspore", "msadapter", "mindtorch")
STORAGE_KINDS = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}
# What pickle.Pickler makes of plain values, tensors and the list's classes; others reach buffers and other registries.
_INSTRUCTIONS = frozenset(
    "PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE "
    "SHORT_BINBYTES BINBYTES EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM "
    "SETITEMS EMPTY_SET ADDITEMS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD "
    "BINPERSID".split()
)
_ALIGNMENT = 64
# What torch's restricted unpickler, and the zip reader, were seen to raise on damaged files.
_DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    struct.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


class Foreign:
    """A value of a class that is not known here, such as one of Megatron's enumerations: what it was made from."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.values = (*self.values, state)

    def __repr__(self) -> str:
        return f"Foreign({', '.join(map(repr, self.values))})"


def _allowed() -> dict[str, Any]:
    """The list: what a checkpoint's pickle may name beyond tensors and plain containers, and what it gets for it."""
    arrays: dict[str, Any] = {
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "numpy.dtypes.UInt32DType": np.dtypes.UInt32DType,
    }
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        arrays[f"{module}._reconstruct"] = np.ndarray((0,)).__reduce__()[0]
        arrays[f"{module}.scalar"] = np.float64(0).__reduce__()[0]
    return arrays | {
        "argparse.Namespace": argparse.Namespace,
        "types.SimpleNamespace": types.SimpleNamespace,
        "collections.defaultdict": _without_default,
        "builtins.dict": dict,
        "signal.Signals": signal.Signals,
    }


def _without_default(*_: Any) -> dict[Any, Any]:
    """In the place of a defaultdict, whose items are set one by one afterwards."""
    return {}


def load(path: Path) -> Any:
    """What a file of torch.save holds. Tensors are memory-mapped: none is read before it is touched.

    Raises:
        TesselError: it is damaged or something else, or its pickle names what is not on the list; nothing of it
            was run then.
    """
    with open(path, "rb") as file:
        refuse_impostor(path, file)
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        if not is_zip:
            # Files from before torch 1.6 are no zip archives and cannot be mapped: these alone are read whole.
            return torch.load(path, map_location="cpu", weights_only=True)
        _check_archive(path)
        if _is_newer_protocol(path):
            return torch.load(path, "cpu", _RestrictedPickle(path), weights_only=False, mmap=True)
        return _load_weights_only(path)
    except pickle.UnpicklingError as error:
        raise TesselError(
            f"{path} was refused: it is damaged, or asks for more than a checkpoint may hold, and nothing of it was "
            f"run ({_reason(error)}). Take a copy from a source you trust."
        ) from error
    except _DAMAGE as error:
        raise TesselError(f"{path} is not a whole file of torch.save: {_reason(error)}. Take another copy.") from error


def _reason(error: BaseException) -> str:
    """What is wrong, without torch's advice to load it all the same."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return (text.strip() or type(error).__name__).splitlines()[0][:300]


def _check_archive(path: Path) -> None:
    """Refuse an archive that would grow in memory: torch.save compresses nothing."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            end = entry.header_offset + entry.file_size
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or end > size:
                raise TesselError(
                    f"{path}: {entry.filename[:100]} is compressed or longer than the file, which torch.save does not "
                    "do. Take another copy of it."
                )


def _load_weights_only(path: Path) -> Any:
    allowed = _allowed()
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        if name.startswith(_FOREIGN_MODULES):
            allowed[name] = Foreign
        elif name not in allowed:
            raise _unwanted(path, name)
    with torch.serialization.safe_globals([(value, name) for name, value in allowed.items()]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _unwanted(path: Path, name: str) -> TesselError:
    if name.partition(".")[0] in _MINDSPORE:
        return TesselError(
            f"{path} holds tensors of MindSpore ({name}), as MindSpeed-LLM's MindSpore edition writes them. Write them "
            "as torch's where MindSpore is installed: docs/MINDSPORE.md, 'Checkpoints of the original suite'."
        )
    return TesselError(
        f"{path} asks for {name}, which is not on the list of what a checkpoint may hold; nothing of it was run. "
        "Take the file from a source you trust."
    )


def _is_newer_protocol(path: Path) -> bool:
    """Whether its pickle is one for `_RestrictedPickle`, after a look at its instructions."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise pickle.UnpicklingError(f"it has {len(pickles)} entries data.pkl")
        data = archive.read(pickles[0])
    if len(data) < 2 or data[0] != pickle.PROTO[0] or data[1] <= 2:
        return False
    highest, num_instructions = 0, 0
    for instruction, argument, _ in pickletools.genops(data):
        num_instructions += 1
        if instruction.name not in _INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has the instruction {instruction.name}")
        if instruction.name in ("BINPUT", "LONG_BINPUT"):
            highest = max(highest, int(argument or 0))
    if highest > num_instructions:
        raise pickle.UnpicklingError("it numbers its objects with gaps, which would take memory")
    return True


class _Function:
    """A function that a pickle may call, and do nothing else with."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _RestrictedPickle:
    """What torch.load takes for the module `pickle`: its unpickler finds what is on the list, and nothing else."""

    def __init__(self, path: Path) -> None:
        found: dict[str, Any] = {
            name: value if isinstance(value, type) else _Function(value) for name, value in _allowed().items()
        }
        found["collections.OrderedDict"] = collections.OrderedDict
        found["torch._utils._rebuild_tensor_v2"] = _Function(torch._utils._rebuild_tensor_v2)
        found |= {str(dtype): dtype for dtype in STORAGE_KINDS}
        # Classes that a pickle could write to are made anew for each file.
        for name in ("argparse.Namespace", "types.SimpleNamespace"):
            found[name] = type("Namespace", (argparse.Namespace,), {})

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                full = f"{module}.{name}"
                if full in found:
                    return found[full]
                if full.startswith(_FOREIGN_MODULES):
                    return type("Foreign", (Foreign,), {})
                raise _unwanted(path, full)

        self.Unpickler = Unpickler
        self.__name__ = "pickle"  # torch.load asks modules for it


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor of a loaded file, which torch has mapped already."""

    name: str
    path: Path
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, index: Index | None = None) -> Tensor:
        """The tensor, or the box of it that `index` says, memory-mapped."""
        return self.tensor if index is None else self.tensor[index]


def plain(value: Any) -> Any:
    """A pickled value without foreign or special classes: namespaces become dicts, enumerations their values."""
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return {str(key): plain(item) for key, item in vars(value).items()}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(plain(item) for item in value) if type(value) in (tuple, list) else value
    if isinstance(value, Foreign):
        return plain(value.values[0]) if len(value.values) == 1 else repr(value)
    return value


@dataclass(frozen=True)
class Deferred:
    """Stands for a tensor in what `write` is given; it is read when its turn comes."""

    tensor: StoredTensor


@dataclass(frozen=True)
class _Storage:
    key: int
    tensor: StoredTensor


class _Pickler(pickle.Pickler):
    """Writes tensors as torch.save does: by their storage's number, shape and strides."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[StoredTensor] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = getattr(torch, STORAGE_KINDS[value.tensor.dtype])
        return "storage", kind, str(value.key), "cpu", _num_elements(value.tensor.shape)

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = Deferred(LoadedTensor("", Path(), value.detach().cpu()))
        if not isinstance(value, Deferred):
            return NotImplemented
        storage = _Storage(len(self.storages), value.tensor)
        self.storages.append(value.tensor)
        shape = tuple(value.tensor.shape)
        strides = tuple(_num_elements(shape[dim + 1 :]) for dim in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, strides, False, collections.OrderedDict())


def _num_elements(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def pickled(content: Any) -> tuple[bytes, list[StoredTensor]]:
    """The pickle that torch.load reads of `content`, and the tensors in it by the numbers of their storages."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    return buffer.getvalue(), pickler.storages


def write(path: Path, content: Any) -> str:
    """Write what torch.load reads; `content` may hold tensors, and `Deferred` ones, which are read block by block.

    Returns the file's sha256. Memory: one block, and the pickle. The file is not synced to disk here.
    """
    data, storages = pickled(content)
    with Stream(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        _put(archive, "data.pkl", [data], len(data))
        _put(archive, "byteorder", [b"little"], 6)
        for key, tensor in enumerate(storages):
            num_bytes = _num_elements(tensor.shape) * tensor.dtype.itemsize
            _put(archive, f"data/{key}", map(bytes_of, blocks(tensor)), num_bytes)
        _put(archive, "version", [b"3\n"], 2)
    return stream.digest()


def _put(archive: zipfile.ZipFile, name: str, parts: Iterable[bytes | memoryview], num_bytes: int) -> None:
    """One entry, its bytes at a multiple of 64 in the file, as torch.save has them: mapped tensors are aligned then."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = num_bytes
    is_large = num_bytes > 2**30
    assert archive.fp is not None
    # The local header: 30 bytes, the name, and extra fields, of which zip64's is one of 20 bytes.
    begin = archive.fp.tell() + 30 + len(entry.filename) + 4 + (20 if is_large else 0)
    gap = -begin % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
    with archive.open(entry, "w", force_zip64=is_large) as file:
        for part in parts:
            file.write(part)
