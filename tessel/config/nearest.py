"""What a mistyped name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_SUGGESTIONS = 3
SIMILARITY = 0.72
"""Ratio of difflib below which two names have little in common."""

CERTAINTY = 0.9
"""Ratio from which one name is the other, mistyped."""


def nearest(name: str, candidates: Iterable[str], similarity: float = SIMILARITY) -> list[str]:
    """The candidates that look like `name`, best first; a single one if it is clearly the best."""
    found = difflib.get_close_matches(name, list(dict.fromkeys(candidates)), n=MAX_SUGGESTIONS, cutoff=similarity)
    if len(found) > 1:
        ratios = [difflib.SequenceMatcher(None, candidate, name).ratio() for candidate in found]
        found = [c for c, ratio in zip(found, ratios, strict=True) if ratio > ratios[0] - 0.08]
    return found
