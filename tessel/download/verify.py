"""A folder against what its downloads recorded and against SHA256SUMS, without the network."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tessel.download.checksums import SUMS_NAME, difference, digest_of, read_sums
from tessel.download.record import RECORD_NAME, Record
from tessel.download.remote import Expected, in_words, inside
from tessel.download.transfer import INCOMPLETE
from tessel.errors import TesselError
from tessel.runtime.files import require_path
from tessel.runtime.impostor import SNIFFED_BYTES, impostor
from tessel.runtime.log import log, progress

_MOST_LISTED = 50
# What a page or a pointer under such a name can only be by mistake.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".model", ".parquet", ".npz", ".h5", ".onnx")


def verify(folder_name: str, sums_file: str | None, workers: int) -> None:
    """Check every file of a folder, and say what differs.

    Raises:
        TesselError: something does, or there is nothing to check against.
    """
    folder = require_path(folder_name, "--verify")
    if not folder.is_dir():
        raise TesselError(f"--verify: {folder} is a file. Give the folder that was downloaded to.")
    record = Record.read(folder)
    expected, problems = _expected(record)
    sums = Path(sums_file) if sums_file is not None else folder / SUMS_NAME
    if sums_file is not None:
        require_path(sums, "--sha256sums")
    if sums.is_file():
        for path, sha256 in read_sums(sums).items():
            if path == sums.name and sums.parent == folder:
                continue
            problems += _add(expected, path, sha256, str(sums))
    wrong = _impostors(folder)
    if not expected and not problems and not wrong:
        raise TesselError(
            f"{folder} has no {RECORD_NAME} and no {SUMS_NAME}, so there is nothing to check it against. Run the "
            "tessel download that made it again (what is right is not fetched), or give --sha256sums FILE."
        )
    problems = [*wrong.values(), *problems, *_differences(folder, expected, workers, wrong)]
    others = _others(folder, expected)
    if problems:
        shown = problems[:_MOST_LISTED]
        more = [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise TesselError(
            "\n".join(
                [*shown, *more, f"{folder} is not as it was downloaded. Run the same tessel download again to mend it."]
            )
        )
    beside = f"; {others} further files are not on record" if others else ""
    total_bytes = sum(each.size or (folder / path).stat().st_size for path, each in expected.items())
    log(f"{folder}: {len(expected)} files, {in_words(total_bytes)}: all as recorded{beside}")


def _expected(record: Record) -> tuple[dict[str, Expected], list[str]]:
    """Path -> what the record says of it, and what it says is missing."""
    expected, problems = {}, []
    for path, entry in record.items():
        if entry.checked is None:
            problems.append(f"{path}: its download did not end")
        else:
            # The sha256 was taken of what came, and that agreed with git's weaker hash.
            expected[path] = Expected(entry.size, entry.sha256, says="the record")
    return expected, problems


def _add(expected: dict[str, Expected], path: str, sha256: str, says: str) -> list[str]:
    """Take in what a list says of a file; returns what contradicts it."""
    known = expected.get(path)
    if known is None:
        expected[path] = Expected(sha256=sha256, says=says)
    elif known.sha256 is None:
        expected[path] = replace(known, sha256=sha256, sha256_says=says)
    elif known.sha256 != sha256:
        return [f"{path}: {says} says {sha256} and the record of its download {known.sha256}"]
    return []


def _impostors(folder: Path) -> dict[str, str]:
    """Weights that are none: path -> a sentence."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in _WEIGHTS and path.is_file():
            with open(path, "rb") as file:
                what = impostor(file.read(SNIFFED_BYTES))
            if what is not None:
                name = path.relative_to(folder).as_posix()
                found[name] = f"{name}: it is {what}, not the file itself"
    return found


def _differences(folder: Path, expected: dict[str, Expected], workers: int, named_already: dict[str, str]) -> list[str]:
    sizes = {path: _size(inside(folder, path, "the record")) for path in expected}
    lock = threading.Lock()
    with progress("checking (MB)", sum(size or 0 for size in sizes.values()) / 1e6) as display:

        def advance(num_bytes: int) -> None:
            with lock:
                display.advance(num_bytes / 1e6)

        def check(path: str) -> str | None:
            size, wanted = sizes[path], expected[path]
            if size is None:
                half = " (half of it is there)" if (folder / (path + INCOMPLETE)).exists() else ""
                return f"{path}: it is missing{half}"
            if wanted.size is not None and size != wanted.size:
                return f"{path}: it has {size:,} bytes and {wanted.says} says {wanted.size:,}"
            try:
                found = difference(digest_of(folder / path, advance), wanted)
            except OSError as error:
                return f"{path}: it cannot be read ({error.strerror})"
            return f"{path}: {found}" if found is not None else None

        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(check, (path for path in sorted(expected) if path not in named_already)))
    return [each for each in found if each is not None]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _others(folder: Path, expected: dict[str, Expected]) -> int:
    """How many files lie there that nobody vouches for; hidden ones and SHA256SUMS do not count."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sum(
        path.as_posix() not in expected and path.as_posix() != SUMS_NAME
        for path in paths
        if not any(part.startswith(".") for part in path.parts)
    )
