"""Megatron's flat buffers: where each parameter lies in the buckets of the distributed optimizer.

A chunk of a rank has one buffer, in which its parameters follow each other in the reverse order of
named_parameters(), each from a multiple of 64 elements on. A buffer is cut into buckets, which are known by
their sizes. Experts have buffers of their own where expert parallelism is above 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tessel.checkpoint.flat import Unflattened
from tessel.checkpoint.fused import pieces
from tessel.checkpoint.mcore_args import noop_layers_of
from tessel.checkpoint.mcore_match import source_of
from tessel.checkpoint.mcore_names import (
    HEAD,
    HEAD_KEY,
    Entry,
    Part,
    Slot,
    Variant,
    first_slots,
    last_slots,
    layer_slots,
)
from tessel.checkpoint.stored import Piece, StoredTensor
from tessel.layout.sharding import parameters
from tessel.layout.stages import Stage, stages_of
from tessel.layout.topology import Place, Topology
from tessel.model.config import ModelConfig

_ALIGNMENT = 64
# The same layers under Megatron's and Transformer Engine's modules, whose parameters come in other orders.
ORDERS: tuple[tuple[Variant, ...], ...] = tuple(
    (*norms, experts)
    for norms in (("local",), ("te", "te_mlp"))
    for experts in ("local", "gemm", "te_gemm")  # type: ignore[assignment]
)


@dataclass(frozen=True)
class Spot:
    """Where an entry lies: from `start` on in the bucket of this number."""

    entry: Entry
    bucket: int
    start: int


def placed(entries: Sequence[Entry], bucket_sizes: Sequence[int]) -> list[Spot] | None:
    """Where the parameters of a buffer, in the order of named_parameters(), lie in buckets of these sizes.

    None where they do not fill them exactly. Source: Megatron-core's distributed/param_and_grad_buffer.py.
    """
    spots: list[Spot] = []
    bucket = at = 0
    for entry in reversed(entries):
        at = -(-at // _ALIGNMENT) * _ALIGNMENT
        if bucket < len(bucket_sizes) and at >= bucket_sizes[bucket]:
            bucket, at = bucket + 1, 0
        size = math.prod(entry.shape)
        if bucket >= len(bucket_sizes) or at + size > bucket_sizes[bucket]:
            return None
        spots.append(Spot(entry, bucket, at))
        at += size
    is_full = bucket == len(bucket_sizes) - 1 and at == bucket_sizes[-1]
    return spots if is_full else None


class BufferKey(NamedTuple):
    """Which optimizer (1: that of the experts), data-parallel group and model chunk a buffer is of."""

    chained: int
    group: int
    chunk: int


@dataclass(frozen=True)
class Buffers:
    """The model parallel ranks of a run, and what of the model each of them holds."""

    config: ModelConfig  # with the vocabulary as it is padded
    topology: Topology
    num_chunks: int
    stages: Mapping[tuple[int, int], Stage]  # by pipeline rank and chunk

    @classmethod
    def of_args(cls, args: Mapping[str, Any], config: ModelConfig) -> Buffers:
        """As Megatron's args say.

        Raises:
            UsageError: the degrees do not fit the model.
        """
        tp, pp = args.get("tensor_model_parallel_size") or 1, args.get("pipeline_model_parallel_size") or 1
        ep = args.get("expert_model_parallel_size") or 1
        etp = args.get("expert_tensor_parallel_size") or tp
        etp = etp if config.num_experts else 1
        num_chunks = args.get("virtual_pipeline_model_parallel_size") or 1
        stages = stages_of(
            config.num_hidden_layers,
            pp,
            num_chunks=num_chunks,
            first=args.get("decoder_first_pipeline_num_layers"),
            last=args.get("decoder_last_pipeline_num_layers"),
            noop_layers=noop_layers_of(args),
        )
        by_chunk = {(rank, chunk): stage for rank in range(pp) for chunk, stage in enumerate(stages.of_rank(rank))}
        return cls(config, Topology(pp * math.lcm(tp, ep * etp), tp, pp, 1, ep, etp), num_chunks, by_chunk)

    def places(self, is_expert: bool) -> Iterator[tuple[int, Place]]:
        """The ranks that hold different parts, by Megatron's number of their data-parallel group."""
        seen: set[int] = set()
        for rank in range(self.topology.world_size):
            place = self.topology.place(rank)
            if is_expert:
                group = place.etp + self.topology.etp * (place.ep + self.topology.ep * place.pp)
            else:
                group = place.tp + self.topology.tp * place.pp
            if group not in seen:
                seen.add(group)
                yield group, place

    @property
    def has_expert_buffers(self) -> bool:
        """Whether experts have buffers, and an optimizer, of their own."""
        return self.config.num_experts > 0 and self.topology.ep > 1

    def all(self, order: Sequence[Variant]) -> Iterator[tuple[BufferKey, list[Entry]]]:
        """Every buffer with its parameters."""
        for is_expert in (False, True) if self.has_expert_buffers else (False,):
            for group, place in self.places(is_expert):
                for chunk in range(self.num_chunks):
                    yield BufferKey(int(is_expert), group, chunk), self.entries(place, chunk, order, is_expert)

    def entries(self, place: Place, chunk: int, order: Sequence[Variant], is_expert: bool) -> list[Entry]:
        """The parameters of one buffer, in the order of named_parameters()."""
        part, stage = Part(self.config, self.topology, place), self.stages[place.pp, chunk]
        slots: list[Slot] = first_slots(part) if stage.is_first else []
        for number, layer in enumerate(stage.layers):
            slots += layer_slots(part, layer, number)
        if stage.is_last:
            slots += last_slots(part, stage.is_first)
        chosen = [entry for slot in slots for entry in in_variant(slot, order)]
        if self.has_expert_buffers:
            table = parameters(self.config)
            chosen = [entry for entry in chosen if table[entry.parameters[0]].is_expert == is_expert]
        return in_module_order(chosen)


def in_variant(slot: Slot, order: Sequence[Variant]) -> tuple[Entry, ...]:
    """The entries of a slot under the first of these names that it has, or its local ones."""
    return next((slot[name] for name in order if name in slot), slot["local"])


def in_module_order(entries: Sequence[Entry]) -> list[Entry]:
    """Transformer Engine keeps the input norm in linear_qkv, which comes after linear_proj."""
    found: list[Entry] = []
    waiting: list[Entry] = []
    for entry in entries:
        if entry.key.endswith(".linear_qkv.layer_norm_weight"):
            waiting.append(entry)
            continue
        if waiting and ".self_attention.linear_qkv." in entry.key:
            found += waiting
            waiting = []
        found.append(entry)
    return found


def add_pieces(
    parts: dict[str, list[Piece]],
    spots: Sequence[Spot],
    own: Sequence[Mapping[str, StoredTensor]],
    seen: set[tuple[object, ...]],
    config: ModelConfig,
) -> None:
    """Add to `parts` the pieces of a buffer, whose buckets are `own`, under "exp_avg.NAME" and so on.

    What an earlier rank holds as well, and a tied embedding's copy, are passed over.
    """
    shapes = {name: rule.shape for name, rule in parameters(config).items()}
    for spot in spots:
        if spot.entry.fused.spans in seen or (spot.entry.key == HEAD_KEY and HEAD not in shapes):
            continue
        seen.add(spot.entry.fused.spans)
        for kind, bucket in own[spot.bucket].items():
            flat = source_of(spot.entry, Unflattened(bucket, (), spot.start, spot.entry.shape))
            for name, piece in pieces(spot.entry.fused, flat, shapes):
                parts.setdefault(f"{kind}.{name}", []).append(piece)
