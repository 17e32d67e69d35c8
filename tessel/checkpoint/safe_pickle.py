"""Pickles from files are hostile: only what is on a list is ever looked up.

A pickle runs whatever callable it names. The unpickler here resolves a name only if it is on the
allow-list it was given, so that nothing else can be reached, let alone called.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Collection, Mapping
from typing import IO, Any

from tessel.errors import TesselError

# What torch.distributed.checkpoint puts in the `.metadata` of a checkpoint of tensors.
DCP_METADATA_GLOBALS = frozenset(
    {
        ("builtins", "set"),
        ("collections", "OrderedDict"),
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            ("torch", name)
            for name in (
                "bfloat16",
                "bool",
                "float16",
                "float32",
                "float64",
                "int16",
                "int32",
                "int64",
                "int8",
                "uint8",
            )
        ),
    }
)


# What an unpickler was seen to raise on damaged files.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    AssertionError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)


def refusal(what: str, name: str) -> TesselError:
    """The error for a pickle that asks for something that is not on its list."""
    return TesselError(
        f"{what} asks for {name[:200]}, which is not on the list of what a checkpoint may hold; nothing of it was run. "
        "Take the file from a source you trust."
    )


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], allowed: Collection[tuple[str, str]], what: str) -> None:
        super().__init__(file)
        self._allowed = allowed
        self._what = what

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise refusal(self._what, f"{module}.{name}")
        return super().find_class(module, name)


def load(file: IO[bytes], allowed: Collection[tuple[str, str]], what: str) -> Any:
    """Unpickle `file`, resolving only the (module, name) pairs in `allowed`.

    Raises:
        TesselError: it asks for anything else, or is not a pickle; `what` names the file.
    """
    try:
        return _RestrictedUnpickler(file, allowed, what).load()
    except _DAMAGE as error:
        raise TesselError(f"{what} cannot be read ({error}): it is damaged. Take another copy.") from error


class Record:
    """What a pickle made of a class that is not to be reached: `values` it was made from, and its fields."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)
        else:
            self.values = state if isinstance(state, tuple) else (state,)


# pickle's own, in Python: the one in C takes memory for as many objects as a damaged file says there are.
class _RecordUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    def __init__(self, content: bytes, known: Mapping[str, Any], recorded: tuple[str, ...], what: str) -> None:
        super().__init__(io.BytesIO(content))
        self._known = known
        self._recorded = recorded
        self._what = what
        self._made: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if not full.startswith(self._recorded):
            raise refusal(self._what, full)
        # A class that a pickle could write to is made anew for each file.
        return self._made.setdefault(full, type(name.rpartition(".")[2], (Record,), {}))

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load_records(content: bytes, known: Mapping[str, Any], recorded: tuple[str, ...], what: str) -> Any:
    """Unpickle `content` without reaching any class: names that begin as `recorded` says become `Record`s.

    `known`: what stands for the other names that are allowed. Persistent ids stand for themselves.

    Raises:
        TesselError: it asks for anything else, or is not a pickle; `what` names the file.
    """
    try:
        return _RecordUnpickler(content, known, recorded, what).load()
    except _DAMAGE as error:
        raise TesselError(f"{what} cannot be read ({error}): it is damaged. Take another copy.") from error
