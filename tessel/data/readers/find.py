"""Which files an --input names: files, folders, globs, datasets of the Hub; and whether they can be read."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tessel.data.readers.block import BLOCK_BYTES, COMPRESSIONS, KINDS, SUFFIXES, TEXT_KEY, Damage, format_of
from tessel.data.readers.csv_rows import csv_header
from tessel.data.readers.hub import hub_files, looks_like_hub
from tessel.data.readers.stream import Stream
from tessel.data.readers.tables import table_columns
from tessel.errors import TesselError, UsageError
from tessel.runtime.files import require_path
from tessel.runtime.log import log

_LIST = f"{', '.join(SUFFIXES[:-1])} and {SUFFIXES[-1]} are; text formats also with {' or '.join(COMPRESSIONS)}"
_GLOB = re.compile(r"[*?\[]")
# What `datasets` puts beside its .arrow files, and a repository of the Hub beside its data.
_SIDE_FILES = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))
# Which of equally many files a folder is taken to be of.
_PREFERENCE = ("parquet", "arrow", "csv", "json", "jsonl", "txt")


def find_inputs(args: Sequence[str | Path], compatible: str | None = None) -> list[Path]:
    """The files that are named, in the order given, those of a folder or a glob sorted by name.

    A folder stands for the files in it, not those of its folders, that are read here; all of one
    format. With `compatible` "mindspeed", the format of most files is taken, and that is said.
    `hub:NAME` is a dataset of the Hub, and so is OWNER/NAME where no such path exists.

    Raises:
        UsageError: nothing is named, or a folder's files are of several formats.
        TesselError: nothing of that name is there, or it holds nothing that is read here.
    """
    if not args:
        raise UsageError("Name at least one --input: a file, a folder or a glob.")
    files: list[Path] = []
    for arg in args:
        text = str(arg)
        path = Path(arg)
        if path.is_dir():
            files.extend(_in_folder(path, compatible))
        elif path.exists():
            files.append(path)
        elif looks_like_hub(text):
            files.extend(hub_files(text))
        elif _GLOB.search(text):
            files.extend(_in_glob(text))
        else:
            files.append(require_path(path, "the input"))
    return files


def _in_folder(folder: Path, compatible: str | None) -> list[Path]:
    script = folder / f"{folder.absolute().name}.py"
    if compatible == "mindspeed" and script.exists():
        raise TesselError(
            f"The input {folder} has a loading script, {script.name}, which is never run here. "
            "Run it by `datasets`, save what it gives as .parquet, and name that."
        )
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise TesselError(f"The input {folder} cannot be read: {error.strerror}.") from error
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        form = format_of(file)
        if form is not None and file.name not in _SIDE_FILES:
            by_kind.setdefault(form.kind, []).append(file)
    if not by_kind:
        others = Counter(file.suffix or "no extension" for file in files)
        holds = f"holds {_counts(others)}" if others else "is empty"
        raise TesselError(f"The input {folder} {holds}: nothing that is read here; {_LIST}.")
    if len(by_kind) == 1:
        return next(iter(by_kind.values()))
    counts = _counts(Counter({f".{kind}": len(by_kind[kind]) for kind in KINDS if kind in by_kind}))
    chosen = max(by_kind, key=lambda kind: (len(by_kind[kind]), -_PREFERENCE.index(kind)))
    if compatible != "mindspeed":
        raise UsageError(
            f"The input {folder} mixes formats: {counts}. Name the files of one, such as '{folder}/*.{chosen}'."
        )
    log(f"{folder} has {counts}; the {len(by_kind[chosen])} .{chosen} are read, the most there are of one format")
    return by_kind[chosen]


def _in_glob(pattern: str) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
    if not files:
        raise TesselError(f"The input {pattern} matches no file.")
    return files


def _counts(counts: Counter[str]) -> str:
    return " and ".join(f"{number} {suffix}" for suffix, number in counts.most_common())


def check_inputs(
    paths: Sequence[str | Path], keys: Sequence[str] | None, compatible: str | None = None, *, may_skip: bool = False
) -> list[Path]:
    """The input files (see `find_inputs`), seen to be of a kind that is read here, and to fit the keys.

    Without `keys` no columns are looked for. With `may_skip`, a file that is damaged is left for
    `read_blocks` to note.

    Raises:
        UsageError: no file or no key, the same one twice, or other keys than "text" for .txt.
        TesselError: a file does not exist, has another extension, is empty, may not be read, or lacks a column.
    """
    if not paths or (keys is not None and not keys):
        raise UsageError("Name at least one --input file and at least one of --json-keys.")
    doubled = [key for i, key in enumerate(keys or ()) if key in (keys or ())[:i]]
    if doubled:
        raise UsageError(f"--json-keys names {doubled[0]} twice; each key is written to a file of its own, once.")
    files = find_inputs(paths, compatible)
    for path in files:
        _check_file(path)
        if keys is not None:
            _check_columns(path, keys, may_skip)
    return files


def _check_file(path: Path) -> None:
    if path.suffix == ".py":
        raise TesselError(
            f"The input {path} is a loading script, which is never run here. "
            "Run it by `datasets`, save what it gives as .parquet, and name that."
        )
    if format_of(path) is None:
        raise TesselError(
            f"The input {path}: {path.suffix or 'no extension'} is not read; {_LIST}. "
            'Convert it to one JSON object a line ({"text": "..."}), or to one document a line.'
        )
    if not os.access(path, os.R_OK):
        raise TesselError(f"The input {path} cannot be read: permission denied. Change its mode or its owner.")
    if path.stat().st_size == 0:
        raise TesselError(f"The input {path} is empty: there is no text to tokenize.")


def _check_columns(path: Path, keys: Sequence[str], may_skip: bool) -> None:
    form = format_of(path)
    assert form is not None, "_check_file has seen to it"
    if form.kind == "txt" and list(keys) != [TEXT_KEY]:
        raise UsageError(f"--json-keys {' '.join(keys)}: {path} has lines, not keys; leave --json-keys out.")
    try:
        names = columns_of(path)
    except Damage as damage:
        if may_skip:
            return
        raise TesselError(f"The input {path}: {damage.reason}") from damage
    for key in keys if names is not None else ():
        if names is not None and key not in names:
            has = f"it has {', '.join(names[:8])}" if names else "it has none"
            raise TesselError(f"The input {path} has no column {key!r}; {has}. Choose with --json-keys.")


def columns_of(path: Path) -> list[str] | None:
    """The columns of a file that names them once; None for .json, .jsonl and .txt.

    Raises:
        Damage: it is not what its extension says, or its columns cannot be.
    """
    form = format_of(path)
    if form is None or form.kind not in ("parquet", "arrow", "csv"):
        return None
    if form.kind == "csv":
        with Stream(path, form) as stream:
            return list(csv_header(str(path), stream, BLOCK_BYTES)[0])
    names = table_columns(str(path), form.kind)
    doubled = [name for i, name in enumerate(names) if name in names[:i]]
    if doubled:
        raise Damage(1, f"the column {doubled[0]!r} is there twice. Write the file again with other names.")
    return names
