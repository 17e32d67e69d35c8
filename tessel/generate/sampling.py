"""From logits to the next token. Shape suffix: V vocabulary rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessel.errors import UsageError

# So many likeliest tokens are looked at first; a top-p that needs more sorts the whole vocabulary.
_FIRST_CANDIDATES = 1024


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest (`greedy`), or a draw.

    First, whichever it is, the logits of tokens that the text already has are divided by `repetition_penalty`
    where they are positive and multiplied by it where they are not (CTRL, arXiv 1909.05858). Then a draw divides
    the logits by `temperature`, keeps the `top_k` likeliest (0: all), of these the likeliest that together hold at
    least `top_p` of the probability, and of these the ones with at least `min_p` times the probability of the
    likeliest (arXiv 2407.01082). The order is transformers'.

    Raises:
        UsageError: a number is out of its range.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"temperature {self.temperature} must be above 0; use greedy for the likeliest token.")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} must be at least 0; 0 keeps all tokens.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} must be above 0 and at most 1; 1 keeps all tokens.")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p {self.min_p} must be from 0 to 1; 0 keeps all tokens.")
        if not self.repetition_penalty > 0:
            raise UsageError(f"repetition_penalty {self.repetition_penalty} must be above 0; 1 is none.")


GREEDY = Sampling(greedy=True)


def penalized(logits_V: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """Logits with those of the `seen` tokens (i64, any number of times each) made less likely; a copy if changed."""
    if seen is None or penalty == 1.0:
        return logits_V
    of_seen = logits_V[seen]
    return logits_V.index_put((seen,), torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty))


def allowed_logits(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Logits in fp32 after temperature, top-k, top-p and min-p; -inf for tokens that cannot be drawn. [V] -> [V].

    Of tokens with equal logits at the limit of top-k all stay. Top-p as in The Curious Case of
    Neural Text Degeneration (arXiv 1904.09751): the likeliest token always stays.
    """
    values, order = _candidates(logits_V, sampling)
    return torch.full_like(logits_V, float("-inf"), dtype=torch.float32).index_copy(0, order, values)


def _candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, likeliest first: their logits in fp32 after temperature, and their ids."""
    logits_V = logits_V.float() / sampling.temperature
    limited = sampling.top_p < 1 or sampling.min_p > 0
    if sampling.top_k == 0 and not limited:
        return logits_V, torch.arange(len(logits_V), device=logits_V.device)
    count = min(sampling.top_k or _FIRST_CANDIDATES, len(logits_V))
    values, order = logits_V.topk(count)
    if sampling.top_k and count < len(logits_V) and int((logits_V >= values[-1]).sum()) > count:
        values, order = logits_V.sort(descending=True, stable=True)
        values = values[: int((values >= values[count - 1]).sum())]
    # Probabilities are those within what top-k leaves.
    total = (values if sampling.top_k else logits_V).logsumexp(dim=-1)
    if not sampling.top_k and count < len(logits_V) and not _reaches(values, total, sampling):
        values, order = logits_V.sort(descending=True, stable=True)
    probabilities = (values - total).exp()
    stays = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.top_p < 1:
        stays = probabilities.cumsum(dim=-1) - probabilities < sampling.top_p
        stays[0] = True
    if sampling.min_p > 0:
        stays &= probabilities >= sampling.min_p * probabilities[0]
    num_left = int(stays.sum())  # both limits keep a beginning
    return values[:num_left], order[:num_left]


def _reaches(values: Tensor, total: Tensor, sampling: Sampling) -> bool:
    """Whether the end of what may be drawn lies within these, the likeliest."""
    by_top_p = sampling.top_p < 1 and float((values - total).exp().sum()) >= sampling.top_p
    return by_top_p or (sampling.min_p > 0 and float((values[-1] - values[0]).exp()) < sampling.min_p)


def next_token(
    logits_V: Tensor, sampling: Sampling, generator: torch.Generator | None = None, seen: Tensor | None = None
) -> int:
    """The next token. Draws are made on the CPU, so that one seed gives one text on every device.

    Of equal logits, greedy takes the lowest id. `seen`: the tokens of the text, for the repetition penalty.
    """
    logits_V = penalized(logits_V, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return int(logits_V.argmax())
    values, order = _candidates(logits_V, sampling)
    drawn = torch.multinomial(values.softmax(dim=-1).cpu(), 1, generator=generator)
    return int(order[int(drawn)])
