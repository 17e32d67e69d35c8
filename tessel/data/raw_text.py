"""Raw text as training data: tokenized once into a cache, by content, tokenizer and options."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tessel.data.indexed import IndexedDataset
from tessel.data.preprocess import preprocess_files
from tessel.data.readers import check_inputs, format_of
from tessel.data.tokenizer import Tokenizer
from tessel.errors import TesselError, UsageError
from tessel.runtime.files import disk_errors
from tessel.runtime.log import log, warn_once

# Part of every key: to be raised when the same input would give other tokens.
_VERSION = 1
# Under this, starting worker processes takes longer than the work.
_BYTES_PER_WORKER = 16 << 20
_MAX_WORKERS = 16
_CHUNK_BYTES = 1 << 20
_STEM = "tokens"


def default_cache_dir() -> Path:
    """TESSEL_CACHE, or `tessel` in XDG_CACHE_HOME, or ~/.cache/tessel."""
    if named := os.environ.get("TESSEL_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tessel"


def preprocessed_prefix(
    path: str | Path,
    tokenizer: Tokenizer,
    json_keys: Sequence[str],
    append_eod: bool,
    cache_dir: str | Path | None = None,
) -> str:
    """The prefix of the dataset that a file of raw text tokenizes to; built if the cache has none.

    An entry is a folder that appears whole. Several processes may ask at once: the first to finish
    makes the entry, and the others use it. What was reused or built is said in one line.

    Raises:
        UsageError: more than one key.
        TesselError: the file cannot be read; names file and line.
    """
    if len(json_keys) != 1:
        raise UsageError(
            f"--json-keys {' '.join(json_keys)}: raw text in --data-path is read by one key; run "
            "`tessel preprocess` with these keys and give --data-path the prefixes that it writes."
        )
    (file,) = check_inputs([path], json_keys)
    key = _key(file, tokenizer, json_keys[0], append_eod)
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    entry = root / "text" / f"{key}-{file.stem[:40]}"
    name = f"{_STEM}_{json_keys[0]}_document"
    if _is_whole(entry / name):
        log(f"{path}: tokenized before, reused from {entry}")
        return str(entry / name)
    num_workers = num_workers_for([file])

    def build(folder: Path) -> None:
        preprocess_files([file], folder / _STEM, tokenizer, json_keys, append_eod=append_eod, num_workers=num_workers)

    build_once(entry, name, build)
    log(f"{path}: {IndexedDataset(entry / name).total_tokens:,} tokens, kept in {entry}")
    return str(entry / name)


def build_once(entry: Path, name: str, build: Callable[[Path], None]) -> bool:
    """Make the folder `entry`, which holds the dataset `name`, unless it is there; whether it had to be made.

    `build` writes into another folder, which then takes the place of `entry`: it appears whole.
    """
    if _is_whole(entry / name):
        return False
    with disk_errors(entry):
        temporary = _temporary_folder(entry)
        try:
            build(temporary)
            _put_in_place(temporary, entry, Path(name))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return True


def num_workers_for(files: Sequence[Path]) -> int:
    """Processes that are worth their start for so much text."""
    size = sum(file.stat().st_size for file in files)
    return max(1, min(os.cpu_count() or 1, _MAX_WORKERS, size // _BYTES_PER_WORKER))


def content_digest(file: Path) -> str:
    """SHA-256 of what a file holds."""
    content = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            content.update(chunk)
    return content.hexdigest()


def _key(file: Path, tokenizer: Tokenizer, json_key: str, append_eod: bool) -> str:
    form = format_of(file)
    parts = {
        "version": _VERSION,
        "content": content_digest(file),
        "kind": f".{form.name}" if form is not None else "",
        "tokenizer": tokenizer.identity,
        "key": json_key,
        "eod": tokenizer.eod if append_eod else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _is_whole(prefix: Path) -> bool:
    if not prefix.parent.is_dir():
        return False
    try:
        IndexedDataset(prefix)
    except TesselError as error:
        warn_once(f"{prefix.parent} is damaged and is built again ({error})")
        return False
    return True


def _temporary_folder(entry: Path) -> Path:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", suffix=".tmp", dir=entry.parent))
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise TesselError(
            f"The cache folder {entry.parent} cannot be written ({error.strerror}); "
            "name another with --data-cache-path."
        ) from error
    # As open as the folder it is in: a cache may be shared.
    temporary.chmod(entry.parent.stat().st_mode & 0o777)
    return temporary


def _put_in_place(temporary: Path, entry: Path, name: Path) -> None:
    try:
        os.rename(temporary, entry)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _is_whole(entry / name):
            shutil.rmtree(entry)
            os.rename(temporary, entry)
        # Otherwise another process made the same entry meanwhile, and may be reading it.
