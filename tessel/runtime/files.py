"""Paths and files: what is written appears whole or not at all, and a wrong path is explained."""

from __future__ import annotations

import difflib
import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from tessel.errors import TesselError

_FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# A file where a folder is needed or the other way round, no permission, a read-only disk.
_NO_PLACE_ERRNOS = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS)
# The file of a scratch folder that its process has locked.
_CLAIM = ".claim"
_FULL_DISK_TEXTS = ("No space left on device", "Disk quota exceeded")
# What torch.save and numpy say of a write that came out short, with no error number.
_SHORT_WRITE = re.compile(r"inline_container.*unexpected pos \d+ vs \d+|\d+ requested and \d+ written")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _default_mode(mode: int) -> int:
    """The permissions a newly created file or folder would have (tempfile's are narrower)."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is synced and renamed to `path`.

    Use it as `with atomic_write(path) as temporary: temporary.write_text(...)`. The folder is made
    if there is none. After an error the temporary file is gone and what `path` held is untouched.

    Raises:
        TesselError: the disk is full.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(_default_mode(0o666))
            _fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync(path.parent)


def claim(descriptor: int) -> None:
    """Mark an open file as in use by this process, until it is closed, however the process ends."""
    # A file system without locks keeps what a killed process left: no harm but space.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_unclaimed(folder: Path, start: str, end: str) -> None:
    """Remove the files `start*end` of a folder that no living process has a `claim` to."""
    for path in folder.iterdir():
        if not (path.name.startswith(start) and path.name.endswith(end) and path.is_file()):
            continue
        with suppress(OSError), open(path, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextmanager
def scratch_folder(folder: Path, start: str) -> Iterator[Path]:
    """Yield a new folder `start*.tmp` in `folder`, which is gone afterwards.

    Those that killed processes left under such a name are removed, too.

    Raises:
        TesselError: the disk is full, or the folder cannot be written to.
    """
    for left in folder.glob(f"{glob.escape(start)}*.tmp"):
        with suppress(OSError), open(left / _CLAIM, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    with disk_errors(folder):
        scratch = Path(tempfile.mkdtemp(prefix=start, suffix=".tmp", dir=folder))
    try:
        with open(scratch / _CLAIM, "wb") as file:
            claim(file.fileno())
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success its files are synced and it becomes `path`.

    A folder already at `path` is replaced, and kept until the new one is complete. After an error
    the temporary folder is gone.

    Raises:
        TesselError: the disk is full.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            publish_folder(temporary, path)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)


def publish_folder(temporary: Path, path: Path) -> None:
    """Sync the files of `temporary`, which lies beside `path`, and make it `path`; a folder there is replaced."""
    temporary.chmod(_default_mode(0o777))
    for entry in sorted(temporary.rglob("*"), reverse=True):
        _fsync(entry)
    _fsync(temporary)
    _put_in_place(temporary, path)
    _fsync(path.parent)


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    # A folder cannot be renamed over one that holds files: move the old one aside first.
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(aside, path)
        raise
    finally:
        shutil.rmtree(aside.parent)


class disk_errors:
    """Turn a full disk, or a place that cannot be written to, into a TesselError that names `path`.

    Looks through the chain of causes for a full disk, since safetensors and torch wrap the system's error.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, TesselError):
            return
        if isinstance(error, OSError) and error.errno in _NO_PLACE_ERRNOS:
            at = f" at {error.filename}" if error.filename not in (None, str(self._path)) else ""
            raise TesselError(
                f"{self._path} cannot be written ({error.strerror}{at}). Choose another folder, or mend that one."
            ) from error
        if not is_disk_full(error):
            return
        raise TesselError(
            f"The disk is full: writing {self._path} failed with {free_bytes(self._path) / 2**20:,.0f} MiB free. "
            "Free some space or choose another folder; what was complete before is still there."
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether the error, or one that caused it, says that the disk or the quota is full."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, OSError) and link.errno in _FULL_DISK_ERRNOS:
            return True
        if any(text in str(link) for text in _FULL_DISK_TEXTS) or _SHORT_WRITE.search(str(link)):
            return True
        link = link.__cause__ or link.__context__
    return False


def free_bytes(path: str | Path) -> int:
    """Bytes free for this user on the file system that holds `path`, or will hold it."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_free(path: str | Path, needed_bytes: int, what: str) -> None:
    """Refuse to begin writing `what` where the disk cannot hold it.

    Raises:
        TesselError: fewer than `needed_bytes` are free.
    """
    free = free_bytes(path)
    if free < needed_bytes:
        raise TesselError(
            f"{what} needs {needed_bytes / 2**20:,.0f} MiB in {path}, and {free / 2**20:,.0f} MiB are free. "
            "Free some space or choose another folder."
        )


def require_writable(folder: str | Path, what: str) -> None:
    """Refuse a folder that could not be made or written to, before work is spent; makes nothing.

    Raises:
        TesselError: `folder`, or the nearest thing above it that exists, is a file or may not be written.
    """
    folder = Path(folder)
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        named = "is a file" if there == folder.absolute() else f"lies below {there}, which is a file"
        raise TesselError(f"{what} {folder} {named}. Give a folder; it is made if there is none.")
    if not os.access(there, os.W_OK | os.X_OK):
        named = "it" if there == folder.absolute() else str(there)
        raise TesselError(f"{what} {folder}: {named} cannot be written to. Choose another folder, or change its mode.")


def require_path(path: str | Path, what: str) -> Path:
    """`path` if it exists.

    `what` says what it is for, such as "--load" or "the tokenizer (--tokenizer-model)".

    Raises:
        TesselError: nothing is there; names the nearest thing that is.
    """
    path = Path(path)
    if path.exists():
        return path
    raise TesselError(f"{what}: {path} does not exist. {_nearest(path)}")


def _nearest(path: Path) -> str:
    folder = path.absolute().parent
    missing = path.name
    while not folder.is_dir():
        missing, folder = folder.name, folder.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except PermissionError:
        return f"{folder} cannot be read."
    if not names:
        return f"{folder} is empty."
    close = difflib.get_close_matches(missing, names, n=3, cutoff=0.5)
    if close:
        return f"{folder} holds {', '.join(close)}: is it one of those?"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder} holds {', '.join(names[:5])}{more}, but no {missing}."
