"""Beam search: several continuations of a text at once, the likeliest of them kept at each step.

A beam's score is the sum of its tokens' log-probabilities. One that ends leaves the search, and its score is
divided by (number of new tokens) ** length_penalty. The rules, of which the stopping is the subtle part, are those
of transformers (its `_beam_search`), so that sequences and scores are the same.

Shape suffixes: W beams, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tessel.errors import UsageError
from tessel.generate.batcher import Model, check_prompt
from tessel.generate.cache import KeyValueCache
from tessel.generate.sampling import GREEDY, Sampling, allowed_logits, penalized

# The score of what is not to be chosen. Finite, as in transformers: such beams fill up a search that lacks others.
_NEVER = -1.0e9

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class BeamOptions:
    """How beams are searched.

    `length_penalty` above 0 favours longer texts, below 0 shorter ones. `early_stopping`: True ends as soon as
    `num_beams` texts have ended; False when no running beam is better at its present length than the worst of
    them; "never" when none could become better.

    Raises:
        UsageError: fewer than two beams, or an unknown way to stop.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        if self.num_beams < 2:
            raise UsageError(f"num_beams {self.num_beams} must be at least 2; without beams, leave it out.")
        if self.early_stopping not in (True, False, "never"):
            raise UsageError(f"early_stopping {self.early_stopping!r} must be True, False or 'never'.")


@dataclass(frozen=True)
class Beam:
    """A text that was found: its new tokens, with the stop token if that ended it, and its score."""

    tokens: tuple[int, ...]
    score: float


@dataclass
class _Search:
    """Running beams, and the best of those that have ended."""

    options: BeamOptions
    max_new_tokens: int
    stop_ids: frozenset[int]
    tokens: list[tuple[int, ...]]
    scores: list[float]
    ended: list[Beam] = field(default_factory=list)
    can_improve: bool = True
    num_new: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.ended) == self.options.num_beams

    def advance(self, candidates: Sequence[tuple[float, int, int]]) -> list[int]:
        """Take the step's best (score, beam, token); returns the beam that each running one goes on from.

        Empty where the search is over.
        """
        self.num_new += 1
        is_last = self.num_new == self.max_new_tokens
        ends = [is_last or token in self.stop_ids for _, _, token in candidates]
        self._end(candidates[: self.options.num_beams], ends)
        if all(ends):
            return []
        going_on = [candidate for candidate, end in zip(candidates, ends, strict=True) if not end]
        going_on = going_on[: self.options.num_beams]
        sources = [beam for _, beam, _ in going_on]
        self.tokens = [(*self.tokens[beam], token) for _, beam, token in going_on]
        self.scores = [score for score, _, _ in going_on]
        self._judge()
        is_over = not self.can_improve or (self.options.early_stopping is True and self.is_full)
        return [] if is_over else sources

    def _end(self, candidates: Sequence[tuple[float, int, int]], ends: Sequence[bool]) -> None:
        """Of the best candidates, as many as there are beams, those that end are results if they are good enough."""
        if not self.can_improve or (self.options.early_stopping is True and self.is_full):
            return
        divisor = self.num_new**self.options.length_penalty
        for (score, beam, token), end in zip(candidates, ends, strict=False):
            if end:
                self.ended.append(Beam((*self.tokens[beam], token), score / divisor))
        self.ended.sort(key=lambda found: -found.score)
        del self.ended[self.options.num_beams :]

    def _judge(self) -> None:
        """Whether the best running beam could still be better than the worst result."""
        if not self.is_full:
            return
        penalty = self.options.length_penalty
        to_the_end = self.options.early_stopping == "never" and penalty > 0
        length = self.max_new_tokens if to_the_end else self.num_new
        self.can_improve = self.can_improve and self.scores[0] / length**penalty > self.ended[-1].score


@torch.inference_mode()
def beam_search(
    model: Model,
    prompt_ids: Sequence[int],
    options: BeamOptions,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Beam]:
    """The best continuations of a text, `num_beams` of them at most, the best first.

    The model's context may end texts sooner than `max_new_tokens`. Unless `sampling` is greedy, beams are drawn by
    their probabilities, without replacement, after its penalty, temperature and limits.

    Raises:
        TesselError: see `check_prompt`.
    """
    check_prompt(model.config, prompt_ids)
    width, device = options.num_beams, torch.device(device)
    room = model.config.max_position_embeddings + 1 - len(prompt_ids)
    cache = KeyValueCache()
    first = cache.open(len(prompt_ids))
    logits_WV = _forward(model, cache, [first], [tuple(prompt_ids)], device).expand(width, -1)
    slots = [first, *(cache.fork(first, len(prompt_ids)) for _ in range(width - 1))]
    scores = [0.0] + [_NEVER] * (width - 1)
    search = _Search(options, min(max_new_tokens, room), frozenset(stop_ids), [()] * width, scores)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    while True:
        scores_WV = _scores(logits_WV, search, prompt_ids, sampling)
        sources = search.advance(_best(scores_WV, search, sampling, generator))
        if not sources:
            return search.ended
        cache.reorder(slots, [slots[source] for source in sources])
        logits_WV = _forward(model, cache, slots, [tokens[-1:] for tokens in search.tokens], device)


def _forward(
    model: Model, cache: KeyValueCache, slots: Sequence[int], tokens: Sequence[tuple[int, ...]], device: torch.device
) -> Tensor:
    """Logits [W, V] after the new tokens of each slot, in the order of `slots`."""
    order = cache.sorted_slots(slots)
    at = {slot: number for number, slot in enumerate(slots)}
    row = [tokens[at[slot]] for slot in order]
    cache.stage((slot, len(new)) for slot, new in zip(order, row, strict=True))
    tokens_1N = torch.tensor([token for new in row for token in new], device=device)[None]
    logits_1WV = model(tokens_1N, cache.positions(device), cache=cache, logits=cache.last_tokens().to(device))
    cache.commit()
    place = {slot: number for number, slot in enumerate(order)}
    return logits_1WV[0, [place[slot] for slot in slots]]


def _scores(logits_WV: Tensor, search: _Search, prompt_ids: Sequence[int], sampling: Sampling) -> Tensor:
    """Of each beam with each token after it: the beam's score and the token's log-probability, fp32 [W, V]."""
    logprobs_WV = logits_WV.float().log_softmax(dim=-1)
    if not sampling.greedy or sampling.repetition_penalty != 1.0:
        logprobs_WV = torch.stack(
            [
                _adjusted(logprobs_V, (*prompt_ids, *tokens), sampling)
                for logprobs_V, tokens in zip(logprobs_WV, search.tokens, strict=True)
            ]
        )
    return logprobs_WV + torch.tensor(search.scores, device=logprobs_WV.device)[:, None]


def _adjusted(logprobs_V: Tensor, ids: Sequence[int], sampling: Sampling) -> Tensor:
    if sampling.repetition_penalty != 1.0:
        logprobs_V = penalized(logprobs_V, torch.tensor(ids, device=logprobs_V.device), sampling.repetition_penalty)
    return logprobs_V if sampling.greedy else allowed_logits(logprobs_V, sampling)


def _best(
    scores_WV: Tensor, search: _Search, sampling: Sampling, generator: torch.Generator | None
) -> list[tuple[float, int, int]]:
    """The step's candidates, (score, beam, token), the best or the first drawn first.

    So many that enough remain to go on with if all that can end do.
    """
    num_beams, vocab = scores_WV.shape
    number = min(max(2, 1 + len(search.stop_ids)) * num_beams, scores_WV.numel())
    scores = scores_WV.flatten()
    if sampling.greedy:
        values, chosen = scores.topk(number)
    else:
        # Drawing without replacement is taking the largest after Gumbel noise (arXiv 1903.06059).
        uniform = torch.rand(scores.shape, generator=generator).clamp_min_(torch.finfo(torch.float32).tiny)
        chosen = (scores.cpu() - (-uniform.log()).log()).topk(number).indices.to(scores.device)
        values = scores[chosen]
    return [
        (score, index // vocab, index % vocab) for score, index in zip(values.tolist(), chosen.tolist(), strict=True)
    ]
