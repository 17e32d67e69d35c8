"""What is to be fetched: files with their addresses, and what is known of their content beforehand."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tessel.config.nearest import nearest
from tessel.errors import TesselError, UsageError

MAX_NAMED = 10


@dataclass(frozen=True)
class Expected:
    """What a file must be. Sizes in bytes, hashes in lower-case hexadecimal; None where it is not known."""

    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    """git's name of the content: SHA-1 of `blob SIZE\\0` and the content."""
    says: str = "the hub"
    """Who says so, for messages."""
    sha256_says: str | None = None
    """Who says the sha256, if it is another."""


@dataclass(frozen=True)
class RemoteFile:
    """One file: where it comes from, and its place in the folder (with `/`)."""

    path: str
    url: str
    expected: Expected
    source: str
    """What the record says of its origin, such as `hf:OWNER/NAME@COMMIT`."""
    validator: str | None = None
    """ETag or Last-Modified of what lies here in part, from an earlier attempt."""


@dataclass(frozen=True)
class Listing:
    """What a hub has of a repository."""

    title: str
    """What it is called in messages, such as `OWNER/NAME at 1a2b3c4 (main) from https://huggingface.co`."""
    files: tuple[RemoteFile, ...]
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with each request, credentials among them; not to another host that one is redirected to."""
    refused: Callable[[int], str | None] = lambda status: None
    """What an HTTP status of one file's request means here, if it means something particular."""


def named(names: Iterable[str]) -> str:
    """The first ten of a list in words, and how many there are beyond."""
    found = list(names)
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more


def in_words(num_bytes: float) -> str:
    """A size in units of 1000, as the hubs show it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} TB"


def inside(folder: Path, path: str, whose: str) -> Path:
    """`folder / path`, where `path` was written by a stranger.

    Raises:
        TesselError: it would leave the folder; `whose` says who named it.
    """
    parts = PurePosixPath(path).parts
    odd = set(path) & set("\\\0\n\r") or path.startswith("/") or ".." in parts or not parts or ":" in parts[0]
    if odd:
        raise TesselError(f"{whose} names a file {path!r}, which would leave the folder. Take it from another source.")
    return folder.joinpath(*parts)


def select(files: Sequence[RemoteFile], include: Sequence[str], exclude: Sequence[str]) -> list[RemoteFile]:
    """The files that match a pattern of `include` (all if there is none) and none of `exclude`.

    Patterns are the shell's, matched against the whole path (`*` crosses `/`); one that ends with `/` means
    everything below it.

    Raises:
        UsageError: nothing is left, or a pattern of `include` matches nothing.
    """
    paths = [file.path for file in files]
    idle = [pattern for pattern in include if not any(_matches(path, pattern) for path in paths)]
    if idle:
        near = nearest(idle[0], paths, similarity=0.5) or paths
        raise UsageError(f"--include {idle[0]} matches none of the {len(paths)} files; there are {named(near)}.")
    kept = [
        file
        for file in files
        if (not include or any(_matches(file.path, pattern) for pattern in include))
        and not any(_matches(file.path, pattern) for pattern in exclude)
    ]
    if not kept:
        raise UsageError(f"--include and --exclude leave none of the {len(paths)} files: {named(paths)}.")
    return kept


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern + "*" if pattern.endswith("/") else pattern)
