"""The figures of an evaluation: by subject, by category and in all, with their standard errors."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessel.evaluate.items import Outcome
from tessel.runtime.files import atomic_write

RESULTS = "results.json"
TABLE = "results.csv"


@dataclass(frozen=True)
class Part:
    """Some questions, and how many were answered rightly."""

    correct: int
    questions: int
    correct_norm: int | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def stderr(self) -> float:
        """Of the accuracy, from the sample's variance (n - 1), as lm-evaluation-harness has it; 0 for one question."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / max(self.questions - 1, 1))

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {
            "correct": self.correct,
            "questions": self.questions,
            "accuracy": self.accuracy,
            "stderr": self.stderr,
        }
        if self.correct_norm is not None:
            found |= {"correct_norm": self.correct_norm, "accuracy_norm": self.correct_norm / self.questions}
        return found


def part_of(outcomes: Sequence[Outcome]) -> Part:
    """Of one or more outcomes."""
    by_length = [outcome.is_right_by_length for outcome in outcomes]
    norm = None if None in by_length else sum(map(bool, by_length))
    return Part(sum(outcome.is_right for outcome in outcomes), len(outcomes), norm)


def summarize(outcomes: Sequence[Outcome], categories: Mapping[str, str], about: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json holds.

    total.accuracy is the share of all questions (micro), total.macro_accuracy the mean of the subjects'.
    """
    by_subject = _grouped((outcome.key[0], outcome) for outcome in outcomes)
    subjects = {name: part_of(rows) for name, rows in by_subject.items()}
    by_category = _grouped((categories[outcome.key[0]], outcome) for outcome in outcomes)
    macro = sum(part.accuracy for part in subjects.values()) / len(subjects)
    return {
        **about,
        "subjects": {name: part.figures() | {"category": categories[name]} for name, part in subjects.items()},
        "categories": {
            name: part_of(rows).figures() | {"macro_accuracy": _macro(name, subjects, categories)}
            for name, rows in sorted(by_category.items())
        },
        "total": part_of(outcomes).figures() | {"macro_accuracy": macro},
    }


def _grouped(pairs: Iterable[tuple[str, Outcome]]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for name, outcome in pairs:
        found.setdefault(name, []).append(outcome)
    return found


def _macro(category: str, subjects: Mapping[str, Part], categories: Mapping[str, str]) -> float:
    accuracies = [part.accuracy for name, part in subjects.items() if categories[name] == category]
    return sum(accuracies) / len(accuracies)


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """results.json, and the subjects of it as CSV."""
    with atomic_write(folder / RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    columns = list(next(iter(results["subjects"].values())))
    with atomic_write(folder / TABLE) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["subject", *columns])
        rows.writerows([name, *(part[column] for column in columns)] for name, part in results["subjects"].items())
        total = results["total"] | {"category": ""}
        rows.writerow(["total", *(total[column] for column in columns)])


def table(results: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal: a subject each, the categories, the whole."""
    rows = [_row(name, part["category"], part) for name, part in results["subjects"].items()]
    rows += [_row(f"[{name}]", "", part) for name, part in results["categories"].items()]
    total = results["total"]
    rows.append(_row("total", "", total))
    header: tuple[str, ...] = ("subject", "category", "correct", "questions", "accuracy", "stderr")
    if "accuracy_norm" in total:
        header = (*header, "by length")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]))
    lines.append(f"mean of the subjects: {total['macro_accuracy']:.4f}")
    return lines


def suite_table(results: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal as MindSpeed-LLM's evaluation.py has them: the whole, then a table of the subjects."""
    total = results["total"]
    rows = [("", "subject", "question_n", "acc")]
    parts = [*results["subjects"].items(), ("total", total)]
    rows += [(str(i), name, str(part["questions"]), f"{part['accuracy']:.6f}") for i, (name, part) in enumerate(parts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{results['task']} acc = {total['correct']}/{total['questions']}={total['accuracy']}",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
    ]


def _row(name: str, category: str, part: Mapping[str, Any]) -> tuple[str, ...]:
    row = (
        name,
        category,
        f"{part['correct']:,}",
        f"{part['questions']:,}",
        f"{part['accuracy']:.4f}",
        f"{part['stderr']:.4f}",
    )
    return (*row, f"{part['accuracy_norm']:.4f}") if "accuracy_norm" in part else row
