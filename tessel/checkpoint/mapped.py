"""Tensors between the names of a folder with a `model_mapping.yaml` and those of the family that it names.

The mapping is of names in Hugging Face folders on both sides; what the family's mean in memory is
said in names.py. A tensor that several of the family's lie in is cut and put together as Megatron's
fused ones are (fused.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessel.checkpoint.fused import Rows, assembled, fuse, pieces, qkv_rows
from tessel.checkpoint.names import places_of
from tessel.checkpoint.stored import Assembled, Derived, Index, Piece, StoredTensor, Transposed
from tessel.errors import TesselError
from tessel.model.config import ModelConfig
from tessel.model.mapping import MAPPING_FILE, Match

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Named(Derived):
    """The same tensor under another name."""

    new_name: str

    @property
    def name(self) -> str:
        return self.new_name

    def read(self, index: Index | None = None) -> Tensor:
        """The box `index`, or all of it."""
        return self.source.read(index)


def in_family(
    stored: Mapping[str, StoredTensor], config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """The tensors of a folder by the family's names. `shapes`: those of the parameters in memory.

    Raises:
        TesselError: a tensor does not have the shape that its parts need, or two of them hold the same.
    """
    if config.own is None:
        return dict(stored)
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        match = config.own.mapping.of_stored(name)
        for part in [tensor] if match is None else _parts(match, tensor, config, shapes):
            if part.name in found:
                raise TesselError(f"{tensor.path} has {part.name} twice, by {MAPPING_FILE}: in {name}, and elsewhere.")
            found[part.name] = part
    return found


def _parts(
    match: Match, tensor: StoredTensor, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[StoredTensor]:
    source = _turned(match, tensor)
    if len(match.parts) == 1:
        return [Named(source, match.parts[0])]
    whole = source.shape
    sizes = [shape_of(part, config, shapes)[0] for part in match.parts]
    if not whole or whole[0] != sum(sizes):
        raise TesselError(
            f"{tensor.path}: {match.stored} is {tensor.shape}, and {', '.join(match.parts)}, which {MAPPING_FILE} says "
            f"lie in it, have {sum(sizes)} rows. Check the sizes in config.json and the entry of the mapping."
        )
    fused = fuse(match.parts, _rows(match, sizes, config), (0,) * len(whole), whole)
    part_shapes = {part: (size, *whole[1:]) for part, size in zip(match.parts, sizes, strict=True)}
    found: dict[str, list[Piece]] = {part: [] for part in match.parts}
    for part, piece in pieces(fused, source, part_shapes):
        found[part].append(piece)
    return [Assembled(part, tensor.dtype, part_shapes[part], tuple(found[part])) for part in match.parts]


def _turned(match: Match, tensor: StoredTensor) -> StoredTensor:
    if not match.rule.transpose:
        return tensor
    _require_matrix(match, tensor.shape)
    return Transposed(tensor)


def _require_matrix(match: Match, shape: Sequence[int]) -> None:
    if len(shape) < 2:
        raise TesselError(
            f"{MAPPING_FILE} says to transpose {match.stored}, which is {tuple(shape)}. Give biases their own entry."
        )


def _rows(match: Match, sizes: Sequence[int], config: ModelConfig) -> list[Rows]:
    """Which rows of which part follow each other in the tensor of the folder."""
    if match.rule.order == "parts":
        return [Rows(part, 0, size) for part, size in enumerate(sizes)]
    heads, groups, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if list(sizes) != [heads * head, groups * head, groups * head]:
        raise TesselError(
            f"{MAPPING_FILE}: {match.rule.stored} has the order groups, which is one of q, k and v, in this order; its "
            f"parts have {', '.join(map(str, sizes))} rows."
        )
    return qkv_rows(0, groups, heads // groups, head)


def shape_of(name: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a tensor under the family's name.

    Raises:
        TesselError: the family has no such tensor.
    """
    place = places_of(name)[0]
    if place.name not in shapes:
        raise TesselError(
            f"{MAPPING_FILE}: a {config.family} model of this config.json has no {name}. Check the names on the right."
        )
    shape = shapes[place.name]
    return shape if place.expert is None else shape[1:]


def joined(match: Match, parts: Sequence[StoredTensor], config: ModelConfig) -> StoredTensor:
    """The tensor of the folder, out of the family's."""
    if len(parts) == 1:
        whole: StoredTensor = Named(parts[0], match.stored)
    else:
        rows = _rows(match, [part.shape[0] for part in parts], config)
        size = parts[0].shape
        by_name = dict(zip(match.parts, parts, strict=True))
        whole = assembled(match.stored, fuse(match.parts, rows, (0,) * len(size), size), by_name, parts[0].dtype)
    return Transposed(whole) if match.rule.transpose else whole


def own_entries(entries: Entries, config: ModelConfig) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that a folder is to have, by its own names, out of those by the family's.

    Raises:
        TesselError: the mapping cannot be followed backwards.
    """
    if config.own is None:
        return dict(entries)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (dtype, shape) in entries.items():
        match = _of_name(name, config)
        if match is None:
            found[name] = (dtype, shape)
        elif match.stored not in found:
            lacking = [part for part in match.parts if part not in entries]
            if lacking:
                raise _incomplete(match.stored, lacking)
            if len({entries[part][0] for part in match.parts}) > 1:
                raise TesselError(
                    f"{MAPPING_FILE}: {match.stored} is to hold {', '.join(match.parts)}, which are of several dtypes. "
                    "Give one by --params-dtype."
                )
            whole = (sum(entries[part][1][0] for part in match.parts), *shape[1:])
            if match.rule.transpose:
                _require_matrix(match, whole)
                whole = (*whole[:-2], *reversed(whole[-2:]))
            found[match.stored] = (dtype, whole)
    return found


def _of_name(name: str, config: ModelConfig) -> Match | None:
    assert config.own is not None
    mapping = config.own.mapping
    match = mapping.of_name(name)
    if mapping.of_stored(name if match is None else match.stored) != match:
        raise TesselError(
            f"{MAPPING_FILE}: {name} would be written as {name if match is None else match.stored}, which another "
            "entry is for. Give each tensor one entry."
        )
    return match


def _incomplete(stored: str, lacking: Sequence[str]) -> TesselError:
    return TesselError(
        f"{MAPPING_FILE}: {stored} is to hold {', '.join(lacking)}, which this model does not have. Check the names on "
        "the right."
    )


def as_own(tensors: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the family's names as the folder has them; parts are held until all that lie in one are there.

    Raises:
        TesselError: the mapping cannot be followed backwards.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        match = None if config.own is None else _of_name(name, config)
        if match is None:
            yield name, tensor
            continue
        parts = waiting.setdefault(match.stored, {})
        parts[name] = tensor
        if len(parts) == len(match.parts):
            yield match.stored, _whole(match, [parts[part] for part in match.parts], config)
            del waiting[match.stored]
    for stored, parts in waiting.items():
        assert config.own is not None
        found = config.own.mapping.of_stored(stored)
        raise _incomplete(stored, [part for part in (found.parts if found else ()) if part not in parts])


def _whole(match: Match, parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    whole = parts[0]
    if len(parts) > 1:
        rows = _rows(match, [part.shape[0] for part in parts], config)
        whole = torch.cat([parts[row.part][row.start : row.stop] for row in rows])
    if not match.rule.transpose:
        return whole
    _require_matrix(match, whole.shape)
    return whole.transpose(-1, -2).contiguous()
