"""The random state can be saved and put back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tessel.runtime.random import get_state, own_stream, seed_all, set_state


def draw() -> tuple[float, ...]:
    # A Gaussian leaves its pair in the generator: the cached half is part of the state.
    values = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item())
    return tuple(float(value) for value in values)


def test_a_seed_fixes_every_generator() -> None:
    seed_all(5)
    first = draw()
    seed_all(5)
    assert draw() == first
    for other in ((6,), (5, 1)):
        seed_all(*other)
        assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_state_survives_a_safe_load(tmp_path: Path) -> None:
    seed_all(5)
    draw()
    torch.save(get_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_own_streams_differ_and_leave_the_generator_in_step() -> None:
    """Twice in a row, from equal generators: as two processes would, one after the other."""
    drawn, after = [], []
    for number in (0, 1):
        seed_all(5)
        streams = []
        for _ in range(2):
            with own_stream(number, torch.device("cpu")):
                streams.append(torch.rand(8))
        drawn.append(torch.cat(streams))
        after.append(torch.rand(8))
    assert torch.equal(*after), "however much was drawn within"
    assert not torch.isclose(drawn[0], drawn[1]).any()
    assert not torch.isclose(drawn[0][:8], drawn[0][8:]).any(), "a new stream each time"


def test_an_own_stream_comes_back_with_the_generator() -> None:
    seed_all(5)
    state = get_state()
    draws = []
    for _ in range(2):
        set_state(state)
        with own_stream(3, torch.device("cpu")):
            draws.append(torch.rand(8))
    assert torch.equal(*draws)
    expected = torch.rand(8)
    set_state(state)
    with pytest.raises(KeyError), own_stream(3, torch.device("cpu")):
        raise KeyError
    assert torch.equal(torch.rand(8), expected), "also after an error"
