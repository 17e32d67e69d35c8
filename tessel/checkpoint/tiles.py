"""Pieces of parameters, as torch.distributed.checkpoint (DCP) writes and reads them.

DCP asks a tensor three questions: what would you write, which parts of the whole do you hold, and
where is that part. `TileTensor` answers them for one box of a parameter, so that a checkpoint knows
whole, unpadded parameters by name, and the layout it was saved on is not in it.

All that tessel takes of DCP's inner parts is in this file, and in dcp_write.py the classes of its index.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from tessel.checkpoint import safe_pickle
from tessel.errors import TesselError
from tessel.layout.tiles import Tile


@dataclass(frozen=True)
class Part:
    """What this process holds of a parameter: `values`, a view without padding, begins at `start` of the whole."""

    values: Tensor
    start: tuple[int, ...]
    shape: tuple[int, ...]  # of the whole, unpadded parameter

    @property
    def stop(self) -> tuple[int, ...]:
        """Where it ends."""
        return tuple(begin + size for begin, size in zip(self.start, self.values.shape, strict=True))

    def index(self) -> tuple[slice, ...]:
        """The part as an index into the whole."""
        return tuple(slice(begin, end) for begin, end in zip(self.start, self.stop, strict=True))


def whole_tile(shape: tuple[int, ...]) -> Tile:
    """All of a parameter of this shape."""
    return Tile(shape, (0,) * len(shape), shape, shape)


def part_of(tensor: Tensor, tile: Tile | None = None) -> Part:
    """The part of a parameter that `tensor` holds: all of `tile`, or its share of it for a DTensor.

    `tensor` has the tile's `local_shape`, vocabulary padding included; without a tile it is the whole parameter.
    """
    shape = tuple(tensor.shape)
    tile = tile or whole_tile(shape)
    if shape != tile.local_shape:
        raise ValueError(f"a tensor of shape {shape} is no tile of local shape {tile.local_shape}")
    local, offset = _local(tensor)
    begins, sizes = [], []
    for dim, size in enumerate(tile.size):
        begin = min(offset[dim], size)
        begins.append(begin)
        sizes.append(max(0, min(offset[dim] + local.shape[dim], size) - begin))
        local = local.narrow(dim, 0, sizes[dim])
    return Part(local, tuple(a + b for a, b in zip(tile.start, begins, strict=True)), tile.shape)


def held_tile(tensor: Tensor, tile: Tile) -> Tile:
    """What this process holds of a parameter, as a tile: `tile` itself, or its share of it for a DTensor."""
    part = part_of(tensor, tile)
    return Tile(tile.shape, part.start, part.stop, tuple(local_of(tensor).shape), tile.copies)


def local_of(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor, not a copy; a plain tensor itself."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _local(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The local tensor and where it begins in the tensor that is shared out."""
    local = local_of(tensor)
    if not isinstance(tensor, DTensor):
        return local, (0,) * tensor.dim()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(local.shape) == tuple(shape), f"{tuple(local.shape)} held, {tuple(shape)} expected"
    return local, tuple(offset)


class TileTensor(torch.Tensor):
    """A tensor of the whole parameter's shape that holds one part of it. For DCP alone: it computes nothing."""

    part: Part

    @staticmethod
    def __new__(cls, part: Part) -> TileTensor:
        made: TileTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, torch.Size(part.shape), dtype=part.values.dtype, device=part.values.device
        )
        made.part = part
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{function}: a piece of a parameter is only to be saved or loaded")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TileTensor({tuple(self.part.shape)}, {self.part.start} to {self.part.stop})"

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.part.values),
                    size=torch.Size(self.part.shape),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.part.values.numel() == 0:
            return []
        return [ChunkStorageMetadata(torch.Size(self.part.start), self.part.values.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        if tuple(index.offset or ()) != self.part.start:
            raise ValueError(f"{index.fqn} is held from {self.part.start} on, not from {index.offset}")
        return self.part.values


def tile_tensor(local: Tensor, tile: Tile | None) -> TileTensor:
    """`local` as a piece of the whole parameter; see `part_of`."""
    return TileTensor(part_of(local, tile))


def tiled(tensors: Mapping[str, Tensor], tiles: Mapping[str, Tile]) -> dict[str, Tensor]:
    """Every tensor that is cut as its parameter is, as a piece; scalars such as a step's number stay whole.

    Names are a checkpoint's: model.NAME and optimizer.MOMENT.NAME.
    """
    return {name: _tiled(name, tensor, tiles) for name, tensor in tensors.items()}


def _tiled(name: str, tensor: Tensor, tiles: Mapping[str, Tile]) -> Tensor:
    if tensor.dim() == 0 or isinstance(tensor, TileTensor):
        return tensor
    tile = tiles.get(parameter_name(name))
    whole = (tile is None or tile.is_whole) and not isinstance(tensor, DTensor)
    return tensor if whole else tile_tensor(tensor, tile)


def parameter_name(name: str) -> str:
    """The parameter that an entry of a checkpoint belongs to."""
    return name.split(".", 2)[2] if name.startswith("optimizer.") else name.removeprefix("model.")


class SavePlans(default_planner.DefaultSavePlanner):
    """What each process writes: no piece twice, and about as many bytes each.

    `copies`: the pieces are copied to host memory before anything is written, and `on_copied` is called then;
    only what this process writes is copied. `partial`: other folders hold the rest of the parameters.
    """

    def __init__(self, *, on_copied: Callable[[], None] | None = None, partial: bool = False) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._on_copied = on_copied
        self._partial = partial
        self._copies: dict[MetadataIndex, Tensor] = {}

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = default_planner.create_default_global_save_plan(dealt_out(all_plans))
        self.global_plan, self.metadata = plans, metadata
        if not self._partial:
            _require_whole(metadata)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        if self._on_copied is not None:
            for item in plan.items:
                piece = cast(Tensor, super().resolve_data(item)).detach()
                self._copies[item.index] = torch.empty(piece.shape, dtype=piece.dtype).copy_(piece)
            self._on_copied()
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if self._on_copied is not None:
            return self._copies.pop(write_item.index)
        return cast(Tensor, super().resolve_data(write_item)).detach().contiguous()


def dealt_out(plans: list[SavePlan]) -> list[SavePlan]:
    """Leave each piece that several processes hold to that of them with the fewest bytes so far."""
    holders: dict[MetadataIndex, list[int]] = {}
    for number, plan in enumerate(plans):
        for item in plan.items:
            holders.setdefault(item.index, []).append(number)
    sizes = {item.index: _num_bytes(item) for plan in plans for item in plan.items}
    load = [0] * len(plans)
    kept: list[set[MetadataIndex]] = [set() for _ in plans]
    # What only one has comes first, and the largest of the rest.
    for index in sorted(holders, key=lambda index: (len(holders[index]) > 1, -sizes[index])):
        chosen = min(holders[index], key=lambda number: load[number])
        load[chosen] += sizes[index]
        kept[chosen].add(index)
    return [
        replace(plan, items=[item for item in plan.items if item.index in own])
        for plan, own in zip(plans, kept, strict=True)
    ]


def _num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None or data.chunk is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _require_whole(metadata: Metadata) -> None:
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if held != math.prod(entry.size):
                raise ValueError(f"{name} has {math.prod(entry.size)} elements, and the processes hold {held}")


class LoadPlans(default_planner.DefaultLoadPlanner):
    """What this process reads: the stored pieces that its own overlap, each one whole in all."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        found: dict[str, int] = {}
        for item in plan.items:
            found[item.dest_index.fqn] = found.get(item.dest_index.fqn, 0) + math.prod(item.lengths)
        short = [name for name, tensor in self.state_dict.items() if found.get(name, 0) != _num_wanted(tensor)]
        if short:
            more = f" and {len(short) - 5} more" if len(short) > 5 else ""
            raise TesselError(f"it does not hold all of {', '.join(short[:5])}{more}")
        return plan


def _num_wanted(tensor: Tensor) -> int:
    if isinstance(tensor, TileTensor):
        return tensor.part.values.numel()
    return local_of(tensor).numel()


class SliceReader(dcp.FileSystemReader):
    """DCP's reader that reads of a stored piece only the rows it was asked for, and its index through the allow-list.

    `bytes_read` counts them.
    """

    bytes_read = 0

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with open(path, "rb") as file:
            metadata = cast(Metadata, safe_pickle.load(file, safe_pickle.DCP_METADATA_GLOBALS, str(path)))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            assert item.type is LoadItemType.TENSOR
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with open(Path(self.path) / name, "rb") as file:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                for item in items:
                    where = self.storage_data[item.storage_index]
                    with FakeTensorMode():
                        # Its shape, strides and place in the file; no element is read.
                        stored = torch.load(self._slice_file(file, where), map_location="cpu", weights_only=True)
                    part = _mapped(pages, where.offset, stored, item)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    self.bytes_read += part.numel() * part.itemsize
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _mapped(pages: mmap.mmap, begin: int, stored: Tensor, item: ReadItem) -> Tensor:
    """The box that `item` asks for, copied out of the mapped `pages` of a file.

    `stored` is the fake of the tensor that torch.save put at byte `begin`.
    """
    storage, itemsize = stored.untyped_storage(), stored.itemsize
    # Relative to where torch.save began. DCP puts no space between tensors: elements may lie at odd addresses.
    assert storage._checkpoint_offset is not None
    data_begin = begin + storage._checkpoint_offset
    if data_begin + storage.nbytes() > len(pages):
        raise ValueError("it ends in the middle of a tensor")
    raw = torch.frombuffer(pages, dtype=torch.uint8, count=storage.nbytes(), offset=data_begin)
    strides = [stride * itemsize for stride in stored.stride()]
    box = raw.as_strided((*stored.shape, itemsize), (*strides, 1), stored.storage_offset() * itemsize)
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        box = box.narrow(dim, start, length)
    return box.clone(memory_format=torch.contiguous_format).view(stored.dtype).view(tuple(item.lengths))
