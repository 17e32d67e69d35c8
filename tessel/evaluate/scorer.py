"""Log-probabilities of continuations, each beginning that several texts share computed once.

The texts form a tree: a beginning is a branch, computed in one pass, and its keys and values are copied to what grows
from it (`KeyValueCache.fork`). Five-shot MMLU is a branch of about 950 tokens for each subject, with a leaf of
about 170 for each question. A pass takes leaves of like length as one row without padding, and the output
layer sees only the positions that are scored.

The rules are those of lm-evaluation-harness 0.4.13 for `--model hf`: a text longer than the context loses its
beginning, continuations after one context that differ in their last token alone are one text, and the log-softmax is
over the whole vocabulary in the logits' own dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessel.errors import TesselError
from tessel.generate.batcher import Model
from tessel.generate.cache import KeyValueCache

# Shorter common beginnings are computed again.
_SHORTEST_BRANCH_TOKENS = 16
_PASS_TOKENS = 4096

Ids = Sequence[int] | np.ndarray


class Score(NamedTuple):
    """ln P(continuation | context), and whether each of its tokens is the likeliest at its place."""

    logprob: float
    is_greedy: bool


@dataclass
class Counts:
    """Tokens of all texts, each once, and those that were computed."""

    text_tokens: int = 0
    computed_tokens: int = 0
    cut_texts: int = 0

    @property
    def saving(self) -> float:
        """How many times fewer tokens were computed."""
        return self.text_tokens / max(self.computed_tokens, 1)


@dataclass
class _Text:
    """What the model reads, i32[L]; the logits of its last `num_scored` positions are for `continuations`.

    `continuations`: (number of the pair, i64[num_scored]).
    """

    ids: np.ndarray
    num_scored: int
    continuations: list[tuple[int, np.ndarray]] = field(default_factory=list)

    @property
    def num_shareable(self) -> int:
        """Tokens that may be computed with another text's."""
        return len(self.ids) - self.num_scored


@dataclass
class _Branch:
    """The tokens `begin` to `end` of `text`, and what grows from them; a leaf (nothing does) has scores."""

    text: _Text
    begin: int
    end: int
    grown: list[_Branch] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin


class Scorer:
    """Scores pairs of a context and a continuation; at most `max_texts` are computed in one pass."""

    def __init__(self, model: Model, device: torch.device | str = "cpu", max_texts: int = 16) -> None:
        self._model, self._device, self._max_texts = model, torch.device(device), max_texts
        self._cache = KeyValueCache()
        self.counts = Counts()

    def scores(self, pairs: Iterable[tuple[Ids, Ids]]) -> Iterator[tuple[int, Score]]:
        """(number of the pair, its score) of each (ids of the context, ids of the continuation), as they are known.

        Raises:
            TesselError: a context or a continuation has no tokens, or a continuation does not fit the context length.
        """
        texts = self._texts(pairs)
        self.counts.text_tokens += sum(len(text.ids) for text in texts)
        yield from self._grow([(branch, None) for branch in _tree(texts)])

    def _texts(self, pairs: Iterable[tuple[Ids, Ids]]) -> list[_Text]:
        """The different texts of the pairs, in the order of their ids."""
        longest = self._model.config.max_position_embeddings
        texts: dict[tuple[bytes, int], _Text] = {}
        for number, (context, continuation) in enumerate(pairs):
            if not len(context) or not len(continuation):
                raise TesselError("A context or an answer has no tokens, so there is nothing to score. Check the set.")
            if len(continuation) > longest:
                raise TesselError(
                    f"An answer of {len(continuation)} tokens is longer than the model's context "
                    f"(max_position_embeddings {longest}). Leave that question out."
                )
            whole = np.concatenate([np.asarray(context, np.int32), np.asarray(continuation, np.int32)])
            ids = whole[-(longest + 1) :][:-1]
            # Big-endian bytes sort as the ids do.
            key = (ids.astype(">i4").tobytes(), len(continuation))
            if key not in texts:
                texts[key] = _Text(ids, len(continuation))
                self.counts.cut_texts += len(whole) > longest + 1
            text = texts[key]
            text.continuations.append((number, np.asarray(continuation, np.int64)))
        return [texts[key] for key in sorted(texts)]

    def _grow(self, pending: list[tuple[_Branch, int | None]]) -> Iterator[tuple[int, Score]]:
        """Compute branches after the slots that hold what they grow from, then what grows from them."""
        pending.sort(key=lambda entry: -entry[0].num_tokens)
        for batch in _batches(pending, self._max_texts):
            slots = [self._open(branch, parent) for branch, parent in batch]
            leaves = [branch for branch, _ in batch if not branch.grown]
            yield from self._read(leaves, self._forward([branch for branch, _ in batch], slots))
            grown: list[tuple[_Branch, int | None]] = []
            for (branch, _), slot in zip(batch, slots, strict=True):
                if not branch.grown:
                    self._cache.close(slot)
                grown += [(child, slot) for child in branch.grown]
            yield from self._grow(grown)
            for (branch, _), slot in zip(batch, slots, strict=True):
                if branch.grown:
                    self._cache.close(slot)

    def _open(self, branch: _Branch, parent: int | None) -> int:
        return self._cache.open(branch.end) if parent is None else self._cache.fork(parent, branch.begin, branch.end)

    @torch.inference_mode()
    def _forward(self, branches: Sequence[_Branch], slots: Sequence[int]) -> Tensor:
        """Logits [R, V] of the scored positions of the leaves, one leaf after another."""
        tokens = np.concatenate([branch.text.ids[branch.begin : branch.end] for branch in branches])
        self._cache.stage((slot, branch.num_tokens) for branch, slot in zip(branches, slots, strict=True))
        self.counts.computed_tokens += len(tokens)
        ends = np.cumsum([branch.num_tokens for branch in branches])
        scored = [
            np.arange(end - branch.text.num_scored, end)
            for branch, end in zip(branches, ends, strict=True)
            if not branch.grown
        ]
        places = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *scored]))
        logits_1RV = self._model(
            torch.from_numpy(tokens.astype(np.int64))[None].to(self._device),
            self._cache.positions(self._device),
            cache=self._cache,
            logits=places.to(self._device),
        )
        self._cache.commit()
        return logits_1RV[0]

    @torch.inference_mode()
    def _read(self, leaves: Sequence[_Branch], logits_RV: Tensor) -> list[tuple[int, Score]]:
        """The scores of the continuations of some leaves."""
        if not leaves:
            return []
        logprobs_RV = logits_RV.log_softmax(dim=-1)
        likeliest = logits_RV.argmax(dim=-1).cpu().numpy()
        entries, rows, tokens, first = [], [], [], 0
        for leaf in leaves:
            places = np.arange(first, first + leaf.text.num_scored)
            first += leaf.text.num_scored
            for number, continuation in leaf.text.continuations:
                entries.append((number, bool((likeliest[places] == continuation).all()), len(places)))
                rows.append(places)
                tokens.append(continuation)
        taken = logprobs_RV[
            torch.from_numpy(np.concatenate(rows)).to(self._device),
            torch.from_numpy(np.concatenate(tokens)).to(self._device),
        ]
        sums = [float(part.sum()) for part in taken.split([length for *_, length in entries])]
        return [(number, Score(logprob, greedy)) for (number, greedy, _), logprob in zip(entries, sums, strict=True)]


def _tree(texts: Sequence[_Text]) -> list[_Branch]:
    """The branches of texts that are in the order of their ids."""
    common = [_num_common(first, second) for first, second in zip(texts, texts[1:], strict=False)]
    return _branches(texts, common, 0, len(texts), 0)


def _branches(texts: Sequence[_Text], common: Sequence[int], first: int, end: int, begin: int) -> list[_Branch]:
    """What grows after `begin` tokens that the texts from `first` to `end` share; `common[i]`: of text i and the next.

    A text that has another as its beginning is a leaf like any: only tokens before the scored ones are shared.
    """
    branches = []
    while first < end:
        last = first + 1
        while last < end and common[last - 1] >= begin + _SHORTEST_BRANCH_TOKENS:
            last += 1
        text = texts[first]
        if last == first + 1:
            branches.append(_Branch(text, begin, len(text.ids)))
        else:
            shared = min(common[first : last - 1])
            branches.append(_Branch(text, begin, shared, _branches(texts, common, first, last, shared)))
        first = last
    return branches


def _num_common(first: _Text, second: _Text) -> int:
    """Tokens at the beginning of both that they may share."""
    length = min(first.num_shareable, second.num_shareable)
    differs = first.ids[:length] != second.ids[:length]
    return int(differs.argmax()) if differs.any() else length


def _batches(
    pending: Sequence[tuple[_Branch, int | None]], max_texts: int
) -> Iterator[list[tuple[_Branch, int | None]]]:
    """What is computed in one pass each."""
    batch: list[tuple[_Branch, int | None]] = []
    num_tokens = 0
    for entry in pending:
        if batch and (len(batch) == max_texts or num_tokens + entry[0].num_tokens > _PASS_TOKENS):
            yield batch
            batch, num_tokens = [], 0
        batch.append(entry)
        num_tokens += entry[0].num_tokens
    if batch:
        yield batch
