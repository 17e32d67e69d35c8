"""The folder of --output: what it was made with, and a row for each question as soon as it is answered.

Of several replicas each adds to a file of its own; at the end there is one, questions.jsonl, in the order of the
questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tessel.errors import TesselError, UsageError
from tessel.evaluate.items import Key, Outcome
from tessel.runtime.files import atomic_write, disk_errors

QUESTIONS = "questions.jsonl"
SETTINGS = "settings.json"


def read_done(folder: Path, settings: Mapping[str, Any], keys: Sequence[Key]) -> dict[Key, Outcome]:
    """The outcomes of an earlier, perhaps interrupted, evaluation with the same settings.

    Raises:
        UsageError: the folder is of other settings, or has questions that are not among `keys`.
        TesselError: a file in it is damaged.
    """
    path = folder / SETTINGS
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TesselError(f"{path} is not JSON ({error}). Take another --output, or remove it.") from error
        for name, value in settings.items():
            if earlier.get(name) != value:
                raise UsageError(
                    f"--output {folder} holds an evaluation with {name} {earlier.get(name)!r}, and this one has "
                    f"{value!r}. Take another folder, or remove it."
                )
    elif (folder / QUESTIONS).exists():
        raise UsageError(f"--output {folder} has {QUESTIONS} and no {SETTINGS}, so nothing is added. Take another.")
    done: dict[Key, Outcome] = {}
    for part in sorted(folder.glob("questions*.jsonl")):
        done |= {outcome.key: outcome for outcome in read_outcomes(part)}
    others = done.keys() - set(keys)
    if others:
        raise UsageError(
            f"--output {folder} has {len(others)} questions that are not asked now, such as {min(others)}: raise "
            "--limit, or take another folder."
        )
    return done


def read_outcomes(path: Path) -> list[Outcome]:
    """The rows of a questions.jsonl; a last line that is not whole is left out.

    Raises:
        TesselError: a line is no such row.
    """
    content = path.read_bytes()
    outcomes = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            outcomes.append(Outcome.of(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise TesselError(f"{path}, line {number}, is not the answer to a question. Move the file away.") from error
    return outcomes


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """What the evaluation is made with."""
    with atomic_write(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def added_rows(folder: Path | None, replica: int, num_replicas: int) -> Iterator[TextIO | None]:
    """The file to which a replica adds rows, after its last whole one; None without a folder."""
    if folder is None:
        yield None
        return
    path = folder / (QUESTIONS if num_replicas == 1 else f"questions.{replica:05d}.jsonl")
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        with open(path, "a", encoding="utf-8") as lines:
            yield lines


def add(file: TextIO | None, outcome: Outcome) -> None:
    """Write a row, at once."""
    if file is not None:
        file.write(_line(outcome))
        file.flush()


def write_all(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """questions.jsonl with all rows, in their order, instead of the replicas' files."""
    with atomic_write(folder / QUESTIONS) as temporary:
        temporary.write_text("".join(_line(outcome) for outcome in outcomes), encoding="utf-8")
    for part in folder.glob("questions.*.jsonl"):
        part.unlink()


def _line(outcome: Outcome) -> str:
    return json.dumps(outcome.row(), ensure_ascii=False) + "\n"
