"""What a folder's downloads left on record: every file with its size and hashes, finished or not.

    {"tessel_download": 1, "files": {PATH: {"size", "sha256", "git_sha1", "source", "checked", ...}}}

`checked` says against what a file was found right; it is null until the file is whole.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tessel.download.checksums import Digest
from tessel.download.remote import Expected, RemoteFile, inside
from tessel.errors import TesselError
from tessel.runtime.files import atomic_write

RECORD_NAME = ".tessel-download.json"
_FORMAT = 1
# Writing the record after each of ten thousand small files would cost more than the files.
_SAVE_INTERVAL_S = 2.0


@dataclass(frozen=True)
class Entry:
    """One file of the record."""

    size: int | None
    sha256: str | None
    git_sha1: str | None
    source: str
    checked: str | None = None
    """Against what it was checked: `sha256 of the hub`, ...; None: it is not whole yet."""
    mtime_ns: int | None = None
    validator: str | None = None
    """ETag or Last-Modified of an address, so that half a file is only continued with its own other half."""


class Record:
    """The record of one folder. May be used by several threads."""

    def __init__(self, folder: Path, entries: dict[str, Entry] | None = None) -> None:
        self.path = folder / RECORD_NAME
        self._folder = folder
        self._entries = entries or {}
        self._lock = threading.Lock()
        self._saved_s = float("-inf")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record that lies in `folder`; an empty one if there is none.

        Raises:
            TesselError: it is damaged.
        """
        path = folder / RECORD_NAME
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return cls(folder)
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(path, str(error)) from error
        if not isinstance(content, dict) or content.get("tessel_download") != _FORMAT:
            raise _damaged(path, f"it is not one of format {_FORMAT}")
        listed = content.get("files")
        if not isinstance(listed, dict):
            raise _damaged(path, "it lists no files")
        return cls(folder, {name: _entry(path, name, raw) for name, raw in listed.items()})

    def items(self) -> list[tuple[str, Entry]]:
        """Paths and entries, by path."""
        with self._lock:
            return sorted(self._entries.items())

    def get(self, path: str) -> Entry | None:
        """The entry of a file."""
        with self._lock:
            return self._entries.get(path)

    def plan(self, file: RemoteFile) -> None:
        """Note that a file is wanted, before a byte of it is here."""
        expected = file.expected
        entry = Entry(expected.size, expected.sha256, expected.git_sha1, file.source, validator=file.validator)
        with self._lock:
            self._entries[file.path] = entry

    def remember(self, path: str, validator: str) -> None:
        """Keep what tells one version of an address from the next; at once, since this process may be killed."""
        with self._lock:
            entry = self._entries[path]
            self._entries[path] = Entry(**{**asdict(entry), "validator": validator})
            self._save()

    def finish(self, path: str, digest: Digest, source: str, checked: str) -> None:
        """Note that a file is whole and what it is."""
        mtime_ns = (self._folder / path).stat().st_mtime_ns
        with self._lock:
            self._entries[path] = Entry(digest.size, digest.sha256, digest.git_sha1, source, checked, mtime_ns)
            if time.monotonic() - self._saved_s > _SAVE_INTERVAL_S:
                self._save()

    def is_finished(self, path: str, expected: Expected) -> bool:
        """Whether the file was found right before, is still expected to be that, and was not touched since."""
        entry = self.get(path)
        if entry is None or entry.checked is None:
            return False
        try:
            status = (self._folder / path).stat()
        except OSError:
            return False
        untouched = (status.st_size, status.st_mtime_ns) == (entry.size, entry.mtime_ns)
        return untouched and _agree(entry, expected)

    def continues(self, file: RemoteFile) -> bool:
        """Whether half of `file` may lie here: the record planned this very content."""
        entry = self.get(file.path)
        if entry is None or entry.checked is not None or entry.source.split("@")[0] != file.source.split("@")[0]:
            return False
        if file.expected.sha256 or file.expected.git_sha1:
            return entry.size == file.expected.size and _agree(entry, file.expected, strict=True)
        return entry.validator is not None

    def save(self) -> None:
        """Write the record."""
        with self._lock:
            self._save()

    def _save(self) -> None:
        listed = {name: _without_none(entry) for name, entry in sorted(self._entries.items())}
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps({"tessel_download": _FORMAT, "files": listed}, indent=1) + "\n")
        self._saved_s = time.monotonic()


def _agree(entry: Entry, expected: Expected, strict: bool = False) -> bool:
    """Whether the record's hashes are the expected ones; `strict`: with no more and no fewer of them known."""
    pairs = [(entry.sha256, expected.sha256), (entry.git_sha1, expected.git_sha1), (entry.size, expected.size)]
    return all(mine == theirs or (theirs is None and not strict) for mine, theirs in pairs)


def _without_none(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if value is not None or name == "checked"}


def _entry(path: Path, name: str, raw: Any) -> Entry:
    inside(Path(), name, str(path))
    kinds: dict[str, type] = {each.name: int if each.name in ("size", "mtime_ns") else str for each in fields(Entry)}
    if not isinstance(raw, dict) or not isinstance(raw.get("source"), str):
        raise _damaged(path, f"the entry of {name} is not one of a file")
    values: dict[str, Any] = {key: raw.get(key) for key in kinds}
    if any(value is not None and not isinstance(value, kinds[key]) for key, value in values.items()):
        raise _damaged(path, f"the entry of {name} has a value of the wrong kind")
    return Entry(**values)


def _damaged(path: Path, why: str) -> TesselError:
    return TesselError(f"{path} is not a record of tessel download: {why}. Remove it; the files will be checked anew.")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other downloads out of `folder` meanwhile.

    Raises:
        TesselError: another one is at work there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems cannot lock a folder; there it is left to the user.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise TesselError(
                    f"Another tessel download is writing to {folder}. Wait for it, or give another --local-dir."
                ) from error
        yield
    finally:
        os.close(descriptor)
