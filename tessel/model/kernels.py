"""Kernels are a table: operation -> implementations, the plain one first. The choice is made once and printed.

`unfused` (`local`) is plain PyTorch and the reference that the others are tested against; `fused` is
torch's SDPA, with whatever it brings on the device; `flash` is FlashAttention 3 or 4 behind SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessel.errors import UsageError
from tessel.model.attention import AttentionFn, Visibility, plain_attention, sdpa_attention
from tessel.model.layers import gated, rms_norm
from tessel.model.moe import MixtureOfExperts, grouped_linear
from tessel.model.rope import rotate
from tessel.runtime.device import flash_attention_available


def flash_attention(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, visibility: Visibility, window: int | None, dropout: float
) -> Tensor:
    """SDPA held to its flash backend, which `choose` has pointed to FlashAttention 3 or 4.

    That backend takes no mask: where segments or a window need one, SDPA chooses.
    """
    if visibility.mask(q_BSHD.shape[1], k_BKGD.shape[1], window, q_BSHD.device) is not None:
        return sdpa_attention(q_BSHD, k_BKGD, v_BKGD, visibility, window, dropout)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa_attention(q_BSHD, k_BKGD, v_BKGD, visibility, window, dropout)


ATTENTION: dict[str, AttentionFn] = {
    "unfused": plain_attention,
    "local": plain_attention,
    "fused": sdpa_attention,
    "flash": flash_attention,
}
# operation -> its rows. Norm: (x [..., E], weight [E], eps); rotary: `rope.rotate`; swiglu: (gate, up);
# grouped: `moe.grouped_linear`.
OPERATIONS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "attention": ATTENTION,
    "norm": {"torch": rms_norm},
    "rotary": {"torch": rotate},
    "swiglu": {"torch": gated},
    "grouped": {"torch": grouped_linear},
}
_WORDS = {"unfused": "plain PyTorch", "local": "plain PyTorch", "fused": "torch SDPA", "flash": "FlashAttention"}


@dataclass(frozen=True)
class Kernels:
    """The implementations that a model uses, and why."""

    attention: AttentionFn = sdpa_attention
    name: str = "fused"
    reason: str = "the default"

    def describe(self) -> str:
        """One line for the start-up: the choice and its reason, with what to install for a faster one."""
        return f"attention: {self.name} ({_WORDS[self.name]}); {self.reason}"


def choose(
    device: torch.device, dtype: torch.dtype, requested: str = "auto", *, head_dim: int = 64, dropout: float = 0.0
) -> Kernels:
    """The kernels for a device and the dtype of computation.

    `requested` is `--attention-backend`: auto takes FlashAttention where it runs, else SDPA; any
    other name is taken or refused. Choosing FlashAttention registers it with torch for the process.

    Raises:
        UsageError: an unknown name, or a forced kernel that cannot run here.
    """
    if requested not in ("auto", *ATTENTION):
        raise UsageError(f"--attention-backend {requested}: choose auto, {', '.join(ATTENTION)}.")
    if requested not in ("auto", "flash"):
        return Kernels(ATTENTION[requested], requested, f"asked for by --attention-backend {requested}")
    runs, why = _flash_runs(device, dtype, head_dim, dropout)
    if runs:
        torch.nn.attention.activate_flash_attention_impl(why)
        return Kernels(flash_attention, "flash", f"{why} is there for {device}")
    if requested == "flash":
        raise UsageError(f"--attention-backend flash cannot run: {why}. Take --attention-backend auto or fused.")
    return Kernels(sdpa_attention, "fused", f"no FlashAttention 3 or 4: {why}")


def _flash_runs(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> tuple[bool, str]:
    """Whether FlashAttention can serve, and its name, or what stands against it."""
    available, why = flash_attention_available(device)
    if not available:
        return False, why
    if dtype.itemsize != 2:
        return False, f"it computes in bf16 or fp16, and this run computes in {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return False, f"it takes head dimensions up to 256 in steps of 8, and this model has {head_dim}"
    if dropout > 0:
        return False, f"it has no dropout, and --attention-dropout is {dropout}"
    return True, why


def unavailable(row: str, device: torch.device) -> str | None:
    """Why a row of `OPERATIONS` cannot run on this device; None where it can."""
    if row != "flash":
        return None
    runs, why = flash_attention_available(device)
    if runs:
        torch.nn.attention.activate_flash_attention_impl(why)
        return None
    return why


def compile_layers(layers: nn.ModuleDict) -> None:
    """torch.compile each layer in place (`--compile`); layers of one shape share the compiled code.

    Mixtures of experts stay outside: how many tokens an expert gets is only known when they run.
    """
    for layer in layers.values():
        for module in layer.modules():
            if isinstance(module, MixtureOfExperts):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        layer.compile()
