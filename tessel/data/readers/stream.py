"""The bytes of a file, decompressed on the way, whatever its size."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from tessel.data.readers.block import MAX_ROW_BYTES, Damage, Format


class Stream:
    """Reads a file from its beginning. To be closed, or used in `with`."""

    def __init__(self, path: str | Path, form: Format) -> None:
        self._file: Any
        self._raw: Any
        if form.compression is None:
            self._file = self._raw = open(path, "rb")  # noqa: SIM115
        else:
            import pyarrow

            # Knows both compressions, files of several members, and what is cut off.
            self._raw = pyarrow.OSFile(str(path))
            self._file = pyarrow.CompressedInputStream(self._raw, form.compression)
        self.compression = form.compression
        self._told = 0

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, at most so many; none at the end.

        Raises:
            OSError: the file cannot be read or decompressed.
        """
        data: bytes = self._file.read(num_bytes)
        return data

    def passed(self) -> int:
        """Bytes of the file itself that were read since the last time this was asked."""
        at: int = self._raw.tell()
        passed, self._told = at - self._told, at
        return passed

    def explain(self, error: OSError) -> str:
        """Why reading failed, in a sentence."""
        if self.compression is None:
            return f"cannot be read ({error.strerror or error})."
        return f"cannot be decompressed ({error}): the file is cut off or damaged. Fetch or make it again."

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._raw.close()


def check_length(num_bytes: int, number: int) -> None:
    """
    Raises:
        Damage: row `number` is longer than any should be.
    """
    if num_bytes > MAX_ROW_BYTES:
        raise Damage(number, f"longer than {MAX_ROW_BYTES >> 20} MiB, which no document should be.")
