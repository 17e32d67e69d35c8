"""Two evaluations of the same questions, by McNemar's exact test.

Of the questions that one answers rightly and the other does not, each is as likely to have them if both are as good:
p is that of a two-sided binomial test with 1/2 (McNemar 1947, doi:10.1007/BF02295996; exact form).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessel.errors import TesselError, UsageError
from tessel.evaluate.items import Key, Outcome
from tessel.evaluate.store import QUESTIONS, SETTINGS, read_outcomes
from tessel.runtime.files import atomic_write, require_path

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """`only_first`, `only_second`: questions that one of the two alone answered rightly."""

    questions: int
    first_correct: int
    second_correct: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second."""
        return (self.only_first - self.only_second) / self.questions

    @property
    def stderr(self) -> float:
        """Of the difference, from those of the questions (-1, 0 or 1)."""
        mean = self.difference
        squares = (self.only_first + self.only_second) / self.questions
        return math.sqrt((squares - mean * mean) / max(self.questions - 1, 1))

    @property
    def p_value(self) -> float:
        """Of a difference at least as large, were both as good."""
        return binomial_p(self.only_first, self.only_second)


def binomial_p(first: int, second: int) -> float:
    """Two-sided p of `first` heads and `second` tails of a fair coin."""
    tosses = first + second
    ways, term = 0, 1
    for k in range(min(first, second) + 1):
        ways += term
        term = term * (tosses - k) // (k + 1)
    return min(1.0, 2 * ways / (1 << tosses))


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Two folders of --output, by the questions that both have.

    Raises:
        TesselError: a folder has no questions.
        UsageError: the two are of different sets, or have no question in common.
    """
    answers, others = _outcomes(first), _outcomes(second)
    tasks = [
        json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8")).get("task") for folder in (first, second)
    ]
    if tasks[0] != tasks[1]:
        raise UsageError(f"{first} is of {tasks[0]} and {second} of {tasks[1]}: only one set can be compared.")
    common = [key for key in answers if key in others]
    if not common:
        raise UsageError(f"{first} and {second} have no question in common: evaluate both with the same --limit.")
    pairs = [(answers[key].is_right, others[key].is_right) for key in common]
    return Comparison(
        len(pairs),
        sum(a for a, _ in pairs),
        sum(b for _, b in pairs),
        sum(a and not b for a, b in pairs),
        sum(b and not a for a, b in pairs),
    )


def _outcomes(folder: str | Path) -> dict[Key, Outcome]:
    path = require_path(folder, "a folder to compare")
    if not (path / QUESTIONS).is_file() or not (path / SETTINGS).is_file():
        raise TesselError(f"{path} has no {QUESTIONS} and {SETTINGS}: it is not what tessel evaluate --output made.")
    return {outcome.key: outcome for outcome in read_outcomes(path / QUESTIONS)}


def describe(found: Comparison, first: str, second: str) -> list[str]:
    """Lines for the terminal."""
    n = found.questions
    return [
        f"{n:,} questions in both: {first} {found.first_correct / n:.4f}, {second} {found.second_correct / n:.4f}; "
        f"difference {found.difference:+.4f} with a standard error of {found.stderr:.4f}",
        f"right in the first alone {found.only_first:,}, in the second alone {found.only_second:,}: p = "
        f"{found.p_value:.3g} (McNemar's exact test)",
    ]


def write_comparison(folder: Path, found: Comparison, other: str) -> None:
    """comparison.json beside the results."""
    row: dict[str, Any] = {
        "other": other,
        **vars(found),
        "difference": found.difference,
        "stderr": found.stderr,
        "p_value": found.p_value,
    }
    with atomic_write(folder / COMPARISON) as temporary:
        temporary.write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
