"""Segments, windows and caches: who sees whom, in each kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.model.attention import Visibility, plain_attention, run_lengths
from tessel.model.kernels import ATTENTION


class GrowingCache:
    """Keeps all keys and values by layer."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, keys_BSGD: Tensor, values_BSGD: Tensor, window: int | None) -> Tensor:
        if layer in self.kept:
            old_keys, old_values = self.kept[layer]
            keys_BSGD = torch.cat((old_keys, keys_BSGD), dim=1)
            values_BSGD = torch.cat((old_values, values_BSGD), dim=1)
        self.kept[layer] = (keys_BSGD, values_BSGD)
        return plain_attention(q, keys_BSGD, values_BSGD, Visibility(), window, 0.0)


def segments_of(*rows: list[int]) -> Tensor:
    """Each row is the lengths of its segments, numbered from 0."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def positions_of(segments_BS: Tensor) -> Tensor:
    """Positions that restart with each segment."""
    same_BSS = segments_BS[:, :, None] == segments_BS[:, None, :]
    return same_BSS.tril().sum(dim=-1) - 1


@pytest.mark.parametrize("backend", ["unfused", "fused"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    "rows", [([40, 50, 38], [128], [64, 64]), ([3, 5, 120], [1, 126, 1], [9] * 14 + [2])], ids=["runs", "mask"]
)
def test_segments_equal_separate_sequences(backend: str, window: int | None, rows: Any, pair: Any) -> None:
    from tessel.model.kernels import Kernels

    kernels = Kernels(ATTENTION[backend], backend, "")
    _, ours, _ = pair("Mistral", sliding_window=window, ours={"kernels": kernels})
    tokens_BS = torch.randint(0, 307, (3, 128))
    segments_BS = segments_of(*rows)
    packed = ours(tokens_BS, positions_of(segments_BS), segments_BS)
    for row, lengths in enumerate(rows):
        for piece, logits in zip(tokens_BS[row].split(lengths), packed[row].split(lengths), strict=True):
            torch.testing.assert_close(logits, ours(piece[None])[0], rtol=0, atol=1e-5)
    assert (packed - ours(tokens_BS)).abs().max() > 1e-2


def test_gradients_do_not_cross_segments(pair: Any) -> None:
    _, ours, _ = pair("Qwen2")
    tokens_BS = torch.randint(0, 150, (1, 80))
    tokens_BS[:, 40:] += 150
    weights_BS = torch.ones(1, 80)
    weights_BS[:, 40:] = 0
    ours(tokens_BS, None, segments_of([40, 40]), labels_BS=tokens_BS, weights_BS=weights_BS).backward()
    gradient_V = ours.model.embed_tokens.weight.grad.abs().sum(dim=1)
    assert gradient_V[tokens_BS[0, :39].unique()].min() > 0
    assert gradient_V[tokens_BS[0, 40:].unique()].max() == 0


def test_run_lengths() -> None:
    assert run_lengths(segments_of([40, 50, 38], [128])) == (40, 50, 38, 128)
    assert run_lengths(segments_of([4] * 32)) is None, "so short that a mask is faster"
    returning = segments_of([40, 40, 48])
    returning[returning == 2] = 0
    assert run_lengths(returning) is None, "a segment in two parts sees across the one between"


def test_segment_that_comes_back(pair: Any) -> None:
    _, ours, _ = pair("Llama")
    tokens_BS = torch.randint(0, 307, (1, 120))
    segments_BS = segments_of([40, 40, 40])
    segments_BS[segments_BS == 2] = 0
    outer = torch.cat((tokens_BS[:, :40], tokens_BS[:, 80:]), dim=1)
    positions_BS = torch.arange(120)[None]
    outer_positions_BS = torch.cat((positions_BS[:, :40], positions_BS[:, 80:]), dim=1)
    packed = ours(tokens_BS, positions_BS, segments_BS)
    expected = ours(outer, outer_positions_BS)
    torch.testing.assert_close(packed[:, 80:], expected[:, 40:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("prefill", [1, 9])
def test_cache_gives_the_same_logits(window: int | None, prefill: int, pair: Any) -> None:
    _, ours, _ = pair("Mistral", sliding_window=window)
    tokens_BS = torch.randint(0, 307, (2, 16))
    expected = ours(tokens_BS)
    cache, done, parts = GrowingCache(), 0, []
    for length in (prefill, 1, 3, 16 - prefill - 4):  # a prefill, one token, and pieces
        positions_BS = torch.arange(done, done + length).expand(2, -1)
        parts.append(ours(tokens_BS[:, done : done + length], positions_BS, cache=cache))
        done += length
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


def test_a_cache_needs_positions(pair: Any, tokens_BS: Tensor) -> None:
    _, ours, _ = pair("Qwen2")
    with pytest.raises(ValueError, match="positions_BS"):
        ours(tokens_BS, cache=GrowingCache())


def test_masks_are_built_once() -> None:
    visibility = Visibility(segments_of([3, 5]))
    first = visibility.mask(8, 8, None, torch.device("cpu"))
    assert first is not None and visibility.mask(8, 8, None, torch.device("cpu")) is first
    assert visibility.mask(8, 8, 100, torch.device("cpu")) is first, "a window that hides nothing"
    assert Visibility().mask(8, 8, None, torch.device("cpu")) is None
    assert Visibility().mask(1, 8, None, torch.device("cpu")) is None
