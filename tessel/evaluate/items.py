"""A question as the model gets it, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, int]
"""(subject, place among the subject's questions)."""


@dataclass(frozen=True)
class ChoiceItem:
    """Possible answers after a context; the one with the highest log-probability is the model's.

    Attributes:
        labels: what each answer is called in results.
        continuations: what is scored, each after the context.
        lengths: characters of each answer, where log-probabilities divided by them are of interest too; else empty.
        right: the labels that count as right.
    """

    key: Key
    context: str
    labels: tuple[str, ...]
    continuations: tuple[str, ...]
    right: tuple[str, ...]
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class TextItem:
    """A prompt, as text or as ids, that the model continues.

    Attributes:
        judge: from what the model wrote to (its answer, whether that is right).
        stop: strings that end the text.
    """

    key: Key
    prompt: str | tuple[int, ...]
    answer: str
    judge: Callable[[str], tuple[str, bool]]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """A row of questions.jsonl.

    Attributes:
        prediction: the model's answer; empty where what it wrote has none.
        scores: log-probability of each label, by --rule choice.
        is_right_by_length: by log-probability a character, where that is of interest.
        text: what the model wrote, by --rule generate.
    """

    key: Key
    prediction: str
    answer: str
    is_right: bool
    scores: Mapping[str, float] = field(default_factory=dict)
    is_right_by_length: bool | None = None
    text: str | None = None

    def row(self) -> dict[str, Any]:
        """For JSON."""
        row: dict[str, Any] = {
            "subject": self.key[0],
            "index": self.key[1],
            "prediction": self.prediction,
            "answer": self.answer,
            "correct": self.is_right,
        }
        if self.scores:
            row["scores"] = dict(self.scores)
        if self.is_right_by_length is not None:
            row["correct_norm"] = self.is_right_by_length
        if self.text is not None:
            row["text"] = self.text
        return row

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Outcome:
        """From a row that `row` gave.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            (str(row["subject"]), int(row["index"])),
            str(row["prediction"]),
            str(row["answer"]),
            bool(row["correct"]),
            dict(row.get("scores", {})),
            row.get("correct_norm"),
            row.get("text"),
        )


def outcome_of_scores(item: ChoiceItem, logprobs: tuple[float, ...]) -> Outcome:
    """By the log-probability of each continuation; of equal ones the first is taken, as numpy.argmax does."""
    best = max(range(len(logprobs)), key=lambda i: logprobs[i])
    by_length = None
    if item.lengths:
        ratios = [logprob / length for logprob, length in zip(logprobs, item.lengths, strict=True)]
        by_length = item.labels[ratios.index(max(ratios))] in item.right
    return Outcome(
        item.key,
        item.labels[best],
        "".join(item.right),
        item.labels[best] in item.right,
        dict(zip(item.labels, logprobs, strict=True)),
        by_length,
    )
