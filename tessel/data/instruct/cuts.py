"""Dialogues that are too long: which tokens of which turns are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tessel.data.instruct.shorten import shares_of
from tessel.data.instruct.templates import DEEPSEEK4, MODERN, REASONING, Template

if TYPE_CHECKING:
    from tessel.data.instruct.rendering import RenderOptions

Turn = tuple[int, int, int]
"""First segment of a question, first of its answer, and the end."""


def share_proportionally(num_question: int, num_answer: int, budget: int) -> tuple[int, int]:
    """Most tokens of question and answer: LLaMA-Factory 0.8's infer_max_len."""
    most_answer = max(int(budget * (num_answer / (num_question + num_answer))), 1)
    return budget - min(most_answer, num_answer), most_answer


def cut_turns(
    lengths: np.ndarray,
    turns: Sequence[Turn],
    before: Sequence[Turn] | None,
    template: Template,
    options: RenderOptions,
) -> None:
    """Shorten the segments of a dialogue in `lengths` (i64, of all segments) until it has `options.max_tokens`.

    Later turns go when the budget is used up; with --mask-history the earlier ones go first. Where
    `before` is given, the prompt is cut as that of those turns was, and the last answer alone is cut here.
    """
    modern = template.kind in (MODERN, REASONING, DEEPSEEK4)
    assert options.max_tokens is not None
    budget = options.max_tokens - int(modern)
    share = shares_of if modern else share_proportionally
    ordered = list(reversed(turns)) if options.mask_history else list(turns)
    for first, middle, end in ordered:
        question, answer = int(lengths[first:middle].sum()), int(lengths[middle:end].sum())
        if budget <= 0 or not question + answer:
            _shorten(lengths, first, end, 0)
            continue
        most_question, most_answer = share(question, answer, budget)
        _shorten(lengths, first, middle, most_question)
        _shorten(lengths, middle, end, most_answer)
        budget -= int(lengths[first:end].sum())
        if options.max_turn_tokens is not None:
            kept = int(lengths[first:middle].sum()), int(lengths[middle:end].sum())
            most_question, most_answer = shares_of(*kept, options.max_turn_tokens)
            _shorten(lengths, first, middle, most_question)
            _shorten(lengths, middle, end, most_answer)
    if before is not None:
        for (first, middle, _), (other, _, _) in zip(turns, before, strict=True):
            lengths[first:middle] = lengths[other : other + middle - first]
        for (_, middle, end), (_, other, _) in zip(turns[:-1], before[:-1], strict=True):
            lengths[middle:end] = lengths[other : other + end - middle]


def _shorten(lengths: np.ndarray, first: int, end: int, most: int) -> None:
    for segment in range(first, end):
        lengths[segment] = min(int(lengths[segment]), most)
        most -= int(lengths[segment])
