"""Which part of a parameter lies where: the arithmetic on the table's rules.

A tile is what one rank holds of a parameter before data parallelism cuts it further: along the
vocabulary, heads or features for tensor parallelism, and along the leading dim of stacked experts
for expert parallelism.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from tessel.errors import UsageError
from tessel.layout.sharding import DecoderShape, ParamRule, parameters
from tessel.layout.topology import Place, Topology


@dataclass(frozen=True)
class Slice:
    """What one rank holds of a parameter: `start:stop` along `dim` of the whole, then `padding` rows of zeros.

    `dim` is None for the whole parameter. `copies` ranks in a row hold this same slice.
    """

    dim: int | None
    start: int
    stop: int
    padding: int = 0
    copies: int = 1

    def index(self, num_dims: int) -> tuple[slice, ...]:
        """The slice as an index into the whole parameter, for numpy, torch or a safetensors slice."""
        return tuple(slice(self.start, self.stop) if dim == self.dim else slice(None) for dim in range(num_dims))


def slice_of(rule: ParamRule, shape: tuple[int, ...], degree: int, rank: int) -> Slice:
    """Which part of a parameter of the whole, unpadded `shape` belongs to `rank` of `degree` tensor-parallel ranks.

    A vocabulary is padded to a multiple of the degree, so that every rank has as many rows; a rank
    past the last real row has an empty slice and padding alone. Other cuts fall between blocks.

    Raises:
        UsageError: the blocks cannot be dealt out evenly.
    """
    if not 0 <= rank < degree:
        raise UsageError(f"tensor-parallel rank {rank} is not in 0..{degree - 1}.")
    if rule.split == "replicated" or rule.dim is None:
        return Slice(None, 0, shape[0] if shape else 1, copies=degree)
    size = shape[rule.dim]
    if rule.split == "vocab":
        rows = -(-size // degree)
        start, stop = min(rank * rows, size), min((rank + 1) * rows, size)
        return Slice(rule.dim, start, stop, padding=rows - (stop - start))
    copies = degree // rule.blocks if rule.copies_when_short and degree > rule.blocks else 1
    if degree % copies or rule.blocks % (degree // copies):
        raise UsageError(
            f"--tensor-model-parallel-size {degree} does not divide the {rule.blocks} blocks of a {rule.split}-cut "
            f"parameter of shape {shape}; use one of {_degrees(rule)}."
        )
    rank, degree = rank // copies, degree // copies
    length = size // rule.blocks * (rule.blocks // degree)
    return Slice(rule.dim, rank * length, (rank + 1) * length, copies=copies)


@functools.lru_cache
def _degrees(rule: ParamRule) -> list[int]:
    divisors = [degree for degree in range(1, min(rule.blocks, 256) + 1) if rule.blocks % degree == 0]
    return divisors + [rule.blocks * 2, rule.blocks * 4] if rule.copies_when_short else divisors


@dataclass(frozen=True)
class Tile:
    """The box `start` to `stop` of a parameter of `shape`, held in a local tensor of `local_shape`.

    `local_shape` is larger than the box only where a vocabulary is padded: rows of zeros at its end.
    `copies`: how many tensor-parallel (or expert-tensor-parallel) ranks hold this same tile.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    local_shape: tuple[int, ...]
    copies: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether the tile is the whole parameter, unpadded."""
        return self.local_shape == self.shape

    @property
    def size(self) -> tuple[int, ...]:
        """The extent of the box: `local_shape` without padding."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    def index(self) -> tuple[slice, ...]:
        """The box as an index into the whole parameter, for numpy, torch or a safetensors slice."""
        return tuple(slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))

    def local_index(self) -> tuple[slice, ...]:
        """The box as an index into the local tensor: all of it but the padding."""
        return tuple(slice(0, size) for size in self.size)


def tile_of(rule: ParamRule, topology: Topology, place: Place) -> Tile:
    """The tile of a parameter that the rank at `place` holds, whatever its pipeline stage.

    Raises:
        UsageError: a degree does not divide what it cuts.
    """
    degree, rank = (topology.etp, place.etp) if rule.is_expert else (topology.tp, place.tp)
    cut = slice_of(rule, rule.shape, degree, rank)
    start, stop, local = [0] * len(rule.shape), list(rule.shape), list(rule.shape)
    if cut.dim is not None:
        start[cut.dim], stop[cut.dim] = cut.start, cut.stop
        local[cut.dim] = cut.stop - cut.start + cut.padding
    if rule.is_expert:
        num_experts = rule.shape[0]
        if num_experts % topology.ep:
            raise UsageError(
                f"--expert-model-parallel-size {topology.ep} does not divide the {num_experts} experts; use one of "
                f"{[n for n in range(1, num_experts + 1) if num_experts % n == 0]}."
            )
        local[0] = num_experts // topology.ep
        start[0], stop[0] = place.ep * local[0], (place.ep + 1) * local[0]
    return Tile(rule.shape, tuple(start), tuple(stop), tuple(local), cut.copies)


def num_padding_elements(rule: ParamRule, topology: Topology) -> int:
    """Elements that pad a parameter, over all tensor-parallel ranks together."""
    if rule.split != "vocab" or rule.dim is None:
        return 0
    rows = -(-rule.shape[rule.dim] // topology.tp) * topology.tp
    return (rows - rule.shape[rule.dim]) * math.prod(rule.shape) // rule.shape[rule.dim]


def tiles_of(config: DecoderShape, topology: Topology, place: Place) -> dict[str, Tile]:
    """The tile of every parameter of the model, by its name."""
    return {name: tile_of(rule, topology, place) for name, rule in parameters(config).items()}
