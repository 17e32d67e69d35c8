"""The distributed optimizer's state as one rank gathered it: Megatron's `dp_zero_gather_scatter` in torch_dist.

Each data-parallel group has an entry with what distrib_optim.pt holds: a flat buffer of each model chunk, its buckets
joined. Which layers' order the parameters have in it is not said: it is the one in which the first rows of the fp32
weights are those of the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessel.checkpoint.dcp_files import DcpFolder
from tessel.checkpoint.flat import Unflattened
from tessel.checkpoint.flat_buffers import ORDERS, BufferKey, Buffers, Spot, add_pieces
from tessel.checkpoint.mcore_match import source_of
from tessel.checkpoint.mcore_names import Entry
from tessel.checkpoint.mcore_optimizer import starts_of
from tessel.checkpoint.stored import Piece, StoredTensor, index_of
from tessel.checkpoint.torch_file import LoadedTensor
from tessel.model.config import ModelConfig

_ENTRY = re.compile(r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.param_state/.+")
_KINDS = ("param", "exp_avg", "exp_avg_sq")


def is_gathered(found: DcpFolder) -> bool:
    """Whether the optimizer's state lies in such entries."""
    return any(_ENTRY.fullmatch(name) for name in found.others)


def parts_of_gathered(
    found: DcpFolder,
    args: Mapping[str, Any],
    buffers: Buffers,
    config: ModelConfig,
    weights: Mapping[str, StoredTensor],
) -> dict[str, list[Piece]] | None:
    """The pieces of every state, by "exp_avg.NAME" and so on; None if no order that is known fits.

    Raises:
        TesselError: an entry is damaged.
    """
    states = _states(found)
    for order in ORDERS:
        parts: dict[str, list[Piece]] = {}
        seen: set[tuple[object, ...]] = set()
        for key, entries in buffers.all(order):
            own = states.get(key)
            spots = _spots(entries, own, args)
            if own is None or spots is None or not _are_weights(spots, own["param"], weights):
                break
            add_pieces(parts, spots, [own], seen, config)
        else:
            return parts
    return None


def _states(found: DcpFolder) -> dict[BufferKey, dict[str, StoredTensor]]:
    """The flat buffers that there are; what is none of Adam's is left out."""
    states: dict[BufferKey, dict[str, StoredTensor]] = {}
    for name, entry in found.others.items():
        match = _ENTRY.fullmatch(name)
        content = found.other(name, max_bytes=entry.length) if match else None
        content = content[0] if isinstance(content, list) and len(content) == 1 else content
        if match is None or not isinstance(content, Mapping) or not content.get("buckets_coalesced"):
            continue
        for chunk, by_dtype in content.items():
            kinds = list(by_dtype.values()) if type(chunk) is int and isinstance(by_dtype, Mapping) else []
            flat = kinds[0] if len(kinds) == 1 and isinstance(kinds[0], Mapping) else {}
            own = {kind: flat[kind] for kind in _KINDS if isinstance(flat.get(kind), Tensor)}
            if len(own) == len(_KINDS) and len({tuple(values.shape) for values in own.values()}) == 1:
                key = BufferKey(int(match[1] or 0), int(match[2]), chunk)
                states[key] = {kind: LoadedTensor(kind, Path(entry.path), values) for kind, values in own.items()}
    return states


def _spots(
    entries: Sequence[Entry], own: Mapping[str, StoredTensor] | None, args: Mapping[str, Any]
) -> list[Spot] | None:
    if own is None:
        return None
    in_order = list(reversed(entries))
    starts = starts_of([math.prod(entry.shape) for entry in in_order], math.prod(own["param"].shape), args)
    if starts is None:
        return None
    return [Spot(entry, 0, start) for entry, start in zip(in_order, starts, strict=True)]


def _are_weights(spots: Sequence[Spot], masters: StoredTensor, weights: Mapping[str, StoredTensor]) -> bool:
    """Whether the first row of every fp32 weight that is not fused of several rounds to the weight's."""
    for spot in spots:
        fused = spot.entry.fused
        if len(fused.spans) != 1 or fused.spans[0].start[0] >= weights[fused.spans[0].parameter].shape[0]:
            continue
        span = fused.spans[0]
        size = (min(fused.shape[0], 1 if len(fused.shape) > 1 else fused.shape[0]), *fused.shape[1:])
        lead = len(span.start) - len(size)
        box = [(at, at + length) for at, length in zip(span.start, (1,) * lead + size, strict=True)]
        weight = weights[span.parameter].read(index_of(box))
        flat = source_of(spot.entry, Unflattened(masters, (), spot.start, spot.entry.shape))
        master = flat.read(index_of([(0, length) for length in size]))
        if not torch.equal(master.to(weight.dtype), weight.reshape(master.shape)):
            return False
    return True
