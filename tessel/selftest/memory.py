"""What `tessel plan` predicts for a step against what the step takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.config.validate import validate
from tessel.data.loader import MicroBatch
from tessel.layout.activations import ON_CPU, ON_DEVICE
from tessel.layout.choice import Choice
from tessel.layout.memory import MemoryModel
from tessel.layout.topology import Topology
from tessel.model.catalog import CATALOG
from tessel.model.config import ModelConfig
from tessel.runtime import device as devices
from tessel.runtime.log import muted
from tessel.selftest.accounting import LiveBytes
from tessel.selftest.result import Check, WrongError, check
from tessel.train.setup import build_learner
from tessel.train.source import Kind, Source

PART = "memory"
TOLERANCE = 0.15
NUM_MICRO_BATCHES = 2
_SMALL: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def run(device: torch.device) -> Iterator[Check]:
    """In fp32 and in bf16, which are held differently."""
    for dtype in ("fp32", "bf16"):
        yield check(PART, f"planned peak, {dtype}", lambda d=dtype: _planned(device, d))  # type: ignore[misc]


def _planned(device: torch.device, dtype: str) -> str:
    on_cpu = device.type == "cpu"
    if on_cpu:
        config, seq_length = ModelConfig.from_hf({"model_type": "qwen2", **_SMALL}), 256
    else:
        config = replace(ModelConfig.from_hf(CATALOG["Qwen2.5-0.5B"]), num_hidden_layers=6)
        seq_length = 2048
    choice = Choice(
        Topology(), (config.num_hidden_layers,), seq_length, 1, NUM_MICRO_BATCHES,
        compute_bytes=2 if dtype == "bf16" else 4,
    )  # fmt: skip
    planned = MemoryModel(config, ON_CPU if on_cpu else ON_DEVICE).of_rank(choice, 0).peak
    measured = _measured(device, config, seq_length, dtype)
    mib = 2**20
    text = f"planned {planned / mib:.1f} MiB, measured {measured / mib:.1f} MiB ({planned / measured - 1:+.0%})"
    if abs(planned / measured - 1) > TOLERANCE:
        raise WrongError(text)
    return text


def _measured(device: torch.device, config: ModelConfig, seq_length: int, dtype: str) -> int:
    """The peak of the second step: bytes of tensors on the CPU, of the allocator elsewhere."""
    argv = f"--load m --data-path d --lr 1e-3 --train-iters 1 --seq-length {seq_length} --{dtype}".split()
    batch_flags = ["--micro-batch-size", "1", "--global-batch-size", str(NUM_MICRO_BATCHES)]
    cfg = validate(parse(RunConfig, [*argv, *batch_flags], "tessel selftest").value)
    tokens_BS = torch.arange(seq_length, device=device)[None] % config.vocab_size
    weights_BS = torch.full((1, seq_length), 1 / seq_length, device=device)
    positions_BS = torch.arange(seq_length, device=device)[None]
    batch = MicroBatch(tokens_BS, tokens_BS, weights_BS, positions_BS, None)
    with contextlib.ExitStack() as stack:
        with muted():
            learner = build_learner(cfg, config, Source(Kind.RANDOM, None, None, None), device, None, stack)

        def step() -> None:
            learner.runner.train([batch] * NUM_MICRO_BATCHES, [weights_BS] * NUM_MICRO_BATCHES)
            learner.optimizer.step()
            learner.optimizer.zero_grad(set_to_none=True)

        step()
        if device.type == "cpu":
            state = [value for values in learner.optimizer.state.values() for value in values.values()]
            parameters = [p for part in learner.parts for p in part.parameters()]
            with LiveBytes([*parameters, *state]) as live:
                step()
            return live.peak
        devices.reset_peak_memory(device)
        step()
        devices.synchronize(device)
        return devices.peak_memory_bytes(device)
