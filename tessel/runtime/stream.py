"""A large file written front to back, hashed on the way.

What is written is copied to buffers; one thread hashes them and another writes them, past the page cache where the
file system allows that (O_DIRECT). A file of many GB, which nobody reads soon, then costs the processor a copy and the
hash, and does not push out of memory what is being read.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import TracebackType

import numpy as np

# A multiple of every disk's block, which is what O_DIRECT asks of lengths and addresses.
_BUFFER_BYTES = 4 * 2**20
_NUM_BUFFERS = 4
_DIRECT: int = getattr(os, "O_DIRECT", 0)


class Stream:
    """A new file at `path`, or the one there made empty. Leave the context before the digest is asked for.

    It has no `seek`, so that zipfile puts checksums behind their data, as torch.save does.

    Raises:
        OSError: as open() and write() do; of a write, at a later one or at the end.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._descriptor = os.open(path, flags, 0o666)
        self._sha256 = sha256()
        self._buffers = [
            np.frombuffer(mmap.mmap(-1, _BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
            for _ in range(_NUM_BUFFERS)
        ]
        # What still reads each buffer.
        self._readers: list[list[Future[None]]] = [[] for _ in range(_NUM_BUFFERS)]
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._at = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self.close()

    def tell(self) -> int:
        """Bytes written so far."""
        return self._at

    def flush(self) -> None:
        """Nothing: zipfile asks for it."""

    def close(self) -> None:
        """End the threads, whatever is left to do for them. Leaving the context is the way to finish a file."""
        for pool in (self._hasher, self._writer):
            pool.shutdown(wait=True, cancel_futures=True)
        os.close(self._descriptor)

    def write(self, data: bytes | memoryview, /) -> int:
        """Append bytes; `data` may change afterwards. Returns how many they were."""
        left = np.frombuffer(data, np.uint8)
        num_bytes = len(left)
        while len(left):
            number, filled = self._place()
            if not filled:
                self._wait(number)
            taken = min(len(left), _BUFFER_BYTES - filled)
            self._buffers[number][filled : filled + taken] = left[:taken]
            self._at += taken
            left = left[taken:]
            if filled + taken == _BUFFER_BYTES:
                self._hand_over(number, _BUFFER_BYTES)
        return num_bytes

    def digest(self) -> str:
        """sha256 of the file, in hexadecimal digits."""
        return self._sha256.hexdigest()

    def _place(self) -> tuple[int, int]:
        """The buffer in turn, and how much of it is filled."""
        count, filled = divmod(self._at, _BUFFER_BYTES)
        return count % _NUM_BUFFERS, filled

    def _wait(self, number: int) -> None:
        for reader in self._readers[number]:
            reader.result()

    def _hand_over(self, number: int, filled: int) -> None:
        part = self._buffers[number][:filled].data
        self._readers[number] = [
            self._hasher.submit(self._sha256.update, part),
            self._writer.submit(self._put, part),
        ]

    def _finish(self) -> None:
        number, filled = self._place()
        if filled:
            self._hand_over(number, filled)
        for used in range(_NUM_BUFFERS):
            self._wait(used)

    def _put(self, part: memoryview) -> None:
        """Write a buffer; the last one, and what the file system wants otherwise, through the page cache."""
        if len(part) < _BUFFER_BYTES:
            self._leave_direct()
        while len(part):
            try:
                written = os.write(self._descriptor, part)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._leave_direct():
                    raise
                written = 0
            part = part[written:]

    def _leave_direct(self) -> bool:
        """Write through the page cache from here on; whether that is a change."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        if not flags & _DIRECT:
            return False
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        return True
