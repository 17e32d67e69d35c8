"""Kernels are a table: operation -> implementations, the plain one first. The choice is made once and printed.

`unfused` (`local`) is plain PyTorch and the reference that the others are tested against; `fused` is
torch's SDPA, with whatever it brings on the device; `flash` is FlashAttention 3 or 4 behind SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessel.errors import UsageError
from tessel.model import vendor
from tessel.model.attention import Attention, AttentionFn, Visibility, plain_attention, sdpa_attention
from tessel.model.layers import MLP, RMSNorm, add_rms_norm, gated, rms_norm
from tessel.model.moe import Experts, MixtureOfExperts, combine, grouped_linear, spread
from tessel.model.rope import rotate
from tessel.runtime.device import flash_attention_available, vendor_kernels_available


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
# operation -> its rows, the plain one first: functions with the signature of the plain one, of routing two.
OPERATIONS: dict[str, dict[str, Any]] = {
    "attention": {**ATTENTION, vendor.NAME: vendor.fusion_attention},
    "norm": {"torch": rms_norm, vendor.NAME: vendor.rms_norm},
    "residual norm": {"torch": add_rms_norm, vendor.NAME: vendor.add_rms_norm},
    "rotary": {"torch": rotate, vendor.NAME: vendor.rotate},
    "swiglu": {"torch": gated, vendor.NAME: vendor.gated},
    "grouped": {"torch": grouped_linear, vendor.NAME: vendor.grouped_linear},
    "routing": {"torch": (spread, combine), vendor.NAME: (vendor.spread, vendor.combine)},
}
_WORDS = {
    "unfused": "plain PyTorch",
    "local": "plain PyTorch",
    "fused": "torch SDPA",
    "flash": "FlashAttention",
    vendor.NAME: "the vendor's fused attention",
}


@dataclass(frozen=True)
class Kernels:
    """The implementations that a model uses, and why. `others`: the row of all operations but attention.

    `takes_runs`: attention goes by the lengths of segments, where these are runs.
    """

    attention: AttentionFn = sdpa_attention
    name: str = "fused"
    reason: str = "the default"
    others: str = "torch"
    takes_runs: bool = False

    def describe(self) -> str:
        """One line for the start-up: the choice and its reason, with what to install for a faster one."""
        rest = "" if self.others == "torch" else f"; norm, rotary, swiglu and experts: {self.others}"
        return f"attention: {self.name} ({_WORDS[self.name]}); {self.reason}{rest}"

    def attach(self, model: nn.Module) -> None:
        """Give the modules of a model, which have torch's by themselves, these implementations."""
        if self.others == "torch":
            return
        row = {operation: rows[self.others] for operation, rows in OPERATIONS.items() if self.others in rows}
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.kernel, module.of_sum = row["norm"], row["residual norm"]
            elif isinstance(module, Attention):
                module.rotate = row["rotary"]
            elif isinstance(module, MLP):
                module.gated = row["swiglu"]
            elif isinstance(module, Experts):
                module.gated, module.grouped = row["swiglu"], row["grouped"]
                module.spread, module.combine = row["routing"]


def of_vendor(reason: str) -> Kernels:
    """All of the vendor's kernels."""
    return Kernels(vendor.fusion_attention, vendor.NAME, reason, vendor.NAME, takes_runs=True)


def choose(
    device: torch.device, dtype: torch.dtype, requested: str = "auto", *, head_dim: int = 64, dropout: float = 0.0
) -> Kernels:
    """The kernels for a device and the dtype of computation.

    `requested` is `--attention-backend`: auto takes the vendor's kernels or FlashAttention where they run, else
    SDPA; any other name is taken or refused. Choosing FlashAttention registers it with torch for the process.

    Raises:
        UsageError: an unknown name, or a forced kernel that cannot run here.
    """
    if requested not in ("auto", *ATTENTION):
        raise UsageError(f"--attention-backend {requested}: choose auto, {', '.join(ATTENTION)}.")
    has_vendors, why = vendor_kernels_available(device)
    if requested not in ("auto", "flash"):
        others = vendor.NAME if has_vendors else "torch"
        return Kernels(ATTENTION[requested], requested, f"asked for by --attention-backend {requested}", others)
    if has_vendors:
        return of_vendor(why)
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
    if row == vendor.NAME:
        there, why = vendor_kernels_available(device)
        return None if there else why
    if row != "flash":
        return None
    runs, why = flash_attention_available(device)
    if runs:
        torch.nn.attention.activate_flash_attention_impl(why)
        return None
    return why


def compile_layers(layers: nn.ModuleDict, backend: Any = "inductor") -> None:
    """torch.compile each layer in place (`--compile`), by a backend as torch takes it.

    Layers of one shape share the compiled code. Mixtures of experts stay outside: how many tokens an expert gets is
    only known when they run.
    """
    for layer in layers.values():
        for module in layer.modules():
            if isinstance(module, MixtureOfExperts):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        layer.compile(backend=backend)
