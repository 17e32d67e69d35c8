"""Texts run together: each gets the tokens that it gets alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.errors import TesselError
from tessel.generate.batcher import Batcher
from tessel.generate.cache import KeyValueCache
from tessel.generate.engine import generate_tokens, load_model
from tessel.generate.request import Event, Request
from tessel.generate.sampling import GREEDY, Sampling
from tessel.generate.text import StopStrings
from tessel.model.transformer import Transformer

MakeFolder = Callable[..., Path]


class Letters:
    """Token 5 is "5,"."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{i}," for i in ids)


def prompts(number: int, longest: int = 90) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest, (number,), generator=generator).tolist()
    return [tuple(torch.randint(0, 300, (length,), generator=generator).tolist()) for length in lengths]


def run(batcher: Batcher, requests: Sequence[Request]) -> dict[int, list[Event]]:
    numbers = [batcher.add(request) for request in requests]
    events: dict[int, list[Event]] = {number: [] for number in numbers}
    while batcher.num_running or batcher.num_waiting:
        for event in batcher.step():
            events[event.request].append(event)
    return events


def tokens_of(events: Sequence[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("mistral", {"sliding_window": 6}),
    ("qwen3_moe", {}),
]


@pytest.mark.parametrize(("family", "config"), FAMILIES)
@pytest.mark.parametrize(("max_running", "prefill_tokens"), [(5, 1024), (32, 17), (3, 1)])
def test_texts_run_together_as_they_run_alone(
    family: str, config: dict[str, Any], max_running: int, prefill_tokens: int, tiny_hf_folder: MakeFolder
) -> None:
    model, _ = load_model(tiny_hf_folder(family, **config))
    sampled = Sampling(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1)
    requests = [
        Request(prompt, sampled if i % 3 == 0 else GREEDY, 5 + 3 * i, seed=i) for i, prompt in enumerate(prompts(11))
    ]
    batcher = Batcher(model, Letters(), max_running=max_running, prefill_tokens=prefill_tokens)
    together = run(batcher, requests)
    for request, events in zip(requests, together.values(), strict=True):
        alone = list(
            generate_tokens(
                model,
                request.prompt_ids,
                max_new_tokens=request.max_new_tokens,
                sampling=request.sampling,
                seed=request.seed,
            )
        )
        assert tokens_of(events) == alone
        assert "".join(event.text for event in events) == Letters().decode(alone)
        assert [event.finish for event in events] == [None] * (len(events) - 1) + ["length"]


def test_a_prompt_that_begins_like_another_computes_the_rest_alone(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    long = tuple(range(10, 70))
    first, second, third = Request(long), Request((*long[:50], 3, 4)), Request((*long, 250, 251))
    requests = [Request(r.prompt_ids, GREEDY, 6) for r in (first, second, third)]
    fresh = Batcher(model, Letters(), max_running=1)
    kept = Batcher(model, Letters(), max_running=1, kept_tokens=200)
    expected = [tokens_of(events) for events in run(fresh, requests).values()]
    assert [tokens_of(events) for events in run(kept, requests).values()] == expected
    assert fresh.counts.reused_tokens == 0
    assert kept.counts.reused_tokens == 50 + 60
    assert [tokens_of(events) for events in run(kept, requests[:1]).values()] == expected[:1]


def test_memory_of_ended_texts_is_used_again(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    batcher = Batcher(model, Letters(), max_running=4, kept_tokens=300)
    sizes = []
    for _ in range(4):
        run(batcher, [Request(prompt, GREEDY, 4) for prompt in prompts(12)])
        sizes.append(batcher.cache_bytes)
    assert sizes[1] == sizes[3]


def test_requests_wait_for_room_and_none_is_lost(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    batcher = Batcher(model, Letters(), max_running=8, max_tokens=100)
    requests = [Request(prompt, GREEDY, 10) for prompt in prompts(9, longest=60)]
    for request in requests:
        batcher.add(request)
    finished = 0
    while batcher.num_running or batcher.num_waiting:
        finished += sum(event.finish is not None for event in batcher.step())
        assert batcher.num_running <= 8
    assert finished == 9
    with pytest.raises(TesselError, match="more room than there is"):
        batcher.add(Request(tuple(range(95)), GREEDY, 10))


def test_cancelled_texts_end_and_the_others_go_on(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    batcher = Batcher(model, Letters(), max_running=2)
    numbers = [batcher.add(Request((1, 2, 3), GREEDY, 5)) for _ in range(3)]
    batcher.step()
    batcher.cancel(numbers[0])
    batcher.cancel(numbers[2])
    events = batcher.step()
    assert [(e.request, e.finish) for e in events if e.finish] == [(0, "cancelled"), (2, "cancelled")]
    rest = list(itertools.chain.from_iterable(iter(batcher.step, [])))
    assert [e.request for e in rest] == [1, 1, 1] and rest[-1].finish == "length"
    batcher.cancel(numbers[1])
    assert batcher.step() == []


def test_stop_tokens_and_strings_end_a_text(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    free = list(generate_tokens(model, [5, 300, 17], max_new_tokens=8, sampling=GREEDY))
    text = Letters().decode(free)
    (events,) = run(Batcher(model, Letters()), [Request((5, 300, 17), GREEDY, 8, frozenset({free[3]}))]).values()
    assert tokens_of(events) == free[: free.index(free[3])] and events[-1].finish == "stop"
    cut = text[: text.index(",", 4)]
    string = text[len(cut) - 1 : len(cut) + 3]
    (events,) = run(Batcher(model, Letters()), [Request((5, 300, 17), GREEDY, 8, stop_strings=(string,))]).values()
    assert "".join(event.text for event in events) == text[: text.index(string)] and events[-1].finish == "stop"


def test_logprobs_are_the_models_own(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    request = Request((5, 300, 17), Sampling(temperature=0.5, top_k=3), 6, seed=1, num_logprobs=4)
    (events,) = run(Batcher(model, Letters()), [request]).values()
    ids = [5, 300, 17, *tokens_of(events)]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
    for at, event in enumerate(events, start=2):
        assert event.logprob == pytest.approx(float(logprobs[at, event.token]), abs=1e-5)
        assert [token for token, _ in event.top] == logprobs[at].topk(4).indices.tolist()


def test_stop_strings_hold_back_only_what_may_be_one() -> None:
    stops = StopStrings(["END", "ENOUGH"])
    assert stops.push("text E") == ("text ", False)
    assert stops.push("N") == ("", False)
    assert stops.push("T ENO") == ("ENT ", False)
    assert stops.push("UGHx") == ("", True)
    unmet = StopStrings(["END"])
    assert unmet.push("an EN") == ("an ", False) and unmet.finish() == "EN"


def test_a_transformer_is_a_model(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    assert isinstance(model, Transformer)
    batcher = Batcher(model, Letters())
    assert batcher.step() == []
    (events,) = run(batcher, [Request((1,), GREEDY, 0)]).values()
    assert events == [Event(0, finish="length")]


def test_a_text_without_tokens_moves_where_a_row_is_freed() -> None:
    cache = KeyValueCache()
    first = cache.open()
    cache.stage([(first, 1)])
    cache.attend(0, torch.ones(1, 1, 2, 4), torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), None)
    cache.commit()
    later = [cache.open() for _ in range(3)]
    cache.close(first)
    cache.stage([(slot, 1) for slot in later])
    out = cache.attend(0, torch.ones(1, 3, 2, 4), torch.ones(1, 3, 1, 4), torch.ones(1, 3, 1, 4), None)
    assert out.shape == (1, 3, 2, 4) and torch.equal(out, torch.ones_like(out))
