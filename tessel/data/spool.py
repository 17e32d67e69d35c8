"""Numbers that are written one after another and read back once, in little memory whatever their count."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

# So many are held before they go to the disk; reading back goes by as many.
CHUNK = 1 << 18


class Spool:
    """An array that grows at its end. What does not fit into a chunk lies in a file of `folder` that has no name."""

    def __init__(self, dtype: str, folder: str | Path) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._folder = folder
        self._held: list[np.ndarray] = []
        self._num_held = 0
        self._singles: list[int] = []
        self._file: IO[bytes] | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, value: int) -> None:
        """Add one number."""
        self._singles.append(value)
        self._length += 1
        if len(self._singles) >= CHUNK:
            self._gather()

    def extend(self, values: np.ndarray) -> None:
        """Add numbers; the array is not changed afterwards.

        Raises:
            OSError: the disk is full.
        """
        self._gather()
        self._held.append(values.astype(self.dtype, copy=False))
        self._num_held += len(values)
        self._length += len(values)
        if self._num_held >= CHUNK:
            self._write()

    def chunks(self) -> Iterator[np.ndarray]:
        """All numbers, in order, by pieces of at most CHUNK that have been written, and a last one."""
        self._gather()
        if self._file is not None:
            self._file.seek(0)
            while data := self._file.read(CHUNK * self.dtype.itemsize):
                yield np.frombuffer(data, self.dtype)
        yield np.concatenate([np.zeros(0, self.dtype), *self._held])

    def close(self) -> None:
        """Give back what it holds."""
        if self._file is not None:
            self._file.close()
        self._held, self._singles = [], []

    def _gather(self) -> None:
        if not self._singles:
            return
        values = np.array(self._singles, self.dtype)
        self._singles = []
        self._length -= len(values)
        self.extend(values)

    def _write(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        for values in self._held:
            self._file.write(values.tobytes())
        self._held, self._num_held = [], 0
