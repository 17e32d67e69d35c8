"""How a single-device model becomes the one that trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def apply_mixed_precision(
    model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype
) -> None:
    """Keep parameters in fp32 and compute in `compute_dtype`, by FSDP2 over `mesh`, in place.

    Each of `blocks` (the layers) is a group of its own; the rest, embedding and head among it, is the
    root's, so that a tied weight is in one group. Gradients are summed in fp32: over the mesh, and
    over micro-batches, since each backward adds to an fp32 `.grad`. Parameters become DTensors.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss carries its own weights: every reduction is a plain sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def release_gathered(model: nn.Module) -> None:
    """Drop the gathered low-precision weights, after forwards that no backward followed.

    With `reshard_after_forward=False` they would outlive the next optimizer step: the first forward after
    it would still compute with the old weights.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
