"""The process groups of a topology, and the meshes that FSDP2 shards over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from tessel.layout.topology import Place, Topology


@dataclass(frozen=True)
class Groups:
    """The groups that this rank is in. None where the degree is 1.

    `replicas` is the mesh of ranks that hold the same tile of a dense parameter (data and context
    parallel, of this pipeline stage), one dim (shard) or two (replicate, shard); `expert_replicas` that of
    an expert. Both have size 1 where nothing is shared. `batch` are the ranks whose losses add up:
    all but the tensor-parallel ones. `kv_copies` are the tensor-parallel ranks with the same key/value
    heads; `tied` are the first and the last stage, for ranks on these.
    """

    topology: Topology
    rank: int
    device: torch.device
    tp: ProcessGroup | None
    cp: ProcessGroup | None
    dp: ProcessGroup | None
    pp: ProcessGroup | None
    ep: ProcessGroup | None
    etp: ProcessGroup | None
    kv_copies: ProcessGroup | None
    tied: ProcessGroup | None
    batch: ProcessGroup | None
    replicas: DeviceMesh
    expert_replicas: DeviceMesh

    @property
    def tied_copies(self) -> bool:
        """Whether a tied embedding lies on two stages."""
        return self.topology.pp > 1

    @property
    def place(self) -> Place:
        """This rank's coordinates."""
        return self.topology.place(self.rank)


def build_groups(
    topology: Topology, device: torch.device, num_shards: int, expert_num_shards: int, num_kv_heads: int
) -> Groups:
    """Make every group of `topology`; all ranks call it together, with torch.distributed initialised.

    `num_shards` (`expert_num_shards`) of the ranks that hold the same parameters share it, and the others
    repeat that: 1 is plain data parallelism, all of them one sharded copy.
    """
    rank = distributed.get_rank()
    kv_copies = max(topology.tp // num_kv_heads, 1)
    return Groups(
        topology=topology,
        rank=rank,
        device=device,
        tp=_group(topology.groups("tp"), rank),
        cp=_group(topology.groups("cp"), rank),
        dp=_group(topology.groups("dp"), rank),
        pp=_group(topology.groups("pp"), rank),
        ep=_group(topology.expert_groups("ep"), rank),
        etp=_group(topology.expert_groups("etp"), rank),
        kv_copies=_group(
            [ranks[i : i + kv_copies] for ranks in topology.groups("tp") for i in range(0, len(ranks), kv_copies)], rank
        ),
        tied=_group([[ranks[0], ranks[-1]] for ranks in topology.groups("pp") if len(ranks) > 1], rank),
        batch=_group(topology.groups("cp", "dp", "pp"), rank),
        replicas=_mesh(topology.groups("cp", "dp"), rank, device, num_shards),
        expert_replicas=_mesh(topology.expert_groups("edp"), rank, device, expert_num_shards),
    )


def _group(groups: Sequence[Sequence[int]], rank: int) -> ProcessGroup | None:
    """Every rank takes part in making every group, also those that it is not in."""
    own = None
    for ranks in groups:
        if len(ranks) > 1:
            made = distributed.new_group(list(ranks))
            if rank in ranks:
                own = made
    return own


def _mesh(groups: Sequence[Sequence[int]], rank: int, device: torch.device, num_shards: int) -> DeviceMesh:
    """[replicate, shard], or [shard] where there is one copy. Neighbouring ranks share a copy."""
    own = None
    for ranks in groups:
        grid = torch.tensor(ranks).view(-1, num_shards)
        rows = [distributed.new_group(row) for row in grid.tolist()]
        columns = [distributed.new_group(column) for column in grid.t().tolist()] if len(grid) > 1 else []
        if rank not in ranks:
            continue
        row, column = divmod(list(ranks).index(rank), num_shards)
        if columns:
            own = DeviceMesh.from_group(
                [columns[column], rows[row]], device.type, mesh=grid, mesh_dim_names=("replicate", "shard")
            )
        else:
            own = DeviceMesh.from_group(rows[0], device.type, mesh=grid[0], mesh_dim_names=("shard",))
    assert own is not None
    return own
