"""How a single-device model becomes the one that trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from tessel.config.layout import Layout
from tessel.layout.stages import Stages
from tessel.model.config import ModelConfig
from tessel.model.kernels import compile_layers
from tessel.model.stage import keep_stage
from tessel.model.transformer import Transformer
from tessel.parallel.context import apply_context_parallel
from tessel.parallel.expert import apply_expert_parallel
from tessel.parallel.groups import Groups
from tessel.parallel.overlap import FusedProducts
from tessel.parallel.tensor import apply_tensor_parallel


@dataclass(frozen=True)
class Sharding:
    """What data-parallel processes share, and in which precision they compute.

    `reshard_after_forward`: parameters are gathered again for backward. `prefetch`: the next layer's
    are gathered while one computes.
    """

    mesh: DeviceMesh
    expert_mesh: DeviceMesh
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype = torch.float32
    reshard_after_forward: bool = False
    prefetch: bool = False


def parallelize(
    build: Callable[[], Transformer],
    config: ModelConfig,
    groups: Groups | None,
    stages: Stages,
    layout: Layout,
    load: Callable[[Sequence[Transformer]], None],
    compiler: Any,
    sharding: Sharding | None,
    hold: Callable[[Transformer], None] | None = None,
    products: FusedProducts | None = None,
) -> list[Transformer]:
    """This process's part of the model, one module for each of its pipeline stages.

    `build` makes a whole model on the meta device; `load` fills the parts in with weights once they are shared
    out, so that no process ever holds more than it keeps. `compiler` is torch.compile's backend, None where
    nothing is compiled; `hold` changes how a part holds what is its own; `products`: as of `apply_tensor_parallel`.
    One process alone has no `groups`, and the whole model. Without `sharding`, parameters stay plain tensors: one copy
    in fp32 needs none.
    """
    parts = [build()] if groups is None else _own_parts(build, config, groups, stages, layout, products)
    for part in parts:
        if hold is not None:
            hold(part)
        if compiler is not None:
            compile_layers(part.layers, compiler)
        if sharding is not None:
            shard(part, sharding)
    load(parts)
    return parts


def _own_parts(
    build: Callable[[], Transformer],
    config: ModelConfig,
    groups: Groups,
    stages: Stages,
    layout: Layout,
    products: FusedProducts | None,
) -> list[Transformer]:
    if groups.pp is None:
        parts = [build()]
    else:
        parts = [keep_stage(build(), stage) for stage in stages.of_rank(groups.place.pp)]
    for part in parts:
        apply_tensor_parallel(part, config, groups, layout.sequence_parallel, products)
        if config.num_experts:
            apply_expert_parallel(part, config, groups, products)
        apply_context_parallel(part, groups, layout.cp_comm_type, layout.ulysses_degree_in_cp)
    return parts


def shard(model: Transformer, sharding: Sharding) -> None:
    """Hold fp32 parameters, shared out over the mesh, and compute in another dtype, by FSDP2 and in place.

    Each layer is a group of its own, and in it its experts; the rest, embedding and head among it, is the
    root's, so that a tied weight is in one group. Gradients are summed in `reduce_dtype`: over the mesh, and
    over micro-batches, since each backward adds to an fp32 `.grad`. Parameters become DTensors, cut along
    their first dim, and stacked experts along one that leaves every process as much.
    """
    low_precision = sharding.compute_dtype if sharding.compute_dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(
        param_dtype=low_precision, reduce_dtype=sharding.reduce_dtype, cast_forward_inputs=False
    )
    layers = list(model.layers.values())
    expert_groups = [experts for layer in layers if (experts := expert_module(layer)) is not None]
    for module, mesh, placement in (
        *((experts, sharding.expert_mesh, _evenly(sharding.expert_mesh)) for experts in expert_groups),
        *((layer, sharding.mesh, None) for layer in layers),
        (model, sharding.mesh, None),
    ):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=sharding.reshard_after_forward,
            shard_placement_fn=placement,
        )
    # Experts return a view, as einsum does; nothing here works on it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss carries its own weights: every reduction is a plain sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if sharding.prefetch:
        for layer, following in pairwise(layers):
            assert isinstance(layer, FSDPModule) and isinstance(following, FSDPModule)
            layer.set_modules_to_forward_prefetch([following])


def _evenly(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard]:
    """The first dim that divides evenly: there may be fewer experts here than processes to share them."""
    num_shards = mesh.size(-1)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(next((dim for dim, size in enumerate(parameter.shape) if size % num_shards == 0), 0))

    return placement


def expert_module(layer: nn.Module) -> nn.Module | None:
    """The stacked experts of a layer; None for a dense one."""
    experts = getattr(layer.get_submodule("mlp"), "experts", None)
    return experts if isinstance(experts, nn.Module) else None


def release_gathered(model: nn.Module) -> None:
    """Drop the gathered weights, after forwards that no backward followed.

    With `reshard_after_forward=False` they would outlive the next optimizer step: the first forward after
    it would still compute with the old weights.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
