"""Continuous batching: texts join and leave between steps, and each step gives every running text a token.

A step is one forward pass over one row of tokens: the last token of each running text, and a piece of
the prompts of those that have just joined. A prompt that begins like a text whose keys and values are still
kept takes them over and computes the rest alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tessel.errors import TesselError
from tessel.generate.cache import KeyValueCache
from tessel.generate.request import Event, Finish, Guide, Request
from tessel.generate.sampling import next_token
from tessel.generate.text import Decoder, StopStrings, TextStream
from tessel.model.config import ModelConfig

# Shorter common beginnings are not worth a copy.
_SHORTEST_PREFIX_TOKENS = 16


class Model(Protocol):
    """What generates: a `Transformer`, or one over several processes that looks like it."""

    config: ModelConfig

    def __call__(self, tokens_1N: Tensor, positions_1N: Tensor, *, cache: KeyValueCache, logits: Tensor) -> Tensor:
        """Logits [1, R, V] of the positions `logits` (i64 [R]) of the row."""
        ...


@dataclass
class _Running:
    """A text in the batch: `ids` are the prompt and what came after it."""

    number: int
    request: Request
    ids: np.ndarray
    num_tokens: int
    slot: int
    end: int
    stream: TextStream
    stops: StopStrings
    generator: torch.Generator | None
    guide: Guide | None

    @property
    def is_likeliest(self) -> bool:
        """Whether its next token is the likeliest, without any more ado."""
        sampling = self.request.sampling
        return sampling.greedy and sampling.repetition_penalty == 1.0 and self.guide is None

    @property
    def num_new(self) -> int:
        return self.num_tokens - len(self.request.prompt_ids)

    def tokens(self, begin: int, end: int) -> np.ndarray:
        return self.ids[begin:end]

    def append(self, token: int) -> None:
        self.ids[self.num_tokens] = token
        self.num_tokens += 1


@dataclass
class _Kept:
    """A text that has ended, whose keys and values a later prompt may begin with."""

    slot: int
    ids: np.ndarray


@dataclass
class Counts:
    """What a batcher has done."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0


class Batcher:
    """Runs requests together. Single-threaded: `add`, `cancel` and `step` are called by one thread.

    `max_running`: texts in a step. `max_tokens`: tokens of prompts and continuations that running texts may come
    to together; a request waits until there is room, and none is ever thrown out. `prefill_tokens`: prompt tokens
    in a step, so that a long prompt does not stop the others for long. `kept_tokens`: tokens of ended texts that are
    kept for prompts that begin alike; 0 keeps none. `guide` makes what holds a text to its request's grammar. `agree`
    turns the tokens that were chosen in a step into those that are taken: processes that hold one model must take the
    same.
    """

    def __init__(
        self,
        model: Model,
        decoder: Decoder,
        *,
        device: torch.device | str = "cpu",
        max_running: int = 32,
        max_tokens: int = 1 << 20,
        prefill_tokens: int = 1024,
        kept_tokens: int = 0,
        guide: Callable[[str], Guide] | None = None,
        agree: Callable[[list[int]], list[int]] = lambda tokens: tokens,
    ) -> None:
        self._model, self._decoder, self._device = model, decoder, torch.device(device)
        self._max_running, self._max_tokens = max_running, max_tokens
        self._prefill_tokens, self._kept_tokens = prefill_tokens, kept_tokens
        self._guide, self._agree = guide, agree
        self._cache = KeyValueCache()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, _Running] = {}
        self._kept: list[_Kept] = []
        self._cancelled: list[int] = []
        self._next = 0
        self.counts = Counts()

    @property
    def num_running(self) -> int:
        """Texts in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that have no place in the batch yet."""
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, room that is not used included."""
        return self._cache.num_bytes

    def add(self, request: Request) -> int:
        """Take a request; its events carry the number returned.

        Raises:
            TesselError: see `check`.
        """
        self.check(request)
        self._waiting.append((self._next, request))
        self._next += 1
        return self._next - 1

    def check(self, request: Request) -> None:
        """Whether a request can be taken at all; another thread may ask.

        Raises:
            TesselError: the prompt is empty, longer than the context or than all room, or holds an id that the model
                lacks.
        """
        check_prompt(self._model.config, request.prompt_ids)
        if self._length_of(request) > self._max_tokens:
            raise TesselError(
                f"A prompt of {len(request.prompt_ids)} tokens and {request.max_new_tokens} new ones need more room "
                f"than there is for all texts together ({self._max_tokens} tokens). Ask for fewer tokens."
            )

    def cancel(self, number: int) -> None:
        """End a request that waits or runs; the next step says so. One that has ended is left alone."""
        waits = any(waiting == number for waiting, _ in self._waiting)
        if waits or number in self._running:
            self._cancelled.append(number)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Give each running text its next token, or the next piece of its prompt. Empty where there is nothing to do.

        A text whose prompt is not through yet has no event.
        """
        events = self._drop_cancelled()
        self._admit()
        pieces = self._pieces()
        if not pieces:
            return events
        self.counts.steps += 1
        logits_RV = self._forward(pieces)
        done = [(text, row) for row, (text, end) in enumerate(pieces) if end == text.num_tokens]
        tokens = self._agree(_chosen(logits_RV, done)) if done else []
        for (text, row), token in zip(done, tokens, strict=True):
            events.append(self._advance(text, logits_RV[row], token))
        return events

    # ------------------------------------------------------------------------------------- who runs

    def _drop_cancelled(self) -> list[Event]:
        numbers, self._cancelled = self._cancelled, []
        for number in numbers:
            if number in self._running:
                self._leave(self._running[number])
        self._waiting = deque(entry for entry in self._waiting if entry[0] not in numbers)
        return [Event(number, finish="cancelled") for number in numbers]

    def _admit(self) -> None:
        used = sum(text.end for text in self._running.values())
        while self._waiting and len(self._running) < self._max_running:
            number, request = self._waiting[0]
            length = self._length_of(request)
            if used + length > self._max_tokens:
                return
            self._waiting.popleft()
            used += length
            self._running[number] = self._start(number, request, length)

    def _length_of(self, request: Request) -> int:
        """Tokens of the whole text at most; the last one takes no position, since it is never fed back."""
        prompt = len(request.prompt_ids)
        return min(prompt + request.max_new_tokens, self._model.config.max_position_embeddings + 1)

    def _start(self, number: int, request: Request, length: int) -> _Running:
        ids = np.empty(length, np.int64)
        ids[: len(request.prompt_ids)] = request.prompt_ids
        generator = None if request.seed is None else torch.Generator().manual_seed(request.seed)
        self.counts.prompt_tokens += len(request.prompt_ids)
        return _Running(
            number,
            request,
            ids,
            len(request.prompt_ids),
            self._open(ids[: len(request.prompt_ids)]),
            length,
            TextStream(self._decoder, request.prompt_ids),
            StopStrings(request.stop_strings),
            generator,
            None if self._guide is None or request.grammar is None else self._guide(request.grammar),
        )

    def _open(self, prompt: np.ndarray) -> int:
        """A slot, with what is cached of the prompt's beginning; its last token is computed in any case."""
        best, source = 0, None
        others = [(text.slot, text.ids[: self._cache.length(text.slot)]) for text in self._running.values()]
        head = prompt[:_SHORTEST_PREFIX_TOKENS].tobytes()
        for slot, ids in [*others, *((kept.slot, kept.ids) for kept in self._kept)]:
            if ids[:_SHORTEST_PREFIX_TOKENS].tobytes() != head:
                continue
            common = min(_common_length(prompt, ids), len(prompt) - 1)
            if common > best:
                best, source = common, slot
        if source is None or best < _SHORTEST_PREFIX_TOKENS:
            return self._cache.open(len(prompt))
        self.counts.reused_tokens += best
        return self._cache.fork(source, best, len(prompt))

    def _leave(self, text: _Running) -> None:
        del self._running[text.number]
        length = self._cache.length(text.slot)
        if not 0 < length <= self._kept_tokens:
            self._cache.close(text.slot)
            return
        self._cache.park(text.slot)
        self._kept.append(_Kept(text.slot, text.ids[:length].copy()))
        while sum(len(kept.ids) for kept in self._kept) > self._kept_tokens:
            self._cache.close(self._kept.pop(0).slot)

    # ------------------------------------------------------------------------------------- a step

    def _pieces(self) -> list[tuple[_Running, int]]:
        """What the next pass computes: of each text, the tokens from those cached up to a number."""
        room = self._prefill_tokens
        pieces = []
        order = self._cache.sorted_slots(text.slot for text in self._running.values())
        by_slot = {text.slot: text for text in self._running.values()}
        for text in (by_slot[slot] for slot in order):
            begin = self._cache.length(text.slot)
            if text.num_tokens - begin == 1:
                pieces.append((text, text.num_tokens))
        for text in self._running.values():
            begin = self._cache.length(text.slot)
            if text.num_tokens - begin > 1 and room > 0:
                end = min(text.num_tokens, begin + room)
                room -= end - begin
                pieces.append((text, end))
        return pieces

    def _forward(self, pieces: Sequence[tuple[_Running, int]]) -> Tensor:
        """Logits [R, V] after each piece."""
        begins = [self._cache.length(text.slot) for text, _ in pieces]
        tokens = np.concatenate([text.ids[begin:end] for (text, end), begin in zip(pieces, begins, strict=True)])
        self._cache.stage((text.slot, end - begin) for (text, end), begin in zip(pieces, begins, strict=True))
        tokens_1N = torch.from_numpy(tokens)[None].to(self._device)
        positions_1N = self._cache.positions(self._device)
        last = self._cache.last_tokens().to(self._device)
        logits_1RV = self._model(tokens_1N, positions_1N, cache=self._cache, logits=last)
        self._cache.commit()
        return logits_1RV[0]

    def _advance(self, text: _Running, logits_V: Tensor, token: int) -> Event:
        request = text.request
        if text.num_tokens == text.end and text.num_new == 0:  # no token is asked for
            self._leave(text)
            return Event(text.number, finish="length")
        self.counts.new_tokens += 1
        if token in request.stop_ids:
            return self._end(text, None, "", "stop", logits_V)
        text.append(token)
        piece, met = text.stops.push(text.stream.push(token))
        if met:
            return self._end(text, token, piece, "stop", logits_V, is_cut=True)
        if text.guide is not None and text.guide.take(token):
            return self._end(text, token, piece, "stop", logits_V)
        if text.num_tokens == text.end:
            return self._end(text, token, piece, "length", logits_V)
        return Event(text.number, token, piece, *_logprobs(logits_V, token, request.num_logprobs))

    def _end(
        self, text: _Running, token: int | None, piece: str, finish: Finish, logits_V: Tensor, is_cut: bool = False
    ) -> Event:
        """The last event of a text, with what was held back, unless a stop string has cut it."""
        if not is_cut:
            rest, met = text.stops.push(text.stream.finish())
            piece += rest if met else rest + text.stops.finish()
        self._leave(text)
        logprob, top = (None, ()) if token is None else _logprobs(logits_V, token, text.request.num_logprobs)
        return Event(text.number, token, piece, logprob, top, finish)


def _chosen(logits_RV: Tensor, done: Sequence[tuple[_Running, int]]) -> list[int]:
    """The next token of each text whose row of logits is there; where that is the likeliest, of all in one go."""
    rows = [row for text, row in done if text.is_likeliest]
    likeliest = iter(logits_RV[rows].argmax(dim=-1).tolist() if rows else ())
    return [next(likeliest) if text.is_likeliest else _drawn(logits_RV[row], text) for text, row in done]


def _drawn(logits_V: Tensor, text: _Running) -> int:
    seen = torch.from_numpy(text.ids[: text.num_tokens]).to(logits_V.device)
    if text.guide is not None:
        logits_V = text.guide.allowed(logits_V)
    return next_token(logits_V, text.request.sampling, text.generator, seen)


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many first elements are equal."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _logprobs(logits_V: Tensor, token: int, number: int | None) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if number is None:
        return None, ()
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    likeliest = logprobs_V.topk(min(number, len(logprobs_V)))
    top = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return float(logprobs_V[token]), tuple(top)


def check_prompt(config: ModelConfig, prompt_ids: Sequence[int]) -> None:
    """A prompt that the model can take.

    Raises:
        TesselError: it is empty, longer than the context, or holds an id that the model lacks.
    """
    if not prompt_ids:
        raise TesselError("The prompt has no tokens, and there is nothing to continue. Give at least one.")
    if len(prompt_ids) > config.max_position_embeddings:
        raise TesselError(
            f"The prompt has {len(prompt_ids)} tokens, and the model's context (max_position_embeddings) "
            f"{config.max_position_embeddings}. Shorten the prompt."
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < config.vocab_size:
        raise TesselError(
            f"The prompt holds ids from {min(prompt_ids)} to {max(prompt_ids)}, and the model's go from 0 to "
            f"{config.vocab_size - 1}. Use the tokenizer that the model was trained with."
        )
