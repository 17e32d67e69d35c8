"""Index arrays kept on disk, so that a second start does not build them again.

An entry is a folder named by a digest of everything that decides its arrays, the sequence lengths
themselves included: data written anew under an old name is a new entry, and moved data is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
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
        self._lock = threading.Lock()
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
            self._count("num_reused")
            return kept
        with _builds_alone(entry) as is_alone:
            kept = _load(entry, names)  # another process may have built it meanwhile
            if kept is not None:
                self._count("num_reused")
                return kept
            arrays = build()
            self._count("num_built")
            return self._kept(entry, description, names, arrays, is_alone)

    def _kept(
        self, entry: Path, description: dict[str, Any], names: tuple[str, ...], arrays: Arrays, is_alone: bool
    ) -> Arrays:
        """The arrays from the disk, where all processes of a machine share their memory; as they are if it fails."""
        try:
            if is_alone:
                _clear_unfinished(entry)
            _store(entry, description, names, arrays)
        except TesselError as error:
            # A folder that others filled and that may only be read is fine; a full one is not.
            if self._folder is not None and os.access(self._folder, os.W_OK):
                raise
            warn_once(f"the index of the data is not kept: {error} (--data-cache-path names another folder)")
            return arrays
        return _load(entry, names) or arrays

    def _count(self, what: str) -> None:
        with self._lock:  # datasets are indexed by several threads
            setattr(self, what, getattr(self, what) + 1)

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


@contextlib.contextmanager
def _builds_alone(entry: Path) -> Iterator[bool]:
    """Wait until no other process builds `entry`; False where the file system does not tell.

    The lock is the system's own, so that of a killed process is gone with it.
    """
    with contextlib.ExitStack() as stack:
        path = entry.parent / f".{entry.name}.lock"
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
        # Whoever waits has the file open, and finds the entry; later ones find it first.
        path.unlink(missing_ok=True)


def _clear_unfinished(entry: Path) -> None:
    """Remove what killed processes have left of `entry`."""
    for left in entry.parent.glob(f".{entry.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


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
    try:
        with atomic_folder(entry) as folder:
            for name, array in zip(names, arrays, strict=True):
                np.save(folder / f"{name}.npy", array, allow_pickle=False)
            (folder / _DESCRIPTION).write_text(json.dumps(description | {"arrays": shapes}, indent=1))
    except (OSError, TesselError):
        # Without locks, two machines may come at the same time, with the same arrays.
        if _load(entry, names) is None:
            raise
