"""From logits to the next token. Shape suffix: V vocabulary rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessel.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest (`greedy`), or a draw.

    A draw divides the logits by `temperature`, keeps the `top_k` likeliest (0: all), then of these
    the likeliest that together hold at least `top_p` of the probability; the order is
    transformers'.

    Raises:
        UsageError: a number is out of its range.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"temperature {self.temperature} must be above 0; use greedy for the likeliest token.")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} must be at least 0; 0 keeps all tokens.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} must be above 0 and at most 1; 1 keeps all tokens.")


GREEDY = Sampling(greedy=True)


def allowed_logits(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits in fp32 after temperature, top-k and top-p; -inf for tokens that cannot be drawn. [V] -> [V].

    Of tokens with equal logits at the limit of top-k all stay. Top-p as in The Curious Case of
    Neural Text Degeneration (arXiv 1904.09751): the likeliest token always stays.
    """
    logits_V = logits_V.float() / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        limit = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < limit, float("-inf"))
    if sampling.top_p < 1:
        sorted_V, order_V = logits_V.sort(descending=True, stable=True)
        probabilities_V = sorted_V.softmax(dim=-1)
        likelier_V = probabilities_V.cumsum(dim=-1) - probabilities_V
        logits_V = logits_V.index_fill(0, order_V[likelier_V >= sampling.top_p], float("-inf"))
    return logits_V


def next_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """The next token. Draws are made on the CPU, so that one seed gives one text on every device.

    Of equal logits, greedy takes the lowest id.
    """
    if sampling.greedy:
        return int(logits_V.argmax())
    probabilities_V = allowed_logits(logits_V, sampling).softmax(dim=-1)
    return int(torch.multinomial(probabilities_V.cpu(), 1, generator=generator))
