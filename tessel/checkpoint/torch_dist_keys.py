"""Where the table of Megatron-core's names lies in a torch_dist checkpoint: layers stacked under one key, or apart.

decoder.layers.mlp.linear_fc2.weight      [layers, ...]
decoder.layers.7.mlp.linear_fc2.weight    [...]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tessel.checkpoint.fused import alone, pieces
from tessel.checkpoint.mcore_names import (
    EMBEDDING,
    EMBEDDING_KEY,
    HEAD,
    HEAD_KEY,
    Entry,
    Part,
    Slot,
    last_slots,
    layer_slots,
)
from tessel.checkpoint.stored import Assembled, Piece, StoredTensor
from tessel.errors import TesselError
from tessel.layout.sharding import parameters
from tessel.layout.topology import Place, Topology
from tessel.model.config import ModelConfig

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
STACK = "decoder.layers."


@dataclass(frozen=True)
class Keyed:
    """A stored tensor that holds an entry of the table of names, at `lead` of its first dims."""

    entry: Entry
    key: str
    source: StoredTensor
    lead: tuple[int, ...]


def find(tensors: Mapping[str, StoredTensor], entry: Entry) -> Keyed | None:
    """Where an entry with its layer's number in the key lies: under that key, or in a stack of layers."""
    if entry.key in tensors:
        return Keyed(entry, entry.key, tensors[entry.key], ())
    layer = LAYER.fullmatch(entry.key)
    if layer is not None and STACK + layer[2] in tensors:
        return Keyed(entry, STACK + layer[2], tensors[STACK + layer[2]], (int(layer[1]),))
    return None


def joined_halves(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors, with gate and up that are stored apart, as ..._w and ..._v, put together in one."""
    whole = dict(tensors)
    for key in [key.removesuffix("_w") for key in tensors if key.endswith("linear_fc1.weight_w")]:
        first, second = whole.pop(key + "_w"), whole.pop(key + "_v", None)
        if second is None or first.shape != second.shape or first.dtype != second.dtype:
            raise TesselError(f"{first.path}: {key}_w and {key}_v are not two halves of one matrix.")
        *lead, rows, columns = first.shape
        zeros = (0,) * len(first.shape)
        parts = Piece(zeros, first.shape, first, zeros), Piece((*zeros[:-2], rows, 0), first.shape, second, zeros)
        whole[key] = Assembled(key, first.dtype, (*lead, 2 * rows, columns), parts)
    return whole


def slots_of(config: ModelConfig, num_rows: Mapping[str, int]) -> Iterator[Slot]:
    """The slots of a whole model, layers by their numbers. `num_rows`: those of embedding and output layer."""
    part = Part(config, Topology(), Place())
    for key, name in ((EMBEDDING_KEY, EMBEDDING), (HEAD_KEY, HEAD)):
        if part.has(name):
            size = (num_rows.get(key, config.vocab_size), config.hidden_size)
            yield {"local": (Entry(key, alone(name, (0, 0), size)),)}
    for layer in range(config.num_hidden_layers):
        yield from layer_slots(part, layer, layer)
    yield last_slots(part, is_first=True)[0]


def assemble(keyed: Sequence[Keyed], config: ModelConfig) -> dict[str, StoredTensor]:
    """Every parameter out of the stored tensors.

    Raises:
        TesselError: parts leave gaps.
    """
    shapes = {name: rule.shape for name, rule in parameters(config).items()}
    parts: dict[str, list[Piece]] = {name: [] for name in shapes}
    for item in keyed:
        for name, piece in pieces(item.entry.fused, item.source, shapes, item.lead):
            parts[name].append(piece)
    tensors: dict[str, StoredTensor] = {}
    for name, held in parts.items():
        whole = Assembled(name, held[0].source.dtype if held else torch.float32, shapes[name], tuple(held))
        if not whole.is_whole:
            raise TesselError(f"The parts of {name} in the files do not make up its shape {shapes[name]}.")
        tensors[name] = whole
    return tensors
