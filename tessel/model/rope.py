"""Rotary positions: frequencies with their scalings, and the rotation.

RoFormer (arXiv 2104.09864); linear scaling (arXiv 2306.15595); YaRN (arXiv 2309.00071);
llama3 is Meta's rule for Llama 3.1. Pairs are (i, i + head_dim/2), as in Hugging Face checkpoints.
Shape suffixes: B batch, S sequence, H heads, D head_dim, P pairs = D/2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tessel.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
    """Radians per position of each pair, fp32 [P], and the factor by which cos and sin are multiplied."""
    dim = config.head_dim
    exponents_P = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    powers_P = config.rope_theta**exponents_P
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / powers_P, 1.0
    if scaling["rope_type"] == "linear":
        return 1.0 / powers_P / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(1.0 / powers_P, scaling), 1.0
    return _yarn(powers_P, config.rope_theta, dim, scaling)


def _llama3(frequencies_P: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Waves longer than the old context are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelengths_P = 2 * math.pi / frequencies_P
    smooth_P = (context / wavelengths_P - low) / (high - low)
    blended_P = (1 - smooth_P) * frequencies_P / factor + smooth_P * frequencies_P
    long_P = wavelengths_P > context / low
    short_P = wavelengths_P < context / high
    return torch.where(long_P, frequencies_P / factor, torch.where(short_P, frequencies_P, blended_P))


def _yarn(powers_P: Tensor, theta: float, dim: int, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Pairs that turn often are kept, those that turn seldom stretched, with a linear ramp between (YaRN, 3.2)."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_that_turns(scaling.get("beta_fast") or 32)
    last = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # no division by zero
    steps_P = torch.arange(dim // 2, dtype=torch.float32, device=powers_P.device)
    kept_P = 1 - ((steps_P - first) / (last - first)).clamp(0, 1)
    frequencies_P = 1.0 / (factor * powers_P) * (1 - kept_P) + 1.0 / powers_P * kept_P
    return frequencies_P, _yarn_attention_factor(factor, scaling)


def _yarn_attention_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


class Rope:
    """cos and sin of a model's positions. Frequencies stay fp32, whatever the parameters are cast to."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._frequencies: dict[torch.device, tuple[Tensor, float]] = {}

    def __call__(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [B, S, 1, D] in `dtype`, computed in fp32."""
        device = positions_BS.device
        if device not in self._frequencies:
            self._frequencies[device] = inverse_frequencies(self._config, device)
        frequencies_P, factor = self._frequencies[device]
        angles_BSP = positions_BS[..., None].float() * frequencies_P
        angles_BS1D = torch.cat((angles_BSP, angles_BSP), dim=-1)[:, :, None]
        return (angles_BS1D.cos() * factor).to(dtype), (angles_BS1D.sin() * factor).to(dtype)


class _Rotate(torch.autograd.Function):
    """Turn each pair by its angle. The gradient turns back, so that nothing but cos and sin is kept."""

    @staticmethod
    def forward(ctx: Any, x_BSHD: Tensor, cos_BS1D: Tensor, sin_BS1D: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BS1D, sin_BS1D)
        return _turn(x_BSHD, cos_BS1D, sin_BS1D, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_BS1D, sin_BS1D = ctx.saved_tensors
        return _turn(grads[0], cos_BS1D, sin_BS1D, -1), None, None


def _turn(x_BSHD: Tensor, cos_BS1D: Tensor, sin_BS1D: Tensor, direction: int) -> Tensor:
    num_pairs = x_BSHD.shape[-1] // 2
    sin_P = sin_BS1D[..., :num_pairs]
    out = x_BSHD * cos_BS1D
    out[..., :num_pairs].addcmul_(x_BSHD[..., num_pairs:], sin_P, value=-direction)
    out[..., num_pairs:].addcmul_(x_BSHD[..., :num_pairs], sin_P, value=direction)
    return out


def rotate(x_BSHD: Tensor, cos_BS1D: Tensor, sin_BS1D: Tensor) -> Tensor:
    """Queries or keys [B, S, H, D] turned by their positions, in their own dtype; cos and sin as from `Rope`."""
    out: Tensor = _Rotate.apply(x_BSHD, cos_BS1D, sin_BS1D)
    return out
