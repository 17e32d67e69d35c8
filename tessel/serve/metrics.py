"""What the server counts, in Prometheus's text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from tessel.generate.batcher import Batcher

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Counts of values up to each of some bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Its samples, cumulated as Prometheus has them."""
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """Everything that is counted; used on the event loop alone, so that nothing is locked."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        """By path and status: HTTP's, or "timeout" or "disconnected" of an answer that had begun."""
        self.first_token_s = Histogram(_SECONDS)
        self.request_s = Histogram(_SECONDS)

    def text(self, batcher: Batcher) -> str:
        """All of it; numbers of the batcher are those of its last step."""
        counts = batcher.counts
        lines = [
            *_sample("running_texts", "gauge", "Texts in the batch.", batcher.num_running),
            *_sample("waiting_texts", "gauge", "Texts that wait for a place.", batcher.num_waiting),
            *_sample("cache_bytes", "gauge", "Memory of keys and values.", batcher.cache_bytes),
            *_sample("prompt_tokens_total", "counter", "Tokens of prompts.", counts.prompt_tokens),
            *_sample("reused_tokens_total", "counter", "Of these, taken from the cache.", counts.reused_tokens),
            *_sample("new_tokens_total", "counter", "Tokens that were generated.", counts.new_tokens),
            *_sample("steps_total", "counter", "Passes through the model.", counts.steps),
            *_head("requests_total", "counter", "Requests by path and outcome."),
            *(f'tessel_requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(self.requests.items())),
            *_head("first_token_seconds", "histogram", "From a request to its first token."),
            *self.first_token_s.lines("tessel_first_token_seconds"),
            *_head("request_seconds", "histogram", "From a request to its end."),
            *self.request_s.lines("tessel_request_seconds"),
        ]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP tessel_{name} {what}"
    yield f"# TYPE tessel_{name} {kind}"


def _sample(name: str, kind: str, what: str, value: float) -> Iterator[str]:
    yield from _head(name, kind, what)
    yield f"tessel_{name} {value}"
