"""The seam between formats: a model in some folder, each tensor whole under its parameter's name, none of it read.

A format's reader makes a `StoredModel`; a writer takes one and a `Target`. Between them lie stored
tensors, which read boxes out of memory maps when asked. `Assembled` puts one together from boxes of
others, in either direction: a parameter out of what Megatron's ranks hold, and what a rank holds out
of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tessel.errors import TesselError
from tessel.layout.stages import Placement
from tessel.model.config import ModelConfig

Format = Literal["hf", "torch", "torch_dist", "torch_dcp", "legacy"]
# Whose habits a written checkpoint has, where the tools differ: padding rows of the vocabulary, and what goes along.
#   mcore  Megatron's own converter   rows up to a multiple of (128 x TP), copies of the last one
#   v1     MindSpeed's first one      the same with (1 x TP)
#   v2     MindSpeed's second one     no padding: the last TP rank has fewer rows
#   pai    Pai-Megatron-Patch         no padding: TP must divide the rows
Flavour = Literal["mcore", "v1", "v2", "pai"]
Index = tuple[slice, ...]
# What stands before a parameter's name in those of the optimizer's tensors.
MASTER, MOMENTS = "param.", ("exp_avg", "exp_avg_sq")
# Small enough for the allocator to use the same memory again and again.
BLOCK_BYTES = 8 * 2**20


class StoredTensor(Protocol):
    """A tensor in a file."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def path(self) -> Path: ...

    def read(self, index: Index | None = None) -> Tensor:
        """The tensor on the CPU, or the box of it that `index` says (a slice from a to b for each dim).

        Memory-mapped where the file allows it: what comes back is then a view that is not to be written to.
        """


@dataclass(frozen=True)
class Piece:
    """The box of a tensor from `start` on, of `size`, is the box of `source` from `source_start` on.

    The two are aligned at their last dims: leading dims that only one of them has are of size 1 in the box.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    source: StoredTensor
    source_start: tuple[int, ...]

    def overlap(self, box: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
        """The part of `box` (from, to) that this piece holds; None if it holds nothing of it."""
        found = [
            (max(begin, low), min(begin + size, high))
            for begin, size, (low, high) in zip(self.start, self.size, box, strict=True)
        ]
        return found if all(low < high for low, high in found) else None

    def read(self, box: Sequence[tuple[int, int]]) -> Tensor:
        """The values of `box`, which lies inside the piece."""
        sizes = [high - low for low, high in box]
        offsets = [low - begin for begin, (low, _) in zip(self.start, box, strict=True)]
        lead = len(self.source_start) - len(sizes)
        shared = min(len(self.source_start), len(sizes))
        index = [slice(at, at + 1) for at in self.source_start[: max(lead, 0)]]
        for at, offset, size in zip(
            self.source_start[max(lead, 0) :], offsets[-shared:] if shared else [], sizes[-shared:], strict=True
        ):
            index.append(slice(at + offset, at + offset + size))
        return self.source.read(tuple(index)).reshape(sizes)


@dataclass(frozen=True)
class Assembled:
    """A tensor put together from disjoint boxes of other stored tensors, converted to `dtype` where theirs differs."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def path(self) -> Path:
        return self.pieces[0].source.path

    @property
    def is_whole(self) -> bool:
        """Whether the pieces have as many elements as the tensor."""
        return sum(math.prod(piece.size) for piece in self.pieces) == math.prod(self.shape)

    def read(self, index: Index | None = None) -> Tensor:
        """The box `index`, or all of it: of each piece, what lies in the box is read."""
        box = bounds(index, self.shape)
        found = [(piece, overlap) for piece in self.pieces if (overlap := piece.overlap(box)) is not None]
        if len(found) == 1 and found[0][1] == box:
            return found[0][0].read(box).to(self.dtype)
        values = torch.empty([high - low for low, high in box], dtype=self.dtype)
        for piece, overlap in found:
            target = tuple(slice(low - base, high - base) for (low, high), (base, _) in zip(overlap, box, strict=True))
            values[target] = piece.read(overlap)
        return values


def bounds(index: Index | None, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(from, to) for each dim of a box, all of it without an index."""
    if index is None:
        return [(0, size) for size in shape]
    return [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]


def index_of(box: Sequence[tuple[int, int]]) -> Index:
    """A box as an index."""
    return tuple(slice(low, high) for low, high in box)


@dataclass(frozen=True)
class Derived:
    """A tensor made of another one's values, with its name and file."""

    source: StoredTensor

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def path(self) -> Path:
        return self.source.path


@dataclass(frozen=True)
class Transposed(Derived):
    """The last two dims exchanged."""

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.source.shape
        return (*lead, columns, rows)

    def read(self, index: Index | None = None) -> Tensor:
        """The box `index`, or all of it."""
        if index is None:
            return self.source.read().transpose(-1, -2)
        *lead, rows, columns = index
        return self.source.read((*lead, columns, rows)).transpose(-1, -2)


@dataclass(frozen=True)
class Reshaped(Derived):
    """The same elements in the same order, in another shape. Where the source is no memory map, it is read whole."""

    new_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.new_shape

    def read(self, index: Index | None = None) -> Tensor:
        """The box `index`, or all of it."""
        values = self.source.read().reshape(self.new_shape)
        return values if index is None else values[index]


@dataclass(frozen=True)
class PaddedRows(Derived):
    """`num_rows` rows: those of the source, then copies of its last one."""

    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, *self.source.shape[1:])

    def read(self, index: Index | None = None) -> Tensor:
        """The box `index`, or all of it."""
        (low, high), *rest = bounds(index, self.shape)
        num_real = self.source.shape[0]
        real = index_of([(min(low, num_real - 1), min(max(high, low), num_real)), *rest])
        values = self.source.read(real)
        if high <= num_real:
            return values[: high - low]
        num_copies = high - max(low, num_real)
        last = values[-1:].expand(num_copies, *values.shape[1:])
        return last if low >= num_real else torch.cat([values, last])


@dataclass(frozen=True)
class Cast(Derived):
    """The values in another dtype."""

    new_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.new_dtype

    def read(self, index: Index | None = None) -> Tensor:
        """The box `index`, or all of it.

        Raises:
            TesselError: finite values are too large for the dtype.
        """
        values = self.source.read(index)
        cast = values.to(self.new_dtype)
        if self.new_dtype.is_floating_point and torch.finfo(self.new_dtype).max < torch.finfo(values.dtype).max:
            lost = int((torch.isinf(cast) & torch.isfinite(values)).sum())
            if lost:
                raise TesselError(
                    f"{self.name}: {lost:,} values are too large for {name_of(self.new_dtype)} (the largest is "
                    f"{torch.finfo(self.new_dtype).max:g}) and would become infinite. Use --params-dtype bf16 or fp32."
                )
        return cast


def blocks(tensor: StoredTensor) -> Iterator[Tensor]:
    """All elements in row-major order, in blocks of at most `BLOCK_BYTES`, or of one row of dim 0 if that is more."""
    if isinstance(tensor, Reshaped):
        yield from blocks(tensor.source)
        return
    shape = tensor.shape
    if not shape:
        yield tensor.read()
        return
    row_bytes = math.prod(shape[1:]) * tensor.dtype.itemsize
    step = max(BLOCK_BYTES // row_bytes, 1) if row_bytes else shape[0]
    for low in range(0, shape[0], max(step, 1)):
        yield tensor.read(index_of([(low, min(low + step, shape[0])), *((0, size) for size in shape[1:])]))


def bytes_of(block: Tensor) -> memoryview:
    """Its bytes in row-major order; a copy only where they do not lie so already."""
    flat = block.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def name_of(dtype: torch.dtype) -> str:
    """A dtype in a word, as config.json has it."""
    return str(dtype).removeprefix("torch.")


def degrees_text(degrees: Mapping[str, int]) -> str:
    """`TP2 PP4`; empty where all are 1."""
    labels = {"tp": "TP", "pp": "PP", "chunks": "VPP", "ep": "EP", "etp": "ETP"}
    return " ".join(f"{label}{degrees[key]}" for key, label in labels.items() if degrees.get(key, 1) > 1)


@dataclass(frozen=True)
class Target:
    """How a checkpoint that is cut by degrees is to be written.

    `num_chunks` is Megatron's virtual pipeline size; `layer_list`, `first`, `last`, `noop_layers` and `placement` are
    those of `layout.stages.stages_of`. `etp` None is the same as `tp`. `vocab_divisor` None is the flavour's
    own. `dtype` None keeps each tensor's. `iteration` None writes a release. `transformer_engine` and `grouped_gemm`
    choose among Megatron's names for the same weights: those of the fused layers, and of experts in one matrix.
    `nf4`: linear maps of layers in four bits, in the torch format alone.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    num_chunks: int = 1
    layer_list: tuple[int, ...] | None = None
    first: int | None = None
    last: int | None = None
    noop_layers: tuple[int, ...] = ()
    placement: Placement = "loop"
    flavour: Flavour = "mcore"
    vocab_divisor: int | None = None
    dtype: torch.dtype | None = None
    iteration: int | None = 1
    transformer_engine: bool = False
    grouped_gemm: bool = False
    nf4: bool = False


@dataclass(frozen=True)
class Copy:
    """A tensor that the files hold more than once: `what` and where it is, and the one that is read instead."""

    what: str
    tensor: StoredTensor
    original: StoredTensor


@dataclass(frozen=True)
class StoredModel:
    """A model that was found in a folder, in any format.

    `tensors`: each parameter of `layout.sharding.parameters(config)`, whole and unpadded. `guessed`: what of
    `config` the files did not say, in sentences. `iteration` is None for a release or a Hugging Face
    folder. `degrees`: "tp", "pp", "chunks", "ep", "etp" of the files, those above 1. `args`: the run's
    arguments as plain values. `optimizer`: exp_avg.NAME, exp_avg_sq.NAME and param.NAME (the fp32 master
    weight), empty where there is none. `state`: numbers to go on with ("consumed_train_samples", "step",
    "opt_param_scheduler", ...). `side_files`: tokenizer and generation_config.json by name, for the way back.
    `left_out`: what is in the files and cannot be carried over, in sentences; `notes`: what is to be said besides.
    `copies`: what lies in the files again, as norms on every tensor-parallel rank; nothing else reads it.
    """

    format: Format
    folder: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    guessed: tuple[str, ...] = ()
    iteration: int | None = None
    degrees: Mapping[str, int] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, StoredTensor] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    side_files: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = field(default=(), repr=False)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of its tensors, the one with the most elements first."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
        return tuple(sorted(sizes, key=lambda dtype: -sizes[dtype]))


def masters(source: StoredModel) -> dict[str, StoredTensor]:
    """The weights that training goes on with, in fp32: the optimizer's own where there are some."""
    found = {name: source.optimizer.get(MASTER + name, tensor) for name, tensor in source.tensors.items()}
    return {
        name: tensor if tensor.dtype is torch.float32 else Cast(tensor, torch.float32) for name, tensor in found.items()
    }


@dataclass(frozen=True)
class PlannedFile:
    """A file that a conversion will write: `name` below the checkpoint's folder, and what goes into it.

    `tensors` by their keys in the file; `write` writes the whole file at the path it is given and returns its sha256.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    write: Callable[[Path], str] = field(repr=False)
