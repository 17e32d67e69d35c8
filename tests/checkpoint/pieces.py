"""A small model as the table would cut it, on any layout, without the modules that compute with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.tiles import tiled
from tessel.layout.sharding import ParamRule
from tessel.layout.tiles import Tile, tile_of
from tessel.layout.topology import Degrees, Topology
from tessel.runtime.team import Team

# 61 rows are no multiple of any degree; one key/value head is short of every degree.
RULES = {
    "embed.weight": ParamRule((61, 8), "vocab", "normal", 0, 61),
    "q.weight": ParamRule((24, 8), "column", "normal", 0, 12),
    "k.weight": ParamRule((4, 8), "column", "normal", 0, 1, copies_when_short=True),
    "o.weight": ParamRule((8, 24), "row", "normal", 1, 12),
    "norm.weight": ParamRule((7,), "replicated", "ones"),
    "experts.gate": ParamRule((4, 12, 8), "column", "normal", 1, 12, is_expert=True),
    "experts.down": ParamRule((4, 8, 12), "row", "normal", 2, 12, is_expert=True),
}
STATE: dict[str, Any] = dict.fromkeys(run_checkpoint.STATE_KEYS, 0)


def whole_values() -> dict[str, Tensor]:
    """Every tensor of the checkpoint, whole: weights, two moments, and a step for each."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for number, (name, rule) in enumerate(RULES.items()):
        for prefix in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            values[f"{prefix}.{name}"] = torch.randn(rule.shape, generator=generator)
        values[f"optimizer.step.{name}"] = torch.tensor(float(number))
    return values


@dataclass(frozen=True)
class Layout:
    """Degrees; `shards` of the replicas of a tile share it by FSDP2, and the others repeat that."""

    degrees: Degrees = field(default_factory=Degrees)
    shards: int = 1


class Model:
    """This process's part: names -> parameters, as FSDP2 leaves them, and optimizer state like them."""

    def __init__(self, layout: Layout, values: Mapping[str, Tensor]) -> None:
        world_size = distributed.get_world_size() if distributed.is_initialized() else 1
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        topology = Topology.of(layout.degrees, world_size)
        place = topology.place(rank)
        self.tiles: dict[str, Tile] = {name: tile_of(rule, topology, place) for name, rule in RULES.items()}
        stage = list(RULES)[place.pp :: topology.pp]  # the layers of a stage
        self.tensors: dict[str, Tensor] = {}
        for prefix in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            module = nn.Module()
            module.experts = nn.Module()
            for name in stage:
                owner = module.experts if RULES[name].is_expert else module
                owner.register_parameter(name.replace(".", "_"), nn.Parameter(self.local(name, values, prefix)))
            if world_size > 1:
                self._shard(module, topology, layout.shards)
            held = {name.removeprefix("experts."): p for name, p in module.named_parameters()}
            self.tensors |= {f"{prefix}.{name}": held[name.replace(".", "_")].detach() for name in stage}
        self.tensors |= {f"optimizer.step.{name}": values[f"optimizer.step.{name}"].clone() for name in stage}

    @staticmethod
    def _shard(module: nn.Module, topology: Topology, shards: int) -> None:
        dense = init_device_mesh(
            "cpu",
            (topology.pp, topology.dp // shards, shards, topology.tp),
            mesh_dim_names=("pp", "rep", "shard", "tp"),
        )
        experts = init_device_mesh(
            "cpu", (topology.pp, topology.edp, topology.ep, topology.etp), mesh_dim_names=("pp", "edp", "ep", "etp")
        )
        experts_module = module.get_submodule("experts")
        if list(experts_module.parameters()):
            fully_shard(experts_module, mesh=experts["edp"])
        fully_shard(module, mesh=dense["rep", "shard"] if topology.dp > shards else dense["shard"])

    def local(self, name: str, values: Mapping[str, Tensor], prefix: str) -> Tensor:
        """The tile of `values`, padded by something that must never come back."""
        tile = self.tiles[name]
        local = torch.full(tile.local_shape, 777.0)
        local[tile.local_index()] = values[f"{prefix}.{name}"][tile.index()]
        return local

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {name.removeprefix("model."): t for name, t in self.tensors.items() if name.startswith("model.")}

    def pieces(self) -> dict[str, Tensor]:
        """What a checkpoint takes."""
        return tiled(self.tensors, self.tiles)

    def zero_(self) -> None:
        """Forget all values, padding alone excepted."""
        for tensor in self.tensors.values():
            (tensor if tensor.dim() == 0 else tensor.to_local() if hasattr(tensor, "to_local") else tensor).zero_()

    def differing(self, values: Mapping[str, Tensor]) -> list[str]:
        """The names whose elements here are not those of `values`."""
        from tessel.checkpoint.tiles import part_of

        wrong = []
        for name, tensor in self.tensors.items():
            if tensor.dim() == 0:
                same = torch.equal(tensor, values[name])
            else:
                part = part_of(tensor, self.tiles[name.split(".", 2)[2] if name.startswith("o") else name[6:]])
                same = torch.equal(part.values, values[name][part.index()])
            wrong += [] if same else [name]
        return wrong


def save(
    folder: Path,
    iteration: int,
    tensors: Mapping[str, Tensor],
    team: Team,
    rng: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """`training.save` with little around the tensors."""

    def metadata(path: Path) -> None:
        path.mkdir()

    run_checkpoint.save(folder, iteration, tensors, state or STATE, rng, metadata, None, team, **more)


def nonzero(found: Iterable[list[str]]) -> list[list[str]]:
    """The lists that are not empty."""
    return [names for names in found if names]
