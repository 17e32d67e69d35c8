"""The pieces of a layer that know nothing of attention: linear, norm, embedding, gated MLP.

Parameters are left uninitialised here: `model/init.py` or a checkpoint fills them. They are made in
fp32 and computed with in whatever dtype they are cast to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessel.model.config import ModelConfig
from tessel.model.quantized import Nf4
from tessel.model.recompute import ACTIVATION, forgetting
from tessel.model.recompute import MLP as WHOLE_MLP


class Linear(nn.Module):
    """y = x W^T + b; weight [out_features, in_features]. Draws no random numbers when made."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        # What is learned beside the weight; see `model/lora.py`.
        self.lora: nn.Module | None = None
        # How a frozen weight is held in four bits; `weight` is then rows of bytes, and no number.
        self.nf4: Nf4 | None = None

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias, without what is learned beside it."""
        if self.nf4 is None:
            return F.linear(x, self.weight, bias)
        y: Tensor = self.nf4(x, self.weight)
        return y if bias is None else y + bias

    def dense_weight(self) -> Tensor:
        """The weight as numbers."""
        return self.weight.detach() if self.nf4 is None else self.nf4.weight(self.weight)

    def with_adapter(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`product`, and what is learned beside it."""
        if self.lora is None:
            return self.product(x, bias)
        y: Tensor = self.lora(x, self, bias)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return self.with_adapter(x, self.bias)


class Projection(Protocol):
    """How one tensor goes through several linear maps."""

    def __call__(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        """x [..., in_features] -> [..., out_features] of each."""
        ...


def project(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """Through one after the other."""
    return tuple(linear(x) for linear in linears)


class Embedding(nn.Module):
    """Rows of a table; weight [vocab_size, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """tokens [B, S], integers -> [B, S, hidden_size]."""
        return F.embedding(tokens_BS, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467).

    Inside it is fp32, also for bf16 and fp16, and rounds once.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.kernel = rms_norm
        # A sum and its norm in one kernel, where the device has one: as `add_rms_norm`.
        self.of_sum: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of `RMSNorm`, by torch's own kernel."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of two tensors, and its norm."""
    summed = x + added
    return summed, rms_norm(summed, weight, eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, inner: int | None = None) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, inner or config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias)
        self.up_proj = Linear(hidden, inner, bias)
        self.down_proj = Linear(inner, hidden, bias)
        self.project: Projection = project
        self.gated = gated
        self.recompute_activation = False

    def save_memory(self, recomputes: frozenset[str]) -> None:
        """What of it is recomputed: the activation, where not all of it is anyway."""
        self.recompute_activation = ACTIVATION in recomputes and WHOLE_MLP not in recomputes

    def forward(self, x_BSE: Tensor) -> Tensor:
        """[B, S, hidden_size] -> the same."""
        gate, up = self.project(x_BSE, self.gate_proj, self.up_proj)
        if self.recompute_activation:
            return forgetting(self.gated, (gate, up), self.down_proj)
        out_BSE: Tensor = self.down_proj(self.gated(gate, up))
        return out_BSE


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up
