"""lm-evaluation-harness's tasks read from the user's folders instead of the hub.

For each task a leaf is written that includes the harness's own and replaces its data set; in a folder that is given
as its include path, such leaves stand in for the built-in tasks of the same names, and groups pick them up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tessel.errors import TesselError, UsageError
from tessel.evaluate.questions import LETTERS, Question, read_letter_set
from tessel.runtime.files import require_path

if TYPE_CHECKING:
    from datasets import DatasetDict

# Group of the harness -> the set, as `tessel evaluate --task` calls it.
_LETTER_GROUPS = {"mmlu": "mmlu", "ceval-valid": "ceval", "cmmlu": "cmmlu"}
_ALIASES = {"ceval": "ceval-valid", "c-eval": "ceval-valid"}
_SPLITS = {"train": "train", "valid": "validation", "val": "validation", "dev": "dev", "test": "test"}
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_LOADER = '''"""Reads sets of questions for lm-evaluation-harness."""

from tessel.evaluate.harness_data import letter_dataset


def letters(task, root, subject, **_):
    return letter_dataset(task, root, subject)
'''


def data_dirs(words: Sequence[str]) -> dict[str, Path]:
    """--data-dir TASK=DIR ... as a table.

    Raises:
        UsageError: a word has no "=", or a task stands there twice.
        TesselError: a folder is not there.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        name = _ALIASES.get(name, name)
        if not equals or not name or not folder:
            raise UsageError(f"--data-dir {word}: write TASK=DIR, such as cmmlu=/data/cmmlu.")
        if name in found:
            raise UsageError(f"--data-dir names {name} twice: keep one folder.")
        found[name] = require_path(folder, f"--data-dir {name}=")
    return found


def write_leaves(target: Path, folders: Mapping[str, Path], yaml_of: Mapping[str, Path]) -> None:
    """Write the leaves of `folders` to `target`. `yaml_of`: the harness's own file of each of its tasks.

    Raises:
        UsageError: a task is unknown to the harness.
        TesselError: a folder has none of the task's files.
    """
    (target / "loader.py").write_text(_LOADER, encoding="utf-8")
    for name, folder in folders.items():
        if name in _LETTER_GROUPS:
            for subject in _subjects(name, folder):
                leaf = f"{name}_{subject}"
                if leaf in yaml_of:
                    kwargs = {"task": _LETTER_GROUPS[name], "root": str(folder.resolve()), "subject": subject}
                    _write_leaf(target, leaf, yaml_of, {"dataset_kwargs": kwargs}, loader="letters")
        elif name in yaml_of:
            builder, files = _data_files(name, folder)
            _write_leaf(
                target,
                name,
                yaml_of,
                {"dataset_path": builder, "dataset_name": None, "dataset_kwargs": {"data_files": files}},
            )
        else:
            raise UsageError(
                f"--data-dir {name}={folder}: lm-evaluation-harness has no task {name}. Give "
                f"{', '.join(_LETTER_GROUPS)}, or the name of a single task."
            )


def _write_leaf(
    target: Path, name: str, yaml_of: Mapping[str, Path], changes: Mapping[str, Any], loader: str | None = None
) -> None:
    text = yaml.safe_dump({"include": str(yaml_of[name]), **changes}, allow_unicode=True, sort_keys=False)
    if loader is not None:
        text += f"custom_dataset: !function loader.{loader}\n"
    (target / f"{name}.yaml").write_text(text, encoding="utf-8")


def _subjects(name: str, folder: Path) -> list[str]:
    subjects, _ = read_letter_set(_LETTER_GROUPS[name], str(folder), 0)
    return [subject.name for subject in subjects]


def _data_files(name: str, folder: Path) -> tuple[str, dict[str, str]]:
    """The `datasets` builder of the files in a folder, and the file of each split, by its name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("**/*")):
        split = next((split for word, split in _SPLITS.items() if word in path.stem.lower()), None)
        if path.suffix in _BUILDERS and split is not None:
            found.setdefault(split, path.resolve())
    builders = {_BUILDERS[path.suffix] for path in found.values()}
    if len(builders) != 1:
        raise TesselError(
            f"--data-dir {name}={folder} must have files of one kind (.jsonl, .json, .csv or .parquet) with train, "
            "validation or test in their names. Name them so."
        )
    return builders.pop(), {split: str(path) for split, path in found.items()}


def letter_dataset(task: str, root: str, subject: str) -> DatasetDict:
    """A subject of MMLU, C-Eval or CMMLU with the columns that the harness's tasks read: all text, no guessed types."""
    from datasets import Dataset, DatasetDict

    (found,), _ = read_letter_set(task, root, 0, [subject])
    splits = {"val" if task == "ceval" else "test": found.questions}
    if shots := _dev(task, root, subject):
        splits["dev"] = shots
    return DatasetDict({split: Dataset.from_list(_rows(task, subject, rows)) for split, rows in splits.items()})


def _dev(task: str, root: str, subject: str) -> tuple[Question, ...]:
    """All solved questions; none where there is no dev/."""
    for number in (5, 1):
        try:
            (found,), _ = read_letter_set(task, root, number, [subject])
        except TesselError:
            continue
        return found.shots
    return ()


def _rows(task: str, subject: str, questions: Sequence[Question]) -> list[dict[str, Any]]:
    if task == "mmlu":
        return [
            {"question": q.text, "subject": subject, "choices": list(q.choices), "answer": LETTERS.index(q.answer)}
            for q in questions
        ]
    question, answer = ("Question", "Answer") if task == "cmmlu" else ("question", "answer")
    return [{question: q.text, **dict(zip(LETTERS, q.choices, strict=True)), answer: q.answer} for q in questions]
