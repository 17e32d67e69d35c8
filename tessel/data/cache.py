"""Index arrays kept on disk, so that a second start does not build them again.

An entry is a folder named by a digest of everything that decides its arrays, the sequence lengths
themselves included: data written anew under an old name is a new entry, and moved data is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tessel.errors import TesselError
from tessel.runtime.files import atomic_folder
from tessel.runtime.log import log, warn_once

# Part of every digest: to be raised when the meaning of the arrays changes.
_VERSION = 1
_DESCRIPTION = "description.json"
# Without --data-cache-path, smaller indices (milliseconds to build) leave no files beside the data.
_MIN_ENTRIES_BESIDE_DATA = 2_000_000

Arrays = tuple[np.ndarray, ...]


class IndexCache:
    """Keeps the arrays of `build()` under a folder, by the digest of `key`.

    `folder` is --data-cache-path, or None: then large indices are kept in `beside`, a folder at the
    data (Megatron's PREFIX/cache/GPTDataset_indices), where that can be written.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = Path(folder) if folder is not None else None
        self.num_built = 0
        self.num_reused = 0

    def get(
        self,
        key: Mapping[str, Any],
        names: tuple[str, ...],
        build: Callable[[], Arrays],
        *,
        beside: Path | None = None,
        num_entries: int = 0,
    ) -> Arrays:
        """The arrays called `names`, from disk or built and kept.

        `key` maps names to JSON values and arrays; it must hold all that decides the result.
        """
        folder = self._folder
        if folder is None and num_entries >= _MIN_ENTRIES_BESIDE_DATA:
            folder = beside
        if folder is None:
            return build()
        description = describe(key)
        digest = hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16).hexdigest()
        entry = folder / f"{digest}-{key['class']}-{key['split']}"
        kept = _load(entry, names)
        if kept is not None:
            self.num_reused += 1
            return kept
        arrays = build()
        self.num_built += 1
        try:
            _store(entry, description, names, arrays)
        except TesselError as error:
            if self._folder is not None:
                raise
            warn_once(f"the index of the data is not kept: {error} (--data-cache-path names another folder)")
        return arrays

    def report(self) -> None:
        """Say in one line what came from the cache, if anything did."""
        if self.num_reused:
            where = self._folder if self._folder is not None else "beside the data"
            log(f"data index cache {where}: {self.num_reused} reused, {self.num_built} built")


def describe(key: Mapping[str, Any]) -> dict[str, Any]:
    """`key` with every array replaced by its dtype, shape and digest."""
    return {"version": _VERSION} | {
        name: _digest(value) if isinstance(value, np.ndarray) else value for name, value in key.items()
    }


def _digest(array: np.ndarray) -> str:
    content = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()
    return f"{array.dtype.name}{list(array.shape)} {content}"


def _load(entry: Path, names: tuple[str, ...]) -> Arrays | None:
    """The memory-mapped arrays of an entry; None where there is none, or it is damaged."""
    if not entry.is_dir():
        return None
    try:
        shapes = json.loads((entry / _DESCRIPTION).read_text())["arrays"]
        arrays = tuple(np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names)
        if [[array.dtype.name, list(array.shape)] for array in arrays] == [shapes[name] for name in names]:
            return arrays
    except (OSError, ValueError, KeyError, EOFError):
        pass
    warn_once(f"{entry} is damaged; the index is built again")
    return None


def _store(entry: Path, description: dict[str, Any], names: tuple[str, ...], arrays: Arrays) -> None:
    shapes = {name: [array.dtype.name, list(array.shape)] for name, array in zip(names, arrays, strict=True)}
    with atomic_folder(entry) as folder:
        for name, array in zip(names, arrays, strict=True):
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        (folder / _DESCRIPTION).write_text(json.dumps(description | {"arrays": shapes}, indent=1))
