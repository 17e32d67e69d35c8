"""The optimizer's state in a torch_dist checkpoint: moments and fp32 master weights, whole, by parameters' names.

Megatron has kept them in three ways:

    by name        optimizer.state.{exp_avg,exp_avg_sq,fp32_param or param}.NAME, in the weight's own shape
                   (plain mixed precision; the distributed optimizer's `fully_reshardable`)
    in fragments   the same keys, each rank's part of the weight flat (`fully_sharded_model_space`)
    in buckets     optimizer.distributed.dp_group_idx_G.gbuf_idx_C.dtype_D.bucket_idx_B.{param,...}: the flat
                   buffers of the run's degrees (`dp_reshardable`; flat_buffers.py)
    gathered       optimizer.distributed.dp_group_idx_G.param_state: an entry that holds those buffers, buckets joined,
                   as distrib_optim.pt does (`dp_zero_gather_scatter`; gathered.py)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tessel.checkpoint import torch_file
from tessel.checkpoint.dcp_files import ChunkedTensor, DcpFolder
from tessel.checkpoint.flat import of_fragments
from tessel.checkpoint.flat_buffers import ORDERS, Buffers, Spot, add_pieces, placed
from tessel.checkpoint.fused import pieces
from tessel.checkpoint.gathered import is_gathered, parts_of_gathered
from tessel.checkpoint.mcore_names import EMBEDDING_KEY
from tessel.checkpoint.mcore_optimizer import MOMENTS, MOMENTUM, counters, groups_of, lacking_states, step_of
from tessel.checkpoint.stored import Assembled, Piece, StoredTensor
from tessel.checkpoint.torch_dist_keys import Keyed, find, joined_halves
from tessel.checkpoint.weights import named
from tessel.errors import UsageError
from tessel.layout.sharding import parameters
from tessel.model.config import ModelConfig

# What `StoredModel.optimizer` calls them, by Megatron's words.
KINDS = {kind: kind for kind in (*MOMENTS, MOMENTUM)} | {"fp32_param": "param", "param": "param"}
_STATE = re.compile(rf"(?:chained_\d+\.)?optimizer\.state\.({'|'.join(KINDS)})\.(.+)")
_GROUPS = re.compile(r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_\d+\.optimizer/.+")
_BUCKET = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_[^.]*(?:\.[^.]*){2}"
    r"\.bucket_idx_(\d+)\.(param|exp_avg|exp_avg_sq)"
)
# Which optimizer, data-parallel group, buffer and bucket.
BucketKey = tuple[int, int, int, int]


@dataclass(frozen=True)
class OptimizerState:
    """As in `StoredModel`: its `optimizer`, `state` and `left_out`."""

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def optimizer_of(
    found: DcpFolder,
    common: Mapping[str, Any],
    args: Mapping[str, Any],
    config: ModelConfig,
    keyed: Sequence[Keyed],
    weights: Mapping[str, StoredTensor],
) -> OptimizerState:
    """What a run can go on with. `keyed`: where the weights lie, which states by name follow; `weights`: by name."""
    state = _numbers(found, common, args)
    by_name = _by_name(found)
    if by_name:
        parts, left_out = _parts_by_name(by_name, keyed, config)
    else:
        parts, left_out = _parts_of_buckets(found, args, config, weights)
    tensors = _whole(parts, config)
    lacking = lacking_states(tensors, config)
    if lacking:
        left_out += (f"The optimizer's state: {len(lacking)} parameters have no moments in it: {named(lacking)}.",)
        tensors = {}
    if any(name.startswith("rng_state/") for name in found.others):
        left_out += ("The random state of Megatron's generators, which are not tessel's.",)
    return OptimizerState(tensors, state, left_out)


def _numbers(found: DcpFolder, common: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Counters, the scheduler and the optimizer's groups."""
    state = counters(common, args)
    sources = [common.get("optimizer"), *(found.other(name) for name in found.others if _GROUPS.fullmatch(name))]
    groups: list[Mapping[str, Any]] = []
    steps: list[float] = []
    for item in _nested(sources):
        # The same ones may lie in two places, for optimizers that look at one or the other.
        groups += [group for group in groups_of(item) if not any(group is other for other in groups)]
        steps += [step for key in ("common_step", "step") if (step := step_of(item.get(key))) is not None]
        if isinstance(item.get("grad_scaler"), Mapping):
            state["grad_scaler"] = torch_file.plain(item["grad_scaler"])
    if groups:
        state["param_groups"] = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    if steps:
        state["step"] = int(max(steps))
    return state


def _nested(value: Any, depth: int = 6) -> Iterator[Mapping[str, Any]]:
    """A mapping and all mappings in it: groups lie at other depths with one optimizer, with two, and in buckets."""
    if depth and isinstance(value, Mapping):
        yield value
    if depth and isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _nested(item, depth - 1)


def _by_name(found: DcpFolder) -> dict[str, dict[str, StoredTensor]]:
    """States with keys by weights' names: kind -> key of the weight -> tensor."""
    kinds: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in found.tensors.items():
        match = _STATE.fullmatch(name)
        if match is not None:
            kinds.setdefault(KINDS[match[1]], {})[match[2]] = tensor
    return kinds


def _parts_by_name(
    by_name: Mapping[str, Mapping[str, StoredTensor]], keyed: Sequence[Keyed], config: ModelConfig
) -> tuple[dict[str, list[Piece]], tuple[str, ...]]:
    shapes = {name: rule.shape for name, rule in parameters(config).items()}
    parts: dict[str, list[Piece]] = {}
    wrong: set[str] = set()
    for kind, tensors in by_name.items():
        whole = joined_halves(tensors)
        for item in keyed:
            state = find(whole, item.entry)
            if state is None:
                continue
            if state.source.shape != item.source.shape:
                fragments = of_fragments(state.source, item.source.shape)
                if fragments is None:
                    wrong.add(f"{kind} of {item.key}")
                    continue
                whole[state.key] = fragments
                state = replace(state, source=fragments)
            for name, piece in pieces(item.entry.fused, state.source, shapes, state.lead):
                parts.setdefault(f"{kind}.{name}", []).append(piece)
    if not wrong:
        return parts, ()
    return {}, (f"The optimizer's state: it does not have the shapes of the weights: {named(sorted(wrong))}.",)


def _parts_of_buckets(
    found: DcpFolder, args: Mapping[str, Any], config: ModelConfig, weights: Mapping[str, StoredTensor]
) -> tuple[dict[str, list[Piece]], tuple[str, ...]]:
    buckets: dict[BucketKey, dict[str, ChunkedTensor]] = {}
    for name, tensor in found.tensors.items():
        match = _BUCKET.fullmatch(name)
        if match is not None:
            chained, group, buffer, bucket = (int(number or 0) for number in match.groups()[:4])
            buckets.setdefault((chained, group, buffer, bucket), {})[match[5]] = tensor
    if not buckets and not is_gathered(found):
        held = any(".optimizer." in name or name.startswith("optimizer.") for name in found.tensors)
        return {}, ("The optimizer's state, which is in a form that is not known here.",) if held else ()
    rows = found.tensors[EMBEDDING_KEY].shape[0]
    try:
        buffers = Buffers.of_args(args, replace(config, vocab_size=rows))
        parts = (
            _of_buffers(buffers, buckets, config)
            if buckets
            else parts_of_gathered(found, args, buffers, config, weights)
        )
    except UsageError as error:
        return {}, (f"The optimizer's state, whose flat buffers follow from args that are not understood: {error}",)
    if parts is None:
        return {}, (
            "The optimizer's state: its flat buffers are not filled by the parameters in any order that is known. Save "
            "it from Megatron again with --dist-ckpt-optim-fully-reshardable.",
        )
    return parts, ()


def _of_buffers(
    buffers: Buffers, buckets: Mapping[BucketKey, Mapping[str, ChunkedTensor]], config: ModelConfig
) -> dict[str, list[Piece]] | None:
    """The pieces of every state, by the first order of parameters that fits all buffers."""
    for order in ORDERS:
        parts: dict[str, list[Piece]] = {}
        seen: set[tuple[object, ...]] = set()
        for key, entries in buffers.all(order):
            own = [buckets[bucket] for bucket in sorted(buckets) if bucket[:3] == key]
            spots = placed(entries, [tensors["param"].shape[0] for tensors in own])
            if spots is None or not all(_is_cut_at(own[spot.bucket]["param"], spot) for spot in spots):
                break
            add_pieces(parts, spots, own, seen, config)
        else:
            return parts
    return None


def _is_cut_at(bucket: ChunkedTensor, spot: Spot) -> bool:
    """Whether chunks begin where the parameter begins and where it ends, as every parameter has its own."""
    edges = {piece.start[0] for piece in bucket.chunks} | {bucket.shape[0]}
    return spot.start in edges and spot.start + math.prod(spot.entry.shape) in edges


def _whole(parts: Mapping[str, list[Piece]], config: ModelConfig) -> dict[str, StoredTensor]:
    """The states that are complete, each as one tensor."""
    tensors: dict[str, StoredTensor] = {}
    table = parameters(config)
    for name, held in parts.items():
        state = Assembled(name, held[0].source.dtype, table[name.partition(".")[2]].shape, tuple(held))
        if state.is_whole:
            tensors[name] = state
    return tensors
