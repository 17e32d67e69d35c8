"""What is asked of a model that generates, and what comes back, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from tessel.generate.sampling import GREEDY, Sampling

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
        prompt_ids: what the text begins with; at least one token.
        max_new_tokens: most tokens to add; the model's context may end a text sooner.
        stop_ids: tokens that end the text; they are not part of it.
        stop_strings: strings that end the text; it is cut before them.
        seed: seed of this text's draws; None draws from torch's own generator. One seed gives one text, whatever
            runs beside it.
        grammar: what the text is held to, in the words of the batcher's `guide`; None for nothing.
        num_logprobs: log-probabilities wanted: None for none, 0 for those of the tokens themselves, n for the n
            likeliest of each step as well. They are the model's: before penalty, temperature and limits.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling = GREEDY
    max_new_tokens: int = 128
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None
    num_logprobs: int | None = None
    grammar: str | None = None


class Guide(Protocol):
    """Holds a text to a grammar, token by token."""

    def allowed(self, logits_V: Tensor) -> Tensor:
        """Logits [V] with -inf for tokens that cannot come next."""
        ...

    def take(self, token: int) -> bool:
        """Go on with a token; whether the text is whole then."""
        ...


@dataclass(frozen=True)
class Event:
    """One step of one text.

    Attributes:
        request: the number that `Batcher.add` gave.
        token: the new token; None where the step brought none to show (a stop token, or cancelled).
        text: text that is certain now and was not before; often empty, never half a character.
        logprob: log-probability of `token`, if asked for.
        top: the likeliest tokens of the step with their log-probabilities, if asked for.
        finish: why the text ended; None while it goes on.
    """

    request: int
    token: int | None = None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None
