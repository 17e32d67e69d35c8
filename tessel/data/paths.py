"""What the data flags name: a blend for all splits, or one for each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tessel.config.run import Data
from tessel.data.blend import Blend, parse_blend
from tessel.data.readers import SUFFIXES, format_of
from tessel.data.split import SPLITS
from tessel.errors import TesselError, UsageError
from tessel.runtime.files import require_path


class Sources(NamedTuple):
    """Either `shared`, divided by --split, or one blend a split, None where a split has no data."""

    shared: Blend | None
    per_split: tuple[Blend | None, ...]


def read_sources(data: Data) -> Sources:
    """The blends that --data-path and its relations name.

    Raises:
        UsageError: none of them or several that exclude each other are given.
        TesselError: a file of arguments is missing or is not what it should be.
    """
    own = (data.train_data_path, data.valid_data_path, data.test_data_path)
    given = [
        flag
        for flag, value in (
            ("--data-path", data.data_path),
            ("--data-args-path", data.data_args_path),
            ("--per-split-data-args-path", data.per_split_data_args_path),
            ("--train-data-path, --valid-data-path or --test-data-path", any(own) or None),
        )
        if value is not None
    ]
    if len(given) != 1:
        what = " and ".join(given) + " exclude each other" if given else "no data is given"
        raise UsageError(
            f"{what}: give one of --data-path, --data-args-path, --per-split-data-args-path, "
            "or --train-data-path with --valid-data-path and --test-data-path."
        )
    if data.data_path is not None:
        return Sources(_blend(data.data_path, "--data-path"), ())
    if data.data_args_path is not None:
        words = _read_text(data.data_args_path, "--data-args-path").split()
        return Sources(_blend(words, f"--data-args-path {data.data_args_path}"), ())
    if data.split is not None:
        raise UsageError(f"--split {data.split}: each split has a path of its own ({given[0]}); leave --split out.")
    if data.per_split_data_args_path is not None:
        return Sources(None, _read_per_split(data.per_split_data_args_path))
    return Sources(
        None,
        tuple(_blend(words, f"--{name}-data-path") if words else None for name, words in zip(SPLITS, own, strict=True)),
    )


def is_raw_text(path: str) -> bool:
    """Whether a data path names raw text, to be preprocessed, and not the prefix of a .bin/.idx.

    Raises:
        TesselError: it names a file of neither kind, or raw text that is not there.
    """
    file = Path(path)
    if Path(f"{path}.idx").exists() or file.suffix in (".bin", ".idx"):
        return False
    if format_of(file) is not None:
        require_path(file, "the data path")
        return True
    if file.is_file():
        raise TesselError(
            f"{path} is neither the prefix of a .bin/.idx pair nor raw text ({', '.join(SUFFIXES)}). "
            "`tessel preprocess` makes a dataset of other files."
        )
    if file.is_dir() and not Path(f"{path}.bin").exists():
        names = sorted(entry.stem if entry.suffix == ".idx" else entry.name for entry in _datasets_in(file))
        holds = f"give what it holds: {', '.join(str(file / name) for name in names[:5])}" if names else "it holds none"
        raise TesselError(
            f"The data path {path} is a folder, and the prefix of a .bin/.idx or raw text is meant; {holds}."
        )
    return False


def _datasets_in(folder: Path) -> list[Path]:
    # A .json is more often something else than text.
    return [
        entry for entry in folder.iterdir() if entry.suffix == ".idx" or (format_of(entry) and entry.suffix != ".json")
    ]


def _blend(words: Sequence[str], flag: str) -> Blend:
    if not words:
        raise UsageError(f"{flag} names no data; give a path.")
    return parse_blend(words, flag)


def _read_text(path: str, flag: str) -> str:
    """The text of a file of arguments."""
    file = require_path(path, flag)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TesselError(f"{flag} {path} is not UTF-8 text ({error.reason}). Give a file of data paths.") from error
    except OSError as error:
        raise TesselError(f"{flag} {path} cannot be read: {error.strerror}. Give a file of data paths.") from error


def _read_per_split(path: str) -> tuple[Blend | None, ...]:
    text = _read_text(path, "--per-split-data-args-path")
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise TesselError(f"--per-split-data-args-path {path} is not JSON: {error}.") from error
    if not isinstance(content, dict) or not set(content) <= set(SPLITS):
        raise TesselError(f'--per-split-data-args-path {path}: an object with "train", "valid" and "test" is expected.')
    blends = []
    for name in SPLITS:
        words = content.get(name)
        if isinstance(words, str):
            words = words.split()
        if words is not None and not isinstance(words, list):
            raise TesselError(f'--per-split-data-args-path {path}: "{name}" must be a string or a list of paths.')
        blends.append(_blend([str(word) for word in words], f"{path}: {name}") if words else None)
    return tuple(blends)
