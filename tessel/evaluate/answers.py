"""What a model answers: by the log-probabilities of given answers, or by what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from tessel.data.tokenizer import Tokenizer
from tessel.data.tokenizer.base import BatchEncoder
from tessel.evaluate.items import ChoiceItem, Outcome, TextItem, outcome_of_scores
from tessel.evaluate.scorer import Scorer
from tessel.generate.batcher import Batcher, Counts
from tessel.generate.load import Opened
from tessel.generate.request import Request
from tessel.generate.sampling import GREEDY

_SHORTEST_STEM_TOKENS = 16
_TEXTS_AT_ONCE = 256

# ----------------------------------------------------------------------------------------- by log-probability


def choose(scorer: Scorer, tokenizer: Tokenizer, items: Sequence[ChoiceItem]) -> Iterator[Outcome]:
    """Each question's outcome, when all its answers are scored."""
    places = [(number, i) for number, item in enumerate(items) for i in range(len(item.continuations))]
    logprobs: list[dict[int, float]] = [{} for _ in items]
    for pair, score in scorer.scores(_pairs(tokenizer, items)):
        number, choice = places[pair]
        logprobs[number][choice] = score.logprob
        if len(logprobs[number]) == len(items[number].continuations):
            found = logprobs[number]
            yield outcome_of_scores(items[number], tuple(found[i] for i in range(len(found))))


def _pairs(tokenizer: Tokenizer, items: Sequence[ChoiceItem]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids of the context, ids of the answer), of each answer of each question."""
    encode = tokenizer.batch_encoder()
    for first in range(0, len(items), _TEXTS_AT_ONCE):
        for item, ids in _encoded(encode, items[first : first + _TEXTS_AT_ONCE]):
            context = np.array(ids[0], np.int32)
            yield from ((context, np.array(whole[len(context) :], np.int32)) for whole in ids[1:])
            del item


def _encoded(encode: BatchEncoder, items: Sequence[ChoiceItem]) -> Iterator[tuple[ChoiceItem, list[list[int]]]]:
    """The ids of each context, and of it with each answer.

    Blanks at the end of a context are left to the answer, as in lm-evaluation-harness's TemplateLM._encode_pair.
    """
    texts = [
        text for item in items for text in (item.context.rstrip(), *(item.context + end for end in item.continuations))
    ]
    ids = iter(encode(texts))
    for item in items:
        yield item, [next(ids) for _ in range(1 + len(item.continuations))]


# ----------------------------------------------------------------------------------------- by text


@dataclass
class Writer:
    """Continues prompts; prompts that leave no room in the context lose their beginning."""

    opened: Opened
    max_running: int
    judges: bool = True
    """Whether this process says what is right, or leaves that to the one that speaks for its replica."""
    cut_texts: int = 0
    counts: Counts = field(default_factory=Counts)

    def write(self, items: Sequence[TextItem]) -> Iterator[Outcome]:
        """Each question's outcome, when its text has ended; the subjects one after another."""
        encode = self.opened.tokenizer.batch_encoder()
        for _, group in groupby(items, key=lambda item: item.key[0]):
            of_subject = list(group)
            texts = iter(encode([item.prompt for item in of_subject if isinstance(item.prompt, str)]))
            prompts = [
                self._cut(next(texts) if isinstance(item.prompt, str) else item.prompt, item) for item in of_subject
            ]
            yield from self._answers(of_subject, prompts)

    def _cut(self, ids: Sequence[int], item: TextItem) -> tuple[int, ...]:
        room = max(self.opened.config.max_position_embeddings + 1 - item.max_new_tokens, 1)
        self.cut_texts += len(ids) > room
        return tuple(ids[-room:])

    def _answers(self, items: Sequence[TextItem], prompts: Sequence[tuple[int, ...]]) -> Iterator[Outcome]:
        longest = max(len(prompt) for prompt in prompts)
        batcher = Batcher(
            self.opened.model,
            self.opened.tokenizer,
            device=self.opened.device,
            max_running=self.max_running,
            kept_tokens=4 * longest,
        )
        self.counts = batcher.counts
        stem = _stem(prompts)
        if stem:  # computed before the prompts that take it over
            batcher.add(Request(stem, GREEDY, max_new_tokens=0))
            while batcher.num_running or batcher.num_waiting:
                batcher.step()
        # Those of like length end together.
        order = sorted(range(len(items)), key=lambda i: (-len(prompts[i]), i))
        running: dict[int, tuple[TextItem, list[str]]] = {}
        for i in order:
            item = items[i]
            request = Request(prompts[i], GREEDY, item.max_new_tokens, self.opened.stop_ids, item.stop)
            running[batcher.add(request)] = item, []
        while running:
            for event in batcher.step():
                item, pieces = running[event.request]
                pieces.append(event.text)
                if event.finish is not None:
                    del running[event.request]
                    yield self._outcome(item, "".join(pieces))

    def _outcome(self, item: TextItem, text: str) -> Outcome:
        prediction, is_right = item.judge(text) if self.judges else ("", False)
        return Outcome(item.key, prediction, item.answer, is_right, text=text)


def _stem(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of several prompts begin with, if it is worth a pass of its own."""
    if len(prompts) < 2:
        return ()
    first, last = min(prompts), max(prompts)
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:common] if common >= _SHORTEST_STEM_TOKENS else ()
