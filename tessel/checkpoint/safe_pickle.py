"""Pickles from files are hostile: only what is on a list is ever looked up.

A pickle runs whatever callable it names. The unpickler here resolves a name only if it is on the
allow-list it was given, so that nothing else can be reached, let alone called.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection
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


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], allowed: Collection[tuple[str, str]], what: str) -> None:
        super().__init__(file)
        self._allowed = allowed
        self._what = what

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise TesselError(
                f"{self._what} asks for {module}.{name}, which is not on the list of what a checkpoint may hold; "
                "nothing of it was run. Take the file from a source you trust."
            )
        return super().find_class(module, name)


def load(file: IO[bytes], allowed: Collection[tuple[str, str]], what: str) -> Any:
    """Unpickle `file`, resolving only the (module, name) pairs in `allowed`.

    Raises:
        TesselError: it asks for anything else, or is not a pickle; `what` names the file.
    """
    try:
        return _RestrictedUnpickler(file, allowed, what).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise TesselError(f"{what} cannot be read ({error}): it is damaged. Take another copy.") from error
