"""What a model answers: by the log-probabilities of given answers, or by what it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from tessel.data.tokenizer import Tokenizer
from tessel.evaluate.items import ChoiceItem, Outcome, TextItem, outcome_of_scores
from tessel.evaluate.scorer import Scorer
from tessel.generate.batcher import Batcher
from tessel.generate.load import Opened
from tessel.generate.request import Request
from tessel.generate.sampling import GREEDY

_SHORTEST_STEM_TOKENS = 16
_TEXTS_AT_ONCE = 256

# ----------------------------------------------------------------------------------------- by log-probability


def choose(scorer: Scorer, tokenizer: Tokenizer, items: Sequence[ChoiceItem]) -> Iterator[Outcome]:
    """Each question's outcome, when all its answers are scored."""
    if len(items) > _TEXTS_AT_ONCE:  # else the proof that it gives the same ids takes longer
        tokenizer.speed_up([item.context for item in items[:8]])
    places = [(number, i) for number, item in enumerate(items) for i in range(len(item.continuations))]
    logprobs: list[dict[int, float]] = [{} for _ in items]
    for pair, score in scorer.scores(_pairs(tokenizer, items)):
        number, choice = places[pair]
        logprobs[number][choice] = score.logprob
        if len(logprobs[number]) == len(items[number].continuations):
            found = logprobs[number]
            yield outcome_of_scores(items[number], tuple(found[i] for i in range(len(found))))


def _pairs(tokenizer: Tokenizer, items: Sequence[ChoiceItem]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids of the context, ids of the answer), of each answer of each question.

    Blanks at the end of a context are left to the answer, as in lm-evaluation-harness's TemplateLM._encode_pair.
    """
    encode = tokenizer.batch_encoder()
    for first in range(0, len(items), _TEXTS_AT_ONCE):
        some = items[first : first + _TEXTS_AT_ONCE]
        texts = [[item.context.rstrip(), *(item.context + end for end in item.continuations)] for item in some]
        ids = iter(encode([text for of_item in texts for text in of_item]))
        for of_item in texts:
            context = np.array(next(ids), np.int32)
            for _ in of_item[1:]:
                yield context, np.array(next(ids)[len(context) :], np.int32)


# ----------------------------------------------------------------------------------------- by text


@dataclass
class Writer:
    """Continues prompts; prompts that leave no room in the context lose their beginning."""

    opened: Opened
    max_running: int
    judges: bool = True
    """Whether this process says what is right, or leaves that to the one that speaks for its replica."""
    cut_texts: int = 0

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
        stop_ids = self.opened.stop_ids
        requests = [
            Request(prompt, GREEDY, item.max_new_tokens, stop_ids, item.stop)
            for item, prompt in zip(items, prompts, strict=True)
        ]
        for number, _, text in continued(self.opened, requests, self.max_running):
            yield self._outcome(items[number], text)

    def _outcome(self, item: TextItem, text: str) -> Outcome:
        prediction, is_right = item.judge(text) if self.judges else ("", False)
        return Outcome(item.key, prediction, item.answer, is_right, text=text)


def continued(
    opened: Opened, requests: Sequence[Request], max_running: int
) -> Iterator[tuple[int, tuple[int, ...], str]]:
    """(number of the request, its new tokens, their text) of each request, when it has ended.

    What all prompts begin with is computed once, before them; texts of like length run together.
    """
    if not requests:
        return
    prompts = [request.prompt_ids for request in requests]
    batcher = Batcher(
        opened.model,
        opened.tokenizer,
        device=opened.device,
        max_running=max_running,
        kept_tokens=4 * max(len(prompt) for prompt in prompts),
    )
    if stem := _stem(prompts):
        batcher.add(Request(stem, GREEDY, max_new_tokens=0))
        while batcher.num_running or batcher.num_waiting:
            batcher.step()
    order = sorted(range(len(requests)), key=lambda i: (-len(prompts[i]), i))
    running: dict[int, tuple[int, list[int], list[str]]] = {batcher.add(requests[i]): (i, [], []) for i in order}
    while running:
        for event in batcher.step():
            number, tokens, pieces = running[event.request]
            pieces.append(event.text)
            if event.token is not None:
                tokens.append(event.token)
            if event.finish is not None:
                del running[event.request]
                yield number, tuple(tokens), "".join(pieces)


def _stem(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of several prompts begin with, if it is worth a pass of its own."""
    if len(prompts) < 2:
        return ()
    first, last = min(prompts), max(prompts)
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:common] if common >= _SHORTEST_STEM_TOKENS else ()
