"""Archives from strangers: unpacked inside their folder, or refused whole.

No link is ever made on disk, so that nothing can be written through one: a link to a file of the archive
becomes a copy of it.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from tessel.download.checksums import CHUNK_BYTES, Digest, Hasher
from tessel.download.remote import in_words, inside, named
from tessel.errors import TesselError
from tessel.runtime.files import disk_errors, free_bytes

MAX_MEMBERS = 100_000
MAX_GROWTH = 200
"""An archive may unpack to so many times its own size, as no honest text does ..."""
MAX_SMALL_BYTES = 2**30
"""... or to this much in any case."""
# A name or an extended header is read whole by tarfile; what says it is larger is no name.
_MAX_READ_BYTES = 16 * 2**20
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SUFFIXES = (".zip", *_TAR_SUFFIXES)
# What the readers of these formats were seen to raise on damaged files.
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError),
    *(ValueError, RuntimeError, NotImplementedError, OverflowError, LookupError),
)


@dataclass(frozen=True)
class _Member:
    name: str
    kind: str
    """`file`, `folder`, `link`, or what it is else, in words."""
    target: str = ""
    """Of a link: the path in the archive that it stands for."""
    is_program: bool = False
    open: Callable[[], IO[bytes]] | None = None


class _Bounded(io.RawIOBase):
    """A decompressed stream that refuses to be read in lumps that no header needs."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def unpack(archive: Path, folder: Path) -> dict[str, Digest]:
    """Unpack into `folder` what `archive` holds. Returns the files, by path, with their hashes.

    Everything is unpacked beside first and moved into place when all of it is there.

    Raises:
        TesselError: it is damaged, holds something that would leave the folder or is no file, grows without
            bounds, or would replace what is in `folder`; nothing of it is left.
    """
    limit = max(MAX_SMALL_BYTES, MAX_GROWTH * archive.stat().st_size)
    with disk_errors(folder):
        beside = Path(tempfile.mkdtemp(prefix=f".{archive.name}.", suffix=".incomplete", dir=folder))
        try:
            digests = _unpack_all(archive, beside, min(limit, free_bytes(folder)))
            names = sorted(entry.name for entry in beside.iterdir())
            taken = [name for name in names if os.path.lexists(folder / name)]
            if taken:
                raise TesselError(
                    f"{archive} holds {named(taken)}, which {folder} has already. Move that away, or give another "
                    "--local-dir."
                )
            for name in names:
                os.rename(beside / name, folder / name)
        except _DAMAGE as error:
            raise TesselError(
                f"{archive} is no whole archive: {str(error) or type(error).__name__}. Download it again."
            ) from error
        except OSError as error:
            # bz2 says so of damage, and zipfile seeks where a damaged list sends it; the system's errors have a number.
            if error.errno not in (None, errno.EINVAL):
                raise
            raise TesselError(f"{archive} is no whole archive: {error}. Download it again.") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return digests


def _unpack_all(archive: Path, folder: Path, limit_bytes: int) -> dict[str, Digest]:
    digests: dict[str, Digest] = {}
    links: dict[str, str] = {}
    left = limit_bytes
    for number, member in enumerate(_members(archive), 1):
        if number > MAX_MEMBERS:
            raise TesselError(f"{archive} holds more than {MAX_MEMBERS:,} files. Unpack it by hand if you trust it.")
        target = inside(folder, member.name, str(archive))
        name = target.relative_to(folder).as_posix()
        if member.kind == "folder":
            _make_folder(archive, target)
            continue
        if member.kind not in ("file", "link"):
            raise TesselError(f"{archive}: {name} is {member.kind}, not a file. Unpack it by hand if you trust it.")
        if name in digests or name in links or target.exists():
            raise TesselError(f"{archive} holds {name} twice. Take another copy of it.")
        if member.kind == "link":
            links[name] = member.target
            continue
        _make_folder(archive, target.parent)
        assert member.open is not None
        with member.open() as source:
            digests[name] = _write(archive, source, target, left, limit_bytes)
        left -= digests[name].size
        if member.is_program:
            target.chmod(target.stat().st_mode | 0o100)
    for name in links:
        original = _end_of(archive, name, links, digests)
        _make_folder(archive, (folder / name).parent)
        with open(folder / original, "rb") as source:
            digests[name] = _write(archive, source, folder / name, left, limit_bytes)
        left -= digests[name].size
    return digests


def _make_folder(archive: Path, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise TesselError(f"{archive} holds {folder.name} as a file and as a folder. Take another copy.") from error


def _write(archive: Path, source: IO[bytes], target: Path, left_bytes: int, limit_bytes: int) -> Digest:
    hasher = Hasher()
    with open(target, "xb") as file:
        while piece := source.read(CHUNK_BYTES):
            hasher.update(piece)
            if hasher.size > left_bytes:
                raise TesselError(
                    f"{archive} unpacks to more than {in_words(limit_bytes)}: the disk does not hold it, or no honest "
                    "archive of its size does. Unpack it by hand if you trust it."
                )
            file.write(piece)
    return hasher.digest()


def _end_of(archive: Path, name: str, links: dict[str, str], digests: dict[str, Digest]) -> str:
    """The file that a link leads to."""
    to = name
    for _ in range(len(links) + 1):
        if to not in links:
            break
        to = links[to]
    if to in digests:
        return to
    raise TesselError(
        f"{archive}: {name} is a link to {to!r}, which is no file of the archive. Unpack it by hand if you trust it."
    )


def _members(archive: Path) -> Iterator[_Member]:
    name = archive.name.lower()
    if name.endswith(".zip"):
        yield from _zip_members(archive)
    elif name.endswith(_TAR_SUFFIXES):
        with _decompressed(archive) as stream:
            yield from _tar_members(stream)
    else:
        raise TesselError(f"{archive} cannot be unpacked: known are {', '.join(SUFFIXES)}. Leave out --unpack.")


def _decompressed(archive: Path) -> IO[bytes]:
    name = archive.name.lower()
    if name.endswith((".gz", ".tgz")):
        return gzip.open(archive)  # type: ignore[return-value]
    if name.endswith((".bz2", ".tbz2")):
        return bz2.open(archive)
    if name.endswith((".xz", ".txz")):
        return lzma.open(archive)
    return open(archive, "rb")


def _tar_members(stream: IO[bytes]) -> Iterator[_Member]:
    with tarfile.open(fileobj=_Bounded(stream), mode="r:") as tar:  # type: ignore[call-overload]
        for info in tar:
            if posixpath.normpath(info.name) == "." and info.isdir():
                continue
            yield _tar_member(tar, info)


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    if info.isdir():
        return _Member(info.name, "folder")
    if info.issym():
        return _Member(info.name, "link", _resolved(posixpath.dirname(info.name), info.linkname))
    if info.islnk():
        return _Member(info.name, "link", _resolved("", info.linkname))
    if not info.isreg():
        return _Member(info.name, "a device" if info.isdev() else "of an unknown kind")

    def opened() -> IO[bytes]:
        file = tar.extractfile(info)
        assert file is not None
        return file

    return _Member(info.name, "file", is_program=bool(info.mode & 0o100), open=opened)


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            # Made on Unix: the upper half is its file mode.
            mode = info.external_attr >> 16 if info.create_system == 3 else 0
            if info.is_dir():
                yield _Member(info.filename, "folder")
            elif stat.S_ISLNK(mode):
                target = zipped.open(info).read(4096).decode("utf-8", "replace")
                yield _Member(info.filename, "link", _resolved(posixpath.dirname(info.filename), target))
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                yield _Member(info.filename, "a device")
            else:
                opened = partial(zipped.open, info)
                yield _Member(info.filename, "file", is_program=bool(mode & 0o100), open=opened)


def _resolved(folder: str, target: str) -> str:
    """Where a link leads, as a path in the archive; one that leads out begins with `..` or `/`."""
    return posixpath.normpath(posixpath.join(posixpath.normpath(folder), target))
