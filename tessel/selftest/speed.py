"""How fast the matrix products and the attention of a model run here. Figures, nothing to pass or fail.

Symbols: N tokens, E hidden size, H and G features of queries and of keys, F inner width, V vocabulary rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from tessel.config.selftest import SelftestConfig
from tessel.model.attention import Visibility
from tessel.model.catalog import model_of
from tessel.model.config import ModelConfig
from tessel.model.kernels import choose
from tessel.runtime import device as devices
from tessel.selftest.result import Check, check

PART = "speed"
DEFAULT_MODEL = "Qwen2.5-7B"
DEFAULT_CPU_MODEL = "Qwen2.5-0.5B"
TOKENS, CPU_TOKENS = 4096, 64
MEASURED_S = 0.3


def run(device: torch.device, cfg: SelftestConfig) -> Iterator[Check]:
    """A line for each shape: TFLOP/s, and off the CPU its share of the data sheet's."""
    on_cpu = device.type == "cpu"
    name = cfg.model or (DEFAULT_CPU_MODEL if on_cpu else DEFAULT_MODEL)
    config = model_of(name)
    tokens, dtype = (CPU_TOKENS, torch.float32) if on_cpu else (TOKENS, torch.bfloat16)
    for label, (inner, outer) in products(config).items():
        title = f"{name}, {label}: [{tokens}, {inner}] x [{inner}, {outer}]"
        yield check(PART, title, lambda i=inner, o=outer: _product(device, dtype, tokens, i, o))  # type: ignore[misc]
    title = f"{name}, attention of {config.num_attention_heads} heads, {config.num_key_value_heads} of keys, {tokens}"
    yield check(PART, title, lambda: _attention(device, dtype, tokens, config))


def products(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrix products of a layer and the head: features in and out."""
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    inner = config.moe_intermediate_size if config.num_experts else config.intermediate_size
    return {
        "queries": (hidden, queries),
        "keys": (hidden, keys),
        "attention output": (queries, hidden),
        "gate": (hidden, inner),
        "down": (inner, hidden),
        "head": (hidden, config.vocab_size),
    }


def _product(device: torch.device, dtype: torch.dtype, tokens: int, inner: int, outer: int) -> str:
    left = torch.ones(tokens, inner, dtype=dtype, device=device)
    right = torch.ones(outer, inner, dtype=dtype, device=device)
    with torch.no_grad():
        return _rate(device, dtype, 2 * tokens * inner * outer, lambda: torch.nn.functional.linear(left, right))


def _attention(device: torch.device, dtype: torch.dtype, tokens: int, config: ModelConfig) -> str:
    """Forward and backward of causal attention: 3.5 times the forward's 2 N^2 H, half of 4 for what is hidden."""
    kernels = choose(device, dtype, head_dim=config.head_dim)
    shapes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    q, k, v = (
        torch.randn(1, tokens, heads, config.head_dim, dtype=dtype, device=device, requires_grad=True)
        for heads in shapes
    )
    grad = torch.ones(1, tokens, config.num_attention_heads, config.head_dim, dtype=dtype, device=device)

    def step() -> None:
        torch.autograd.grad(kernels.attention(q, k, v, Visibility(), None, 0.0), (q, k, v), grad)

    flops = 3.5 * 2 * tokens**2 * config.num_attention_heads * config.head_dim
    return f"{_rate(device, dtype, flops, step)}, forward and backward by {kernels.name}"


def _rate(device: torch.device, dtype: torch.dtype, flops: float, work: Callable[[], object]) -> str:
    work()
    devices.synchronize(device)
    count, start_s = 0, time.perf_counter()
    while True:
        work()
        devices.synchronize(device)
        count += 1
        seconds = time.perf_counter() - start_s
        if seconds > MEASURED_S:
            break
    rate, name = flops * count / seconds / 1e12, str(dtype).removeprefix("torch.")
    if device.type == "cpu":  # whose best is measured in the same way
        return f"{rate:.3g} TFLOP/s in {name}"
    best = devices.peak_flops(device, dtype) / 1e12
    return f"{rate:.3g} TFLOP/s in {name}, {rate / best:.0%} of {best:.3g}"
