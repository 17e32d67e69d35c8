"""What a prompt type gives: ids and labels of dialogues, and what the command line says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from tessel.data.instruct.dialogue import Dialogue, Example
from tessel.data.instruct.vocabulary import Vocabulary

NO_LIMIT = 100_000
"""Tokens at which MindSpeed-LLM cuts a dialogue without --seq-length."""
NO_PAIR_LIMIT = 1_000_000
"""Tokens at which it cuts preferences, with or without."""


class Rendered(NamedTuple):
    """One dialogue: ids i32[N], labels i32[N], -100 where a token is not trained."""

    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class RenderOptions:
    """What the command line says about rendering.

    Attributes:
        max_tokens: turns are cut to fit; None leaves them whole.
        max_turn_tokens: then each turn is cut to fit, once more.
        append_eod: end with the vocabulary's eod, trained.
        thinking: None leaves the answers as they are, False takes their thoughts out, True trains empty ones.
        drop_thinking: take the thoughts out of all answers but the last.
        exact_thoughts: only thought words with the blanks around them are a thought.
        effort: of reasoning, for chat templates.
    """

    max_tokens: int | None = None
    max_turn_tokens: int | None = None
    append_eod: bool = False
    train_on_prompt: bool = False
    mask_history: bool = False
    thinking: bool | None = None
    drop_thinking: bool = False
    exact_thoughts: bool = False
    effort: str | None = None


class Renderer(Protocol):
    """What the encoders, the preview, chat and serving know of a prompt type. Can be pickled."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def dialogues(self, dialogues: Sequence[Dialogue]) -> list[Rendered]:
        """Each dialogue as it is trained.

        Raises:
            TesselError: a dialogue cannot be written in this prompt type.
        """

    def preferences(self, examples: Sequence[Example]) -> list[Rendered]:
        """The chosen and the rejected dialogue of each example, one after the other; the last answer alone trained."""

    def prompts(self, dialogues: Sequence[Dialogue]) -> list[np.ndarray]:
        """i32 ids of each dialogue, which ends with a question, up to where the assistant answers."""
