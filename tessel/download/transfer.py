"""One file from its address to its place: continued where it stopped, checked, and only then given its name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from tessel.download.checksums import CHUNK_BYTES, Digest, Hasher, difference
from tessel.download.http import Answer, Broken, RangeRefused, ask, shown
from tessel.download.remote import Expected, RemoteFile
from tessel.errors import TesselError
from tessel.runtime.files import disk_errors
from tessel.runtime.impostor import SNIFFED_BYTES, Impostor, impostor

INCOMPLETE = ".incomplete"
# Where a page or markup may be what is meant.
_MAY_BE_MARKUP = (".html", ".htm", ".xhtml", ".xml", ".svg", ".md", ".txt", ".rst", ".ipynb", ".jinja")
_NEVER_MARKUP = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".npy", ".model"),
    *(".json", ".jsonl", ".parquet", ".arrow", ".zst", ".gz", ".tgz", ".tar", ".zip", ".idx", ".distcp"),
)


class Stopped(Exception):
    """The user asked to stop; what came so far lies under `.incomplete`."""


@dataclass(frozen=True)
class Retries:
    """How long a failing server is borne with."""

    tries: int = 5
    """Failures in a row, with less than a MiB between them."""
    wait_s: float = 1.0
    """Before the second try; then twice as long each time."""
    max_wait_s: float = 60.0


@dataclass(frozen=True)
class Line:
    """What a transfer needs besides its file."""

    headers: Mapping[str, str]
    stop: threading.Event
    advance: Callable[[int], None]
    """Told how many bytes came (negative: they have to come again)."""
    remember: Callable[[str], None]
    """Told what tells this version of the file from others, once that is known."""
    retries: Retries = Retries()


class _Partial:
    """The bytes that are here, and their hashes."""

    def __init__(self, path: Path, expected: Expected, advance: Callable[[int], None]) -> None:
        self.path = path
        self._is_empty = expected.size == 0
        self._git_size = expected.size if expected.git_sha1 is not None else None
        self._advance = advance
        self._file: IO[bytes] = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        self.hasher = Hasher(self._git_size)
        self.start = b""
        """The first bytes, as far as impostors show in them."""
        while piece := self._file.read(CHUNK_BYTES):
            self._count(piece)

    @property
    def length(self) -> int:
        return self.hasher.size

    def write(self, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:
            # Unbuffered, so that a killed process leaves what it had, and a full disk is found out here.
            rest = rest[self._file.write(rest) :]
        self._count(piece)

    def restart(self) -> None:
        self._advance(-self.length)
        self._file.seek(0)
        self._file.truncate()
        self.hasher, self.start = Hasher(self._git_size), b""

    def _count(self, piece: bytes) -> None:
        self.hasher.update(piece)
        self._advance(len(piece))
        if len(self.start) < SNIFFED_BYTES:
            self.start += piece[: SNIFFED_BYTES - len(self.start)]

    def close(self) -> None:
        """Leave what is there for the next attempt; an empty file is no use to it."""
        os.fsync(self._file.fileno())
        self._file.close()
        if self.length == 0 and not self._is_empty:
            self.path.unlink()


def fetch(file: RemoteFile, target: Path, line: Line) -> Digest:
    """Bring `file` to `target`, going on with `target`.incomplete if that is there.

    Content that turns out wrong is fetched once more from the start.

    Raises:
        TesselError: it cannot be had, is something else than it should be, or the disk is full.
        Stopped: `line.stop` was set.
    """
    incomplete = target.with_name(target.name + INCOMPLETE)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        wrong = ""
        for _ in range(2):
            partial = _Partial(incomplete, file.expected, line.advance)
            try:
                _complete(file, partial, line)
            finally:
                partial.close()
            digest = partial.hasher.digest()
            if digest.size == 0 and file.expected.size is None:
                raise TesselError(f"{file.path}: {shown(file.url)} is empty. Check the address.")
            found = impostor(partial.start)
            wrong = difference(digest, file.expected) or ""
            if not wrong and not is_out_of_place(found, file):
                os.replace(incomplete, target)
                return digest
            incomplete.unlink()
            line.advance(-digest.size)
            if found is not None:
                raise TesselError(_impostor_text(file, found))
        raise TesselError(
            f"{file.path} came damaged twice: {wrong}. Nothing of it was kept; run the same command again, "
            "and if that changes nothing try another mirror."
        )


def _complete(file: RemoteFile, partial: _Partial, line: Line) -> None:
    """Fill up `partial`, through broken connections."""
    failures, safe_length, validator = 0, partial.length, file.validator
    # A hash finds out another version at the end, and no mirror's whims of ETags make it start again.
    watched = file.expected.sha256 is None and file.expected.git_sha1 is None
    if file.expected.size is not None and partial.length > file.expected.size:
        partial.restart()
    while partial.length != file.expected.size:
        if line.stop.is_set():
            raise Stopped
        try:
            answer = ask(file.url, line.headers, partial.length, file.expected.size, validator)
            with answer.response:
                if watched and answer.validator is not None and answer.validator != validator:
                    line.remember(answer.validator)
                _take(file, partial, answer, line, validator)
            validator = answer.validator if watched else None
            if partial.length == answer.end:
                # A part that was asked for is here; the next one follows.
                if answer.end == answer.total:
                    return
                continue
            if answer.total is None or partial.length >= answer.total:
                return
            raise Broken(f"the connection ended after {partial.length:,} of {answer.total:,} bytes")
        except RangeRefused as refused:
            if refused.total == partial.length:
                return
            partial.restart()
            validator = None
        except Broken as broken:
            failures = 1 if partial.length - safe_length >= CHUNK_BYTES else failures + 1
            safe_length = partial.length
            if failures >= line.retries.tries:
                raise TesselError(_unreachable(file.url, str(broken), partial.length)) from broken
            _wait(line, failures, broken.wait_s)


def _take(file: RemoteFile, partial: _Partial, answer: Answer, line: Line, validator: str | None) -> None:
    """Write the body of an answer behind what is there, or instead of it where it is another version."""
    changed = validator is not None and answer.validator not in (None, validator)
    if answer.begin != partial.length or (changed and partial.length):
        partial.restart()
        if answer.begin:
            raise Broken("it sent another part than the one asked for")
    expected = file.expected.size
    for piece in answer.pieces():
        if line.stop.is_set():
            raise Stopped
        if partial.length == 0:
            found = impostor(piece[:SNIFFED_BYTES])
            if found and (is_out_of_place(found, file) or (expected is not None and answer.total != expected)):
                raise TesselError(_impostor_text(file, found))
        if expected is not None and (answer.total or expected) != expected:
            raise TesselError(
                f"{file.path}: {shown(file.url)} has {answer.total:,} bytes and {file.expected.says} says "
                f"{expected:,}. The mirror holds another version: try another mirror or another --revision."
            )
        partial.write(piece)
        if expected is not None and partial.length >= expected:
            return


def is_out_of_place(found: Impostor | None, file: RemoteFile) -> bool:
    """Whether what the file begins like cannot be what was meant.

    A hub may rightly hold a page; what nobody vouches for is only taken as one where its name says so.
    """
    suffix = PurePosixPath(file.path).suffix.lower()
    if found == "a web page":
        proved = file.expected.sha256 is not None or file.expected.git_sha1 is not None
        return suffix in _NEVER_MARKUP or not (proved or suffix in _MAY_BE_MARKUP)
    return found is not None


def _impostor_text(file: RemoteFile, found: Impostor | None) -> str:
    host = urlsplit(file.url).netloc.rpartition("@")[2]
    if found == "a git-lfs pointer":
        return (
            f"{file.path}: {host} sends a git-lfs pointer, not the file itself. Nothing of it was kept; take it from "
            "the hub's /resolve/ address or from another mirror, or tell the repository's owner."
        )
    return (
        f"{file.path}: {host} sends a web page, not the file. Nothing of it was kept; the address of a file on a hub "
        "has /resolve/ where its page has /blob/ or /tree/, and a proxy or a mirror may want a login first."
    )


def _unreachable(url: str, why: str, length: int) -> str:
    here = f" What came ({length:,} bytes) is kept: run the same command again to go on." if length else ""
    host = urlsplit(url).netloc.rpartition("@")[2]
    return (
        f"{shown(url)} cannot be fetched: {why}. Check the network (HTTPS_PROXY if there is a proxy) and that {host} "
        f"is up; HF_ENDPOINT can name a mirror of the Hugging Face hub.{here}"
    )


def _wait(line: Line, failures: int, asked_s: float) -> None:
    wait_s = max(asked_s, line.retries.wait_s * 2 ** (failures - 1))
    line.stop.wait(min(wait_s, line.retries.max_wait_s))
