"""Damaged files of Megatron's torch format: an error in words or a correct load, never a hang or a flood of memory."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tessel.checkpoint.mcore import open_torch
from tessel.checkpoint.mcore_write import write_torch
from tessel.checkpoint.stored import Target
from tessel.errors import TesselError
from tests.checkpoint.megatron import hf_model
from tests.checkpoint.test_mcore_optimizer import train

TARGET = Target(tp=2, dtype=torch.bfloat16, transformer_engine=True)
SLACK_BYTES = 100 * 2**20


def mutated(whole: bytes, numbers: random.Random) -> bytes:
    """Cut, flipped, swapped, or with a huge number in it; mostly in the pickle, where lengths and names are."""
    data = bytearray(whole)
    begin = whole.find(b"data.pkl") if numbers.random() < 0.7 else 0
    end = min(len(data), begin + 12_000)
    kind = numbers.choice(("cut", "swap", "huge", "flip", "flip", "flip"))
    if kind == "cut":
        return bytes(data[: numbers.randrange(len(data))])
    if kind == "swap":
        one, other, length = numbers.randrange(begin, end), numbers.randrange(begin, end), numbers.randrange(1, 64)
        data[one : one + length], data[other : other + length] = data[other : other + length], data[one : one + length]
    elif kind == "huge":
        at, length = numbers.randrange(begin, end), numbers.choice((4, 8))
        data[at : at + length] = b"\xff" * length
    else:
        for _ in range(numbers.randint(1, 5)):
            data[numbers.randrange(begin, end)] = numbers.randrange(256)
    return bytes(data)


def check(folder: Path, num_mutations: int, seed: int) -> None:
    numbers = random.Random(seed)
    files = sorted(folder.glob("iter_*/mp_rank_*/*.pt"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcomes = {"refused": 0, "read": 0}
    for _ in range(num_mutations):
        path = numbers.choice(files)
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, numbers))
        start = time.monotonic()
        try:
            found = open_torch(folder)
            for tensor in (*found.tensors.values(), *found.optimizer.values()):
                tensor.read()
            outcomes["read"] += 1
        except TesselError as error:
            assert str(error).endswith((".", ".)")), error
            outcomes["refused"] += 1
        assert time.monotonic() - start < 60
        path.write_bytes(whole)
    assert min(outcomes.values()) > num_mutations // 50, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < SLACK_BYTES


@pytest.fixture(params=["protocol 2", "protocol 4", "distributed optimizer"])
def checkpoint(request: pytest.FixtureRequest, tiny_hf_folder: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "mg"
    write_torch(hf_model(tiny_hf_folder("qwen2")), folder, TARGET)
    if request.param == "distributed optimizer":
        train(folder, TARGET, "distributed")
    if request.param == "protocol 4":
        for path in folder.glob("iter_*/mp_rank_*/*.pt"):
            torch.save(torch.load(path, weights_only=False), path, pickle_protocol=4)
    assert open_torch(folder).tensors
    return folder


def test_damaged_files(checkpoint: Path) -> None:
    check(checkpoint, 120, seed=1)


@pytest.mark.slow
def test_many_damaged_files(checkpoint: Path) -> None:
    check(checkpoint, 2000, seed=2)
