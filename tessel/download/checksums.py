"""Hashes of files: sha256, git's own, and the lists that sha256sum writes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tessel.download.remote import Expected, inside
from tessel.errors import TesselError

SUMS_NAME = "SHA256SUMS"
CHUNK_BYTES = 2**20
# Far more than any list of files; a mistaken --sha256sums must not be read whole.
MAX_SUMS_BYTES = 256 * 2**20
_LINE = re.compile(r"(?P<escaped>\\?)(?P<hash>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
_BSD_LINE = re.compile(r"SHA256 ?\((?P<name>.+)\) ?= ?(?P<hash>[0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Digest:
    """What a file is: bytes and hashes in lower-case hexadecimal."""

    size: int
    sha256: str
    git_sha1: str | None


class Hasher:
    """The hashes of a content that comes in pieces."""

    def __init__(self, git_size: int | None = None) -> None:
        """`git_size`: the content's size in bytes, where git's hash is wanted too."""
        self.size = 0
        self._sha256 = hashlib.sha256()
        # git names contents by it; nothing here relies on it against an enemy where a sha256 is known.
        self._git = None if git_size is None else hashlib.sha1(b"blob %d\0" % git_size, usedforsecurity=False)

    def update(self, piece: bytes) -> None:
        """Take the next piece."""
        self.size += len(piece)
        self._sha256.update(piece)
        if self._git is not None:
            self._git.update(piece)

    def digest(self) -> Digest:
        """The hashes of what came so far."""
        return Digest(self.size, self._sha256.hexdigest(), None if self._git is None else self._git.hexdigest())


def digest_of(path: Path, advance: Callable[[int], None], with_git: bool = False) -> Digest:
    """The hashes of a file, read from end to end; `advance` is told how many bytes were."""
    hasher = Hasher(path.stat().st_size if with_git else None)
    with open(path, "rb") as file:
        while piece := file.read(CHUNK_BYTES):
            hasher.update(piece)
            advance(len(piece))
    return hasher.digest()


def difference(digest: Digest, expected: Expected) -> str | None:
    """In which way a file is not what was expected, in words; None if it is."""
    if expected.size is not None and digest.size != expected.size:
        return f"it has {digest.size:,} bytes and {expected.says} says {expected.size:,}"
    if expected.sha256 is not None and digest.sha256 != expected.sha256:
        says = expected.sha256_says or expected.says
        return f"its sha256 is {digest.sha256} and {says} says {expected.sha256}"
    if expected.git_sha1 is not None and digest.git_sha1 is not None and digest.git_sha1 != expected.git_sha1:
        return f"its git hash is {digest.git_sha1} and {expected.says} says {expected.git_sha1}"
    return None


def read_sums(path: Path) -> dict[str, str]:
    """The list that `sha256sum` (or the BSDs' `sha256`) wrote: path relative to the list -> sha256.

    Raises:
        TesselError: it is no such list, names a file twice with different hashes, or leaves the folder.
    """
    try:
        if path.stat().st_size > MAX_SUMS_BYTES:
            raise TesselError(f"{path} is too large for a list of sha256sum. Give the list itself.")
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TesselError(f"{path} cannot be read as a list of sha256sum ({error}). Give the list itself.") from error
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line) or _BSD_LINE.fullmatch(line)
        if found is None:
            raise TesselError(f"{path}, line {number} is not one of sha256sum (64 hexadecimal digits, then a name).")
        name = found["name"]
        if found.groupdict().get("escaped"):
            name = re.sub(r"\\(.)", lambda each: {"n": "\n", "r": "\r"}.get(each[1], each[1]), name)
        name = inside(Path(), name, f"{path}, line {number}").as_posix()
        value = found["hash"].lower()
        if sums.setdefault(name, value) != value:
            raise TesselError(f"{path} gives {name} two different hashes. Take a list that agrees with itself.")
    if not sums:
        raise TesselError(f"{path} lists no file. Give a list that sha256sum wrote.")
    return sums
