"""Questions of a set, as its files have them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessel.config.nearest import nearest
from tessel.errors import TesselError, UsageError
from tessel.evaluate.subjects import OTHER, subjects_of
from tessel.runtime.files import require_path

LETTERS = ("A", "B", "C", "D")
_FIELDS = ("question", *LETTERS, "answer")
_SUFFIX = re.compile(r"(?:_test|_val|_dev)?\.\w+$")


@dataclass(frozen=True)
class Question:
    """A question, by its place among the subject's, its possible answers if it has some, and the right answer.

    `more`: the other fields of its row.
    """

    index: int
    text: str
    choices: tuple[str, ...]
    answer: str
    more: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Subject:
    """A part of a set; `title` is what prompts call it, `shots` are solved questions to show."""

    name: str
    title: str
    category: str
    questions: tuple[Question, ...]
    shots: tuple[Question, ...] = ()


# ----------------------------------------------------------------------------------------- sets with letters


def read_letter_set(task: str, folder: str, num_shots: int, only: Sequence[str] = ()) -> tuple[list[Subject], str]:
    """The subjects of MMLU, C-Eval or CMMLU in a folder of CSV files, by name, and a note on those that are not there.

    The folder is that of a split, or one above it (test/, val/); solved questions come from dev/ beside the split.

    Raises:
        TesselError: there are no such files, one is damaged, or solved questions are missing.
        UsageError: a subject of `only` is not there.
    """
    split = _split_folder(Path(require_path(folder, "--data-path")), task)
    files = _files_by_subject(split, task)
    known = subjects_of(task)
    check_subjects(only, files, split)
    names = sorted(set(only)) if only else sorted(files)
    shots = _shots(split, names) if num_shots else {}
    subjects = []
    for name in names:
        category, title = known.get(name, (OTHER, name.replace("_", " ")))
        few = shots.get(name, ())
        if len(few) < num_shots:
            raise TesselError(
                f"Subject {name} has {len(few)} solved questions in dev/, fewer than --num-fewshot {num_shots}: ask "
                "for fewer."
            )
        subjects.append(Subject(name, title, category, read_letter_questions(files[name]), few))
    missing = [name for name in known if name not in files]
    note = f"{len(missing)} of {len(known)} subjects are not in {split}: {', '.join(missing)}" if missing else ""
    return subjects, "" if only else note


def check_subjects(only: Iterable[str], there: Iterable[str], folder: Path | str) -> None:
    """--subjects are all in the folder.

    Raises:
        UsageError: one is not.
    """
    there = sorted(there)
    unknown = [name for name in only if name not in there]
    if unknown:
        near = nearest(unknown[0], there)
        remedy = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(there)}"
        raise UsageError(f"--subjects {', '.join(unknown)}: not in {folder}; {remedy}.")


def _split_folder(folder: Path, task: str) -> Path:
    order = ("val", "test") if task == "ceval" else ("test", "val")
    for candidate in (folder, *(folder / part / split for part in ("", "data") for split in order)):
        if any(candidate.glob("*.csv")):
            return candidate
    raise TesselError(
        f"--data-path {folder} has no CSV files, nor have test/ and val/ in it. Give the folder of its files, such as "
        f"{'ceval/val' if task == 'ceval' else task + '/test'}."
    )


def _files_by_subject(split: Path, task: str) -> dict[str, Path]:
    """The file of each subject; where one has several splits, that which has answers."""
    order = ("_val", "_test", "") if task == "ceval" else ("_test", "_val", "")
    found: dict[str, tuple[int, Path]] = {}
    for path in sorted(split.glob("*.csv")):
        name = _SUFFIX.sub("", path.name)
        suffix = path.stem[len(name) :]
        if suffix == "_dev" and split.name != "dev":
            continue
        place = order.index(suffix) if suffix in order else len(order)
        if name not in found or place < found[name][0]:
            found[name] = place, path
    return {name: path for name, (_, path) in found.items()}


def _shots(split: Path, names: Iterable[str]) -> dict[str, tuple[Question, ...]]:
    folders = (split.parent / "dev", split)
    found, missing = {}, []
    for name in names:
        candidates = [folder / file for folder in folders for file in (f"{name}_dev.csv", f"{name}.csv")][:3]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            missing.append(name)
        else:
            found[name] = read_letter_questions(path)
    if missing:
        raise TesselError(
            f"Solved questions are missing in {folders[0]} for {', '.join(missing)}. Put their dev files there, or "
            "give --num-fewshot 0."
        )
    return found


def read_letter_questions(path: Path) -> tuple[Question, ...]:
    """The rows of a CSV file of question, A, B, C, D and answer, as text, with a header or without one.

    Raises:
        TesselError: the file or a row is not of that kind.
    """
    questions: list[Question] = []
    columns: Sequence[int] = range(len(_FIELDS))
    num_columns = len(_FIELDS)
    for number, (line, row) in enumerate(_csv_rows(path)):
        if number == 0 and (named := _columns(row)) is not None:
            columns, num_columns = named, len(row)
            if len(columns) < len(_FIELDS):
                raise TesselError(
                    f"{path} has columns {', '.join(row)}, and needs question, A, B, C, D and answer. Is this a split "
                    "without answers? Take another."
                )
            continue
        if len(row) != num_columns:
            raise TesselError(f"{path}, line {line}: {len(row)} columns, where there must be {num_columns}. Mend it.")
        text, *choices, answer = (row[column] for column in columns)
        if answer.strip() not in LETTERS:
            raise TesselError(f"{path}, line {line}: the answer is {answer!r}, and must be A, B, C or D. Mend it.")
        questions.append(Question(len(questions), text, tuple(choices), answer.strip()))
    if not questions:
        raise TesselError(f"{path} has no questions. Mend or remove it.")
    return tuple(questions)


def _csv_rows(path: Path) -> Iterable[tuple[int, list[str]]]:
    """Rows, each with the number of its last line; empty lines are left out."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            try:
                for row in rows:
                    if row:
                        yield rows.line_num, row
            except csv.Error as error:
                raise TesselError(f"{path}, line {rows.line_num}: not CSV ({error}). Mend it.") from error
    except UnicodeDecodeError as error:
        raise TesselError(f"{path} is not UTF-8 ({error}). Convert it.") from error


def _columns(row: Sequence[str]) -> list[int] | None:
    """Where a header has the fields; None where the row is none."""
    cells = [cell.strip().lower() for cell in row]
    if "question" not in cells or not {"a", "b", "c", "d"} <= set(cells):
        return None
    return [cells.index(field.lower()) for field in _FIELDS if field.lower() in cells]


# ----------------------------------------------------------------------------------------- JSON


def read_json_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, each with the `needed` fields.

    Raises:
        TesselError: a line is no such object.
    """
    return parse_json_lines(path.read_bytes(), path, *needed)


def parse_json_lines(content: bytes, path: Path, *needed: str) -> list[dict[str, Any]]:
    """As `read_json_lines`, of what a file at `path` holds.

    Raises:
        TesselError: a line is no such object, or there is none.
    """
    rows = []
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TesselError(f"{path} is not UTF-8 ({error}). Convert it.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TesselError(f"{path}, line {number}, is not JSON ({error}). Mend it.") from error
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing:
            raise TesselError(f"{path}, line {number}, has no field {missing[0]!r}. Is this the set's file?")
        rows.append(row)
    if not rows:
        raise TesselError(f"{path} has no questions. Mend or remove it.")
    return rows


def set_files(folder: str, pattern: str, what: str) -> list[Path]:
    """The files of a set, by name; `folder` may also be one file.

    Raises:
        TesselError: there are none.
    """
    path = Path(require_path(folder, "--data-path"))
    found = [path] if path.is_file() else sorted(path.glob(pattern)) or sorted(path.glob(f"**/{pattern}"))
    if not found:
        raise TesselError(f"--data-path {path} has no {pattern}: give the folder of {what}.")
    return found


# ----------------------------------------------------------------------------------------- fewer


def limited(subjects: Sequence[Subject], limit: int | None, of_each: int | None) -> list[Subject]:
    """The first questions of each subject: at most `of_each`, and `limit` in all, dealt out evenly."""
    counts = [len(s.questions) if of_each is None else min(of_each, len(s.questions)) for s in subjects]
    if limit is not None:
        taken = [0] * len(counts)
        left = limit
        while left > 0 and taken != counts:
            for i, count in enumerate(counts):
                if left > 0 and taken[i] < count:
                    taken[i] += 1
                    left -= 1
        counts = taken
    pairs = zip(subjects, counts, strict=True)
    return [replace(subject, questions=subject.questions[:count]) for subject, count in pairs if count]
