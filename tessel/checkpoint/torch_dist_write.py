"""Writing Megatron's `torch_dist` format: keys, whole shapes and chunks as Megatron-core's dist_checkpointing has them.

Each model-parallel rank of the target writes what no rank before it holds: a chunk for each layer, for each
expert, and gate and up apart. Loading does not depend on it: any degrees read any chunks.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tessel.checkpoint import mcore_optimizer_write
from tessel.checkpoint.dcp_files import METADATA
from tessel.checkpoint.dcp_write import Other, Part, other, plan_folder
from tessel.checkpoint.flat_buffers import in_variant
from tessel.checkpoint.fused import Span
from tessel.checkpoint.mcore_args import args_of
from tessel.checkpoint.mcore_names import Entry, Slot, Variant, first_slots, last_slots, layer_slots
from tessel.checkpoint.mcore_names import Part as Held
from tessel.checkpoint.mcore_write import numbered_stages, padded_rows, prepared, write_companion
from tessel.checkpoint.megatron_folder import iteration_name, write_tracker
from tessel.checkpoint.stored import (
    Assembled,
    Piece,
    PlannedFile,
    Reshaped,
    StoredModel,
    StoredTensor,
    Target,
)
from tessel.checkpoint.torch_dist import BACKEND, BIAS_OF_CHOICE, COMMON, FORMAT_FILE
from tessel.checkpoint.torch_dist_keys import LAYER, STACK
from tessel.checkpoint.torch_file import LoadedTensor
from tessel.errors import UsageError
from tessel.layout.stages import Stage
from tessel.layout.topology import Place, Topology
from tessel.model.config import ModelConfig
from tessel.runtime.files import atomic_folder

# Megatron has two writers a rank. More where files would be very large.
_FILES_PER_RANK = 2
_MAX_FILE_BYTES = 4 * 2**30
_EXPERTS = ".mlp.experts.experts."
_GATE_AND_UP = (".linear_fc1.weight", ".linear_fc1.bias")
_STATE = "optimizer.state."


@dataclass(frozen=True)
class TorchDistPlan:
    """`files` of tensors, and `texts`, the small files by name, all below the iteration's folder."""

    files: tuple[PlannedFile, ...]
    texts: Mapping[str, bytes]


def write_torch_dist(source: StoredModel, folder: str | Path, target: Target, *, with_optimizer: bool = False) -> None:
    """Write `source` below `folder`: the iteration's folder appears whole or not at all, the tracker last.

    For `with_optimizer` see `plan_torch_dist`.

    Raises:
        UsageError: degrees that do not fit the model.
        TesselError: the disk is full, or a tensor has values that its new dtype cannot hold.
    """
    folder = Path(folder)
    plan = plan_torch_dist(source, target, with_optimizer=with_optimizer)
    with atomic_folder(folder / iteration_name(target.iteration)) as temporary:
        for file in plan.files:
            file.write(temporary / file.name)
        for name, content in plan.texts.items():
            (temporary / name).write_bytes(content)
    write_companion(folder, source, target)
    write_tracker(folder, target.iteration)


def plan_torch_dist(source: StoredModel, target: Target, *, with_optimizer: bool = False) -> TorchDistPlan:
    """The files below the iteration's folder, and what each tensor in them is made of; nothing is read.

    `with_optimizer`: the source's moments and master weights go along, as Megatron's distributed optimizer writes
    them with --dist-ckpt-optim-fully-reshardable, and its plain one always.

    Raises:
        UsageError: degrees that do not fit the model.
        TesselError: the source has no such state.
    """
    whole = _Whole.of(source, target)
    files: dict[str, Sequence[Part | Other]] = {}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    states = mcore_optimizer_write.states_of(source, whole.rows) if with_optimizer else {}
    prefixed = {"": prepared(source, target, whole.rows)}
    prefixed |= {f"{_STATE}{kind}.": tensors for kind, tensors in states.items()}
    number = 0
    for place, stages in _ranks(whole, target):
        entries = list(_entries(whole, place, stages))
        items: list[Part | Other] = list(_extra_states(whole, entries))
        for prefix, tensors in prefixed.items():
            for entry in entries:
                items += _parts(whole, entry, tensors, prefix)
        items += _expert_biases(whole, stages)
        own = [item for item in items if _is_new(item, seen)]
        files |= _dealt_out(own, number)
        number += bool(own)
    plan = plan_folder(files)
    texts = {
        METADATA: plan.metadata,
        COMMON: _common(source, target, whole, with_optimizer=bool(states)),
        FORMAT_FILE: json.dumps(BACKEND).encode(),
    }
    return TorchDistPlan(plan.files, texts)


@dataclass(frozen=True)
class _Whole:
    """The model as it is written: `rows` of the vocabulary, `entries` of all of it by key."""

    source: StoredModel
    config: ModelConfig  # with the vocabulary as it is padded
    rows: int
    topology: Topology
    is_stacked: bool
    order: tuple[Variant, ...]
    entries: Mapping[str, Entry]

    @classmethod
    def of(cls, source: StoredModel, target: Target) -> _Whole:
        config = source.config
        if target.ep > 1 and not config.num_experts:
            raise UsageError(f"--expert-model-parallel-size {target.ep}: the model has no experts; leave it out.")
        rows = padded_rows(config, target)
        padded = replace(config, vocab_size=rows)
        etp = (target.tp if target.etp is None else target.etp) if config.num_experts else 1
        topology = Topology(target.pp * math.lcm(target.tp, target.ep * etp), target.tp, target.pp, 1, target.ep, etp)
        # Megatron's own layers have Transformer Engine's names here, and in layers with experts a name of their own.
        order: tuple[Variant, ...] = ("stacked", "te", "te_mlp")
        if not target.transformer_engine:
            order = (*order, "te_moe")
        held = Held(padded, Topology(), Place())
        every = Stage(0, tuple(range(config.num_hidden_layers)), True, True)
        entries = {entry.key: entry for slot in _slots(held, every) for entry in in_variant(slot, order)}
        return cls(source, padded, rows, topology, not config.dense_layers, order, entries)


def _slots(held: Held, stage: Stage) -> Iterator[Slot]:
    """The slots of a stage, layers by their numbers in the model; a tied embedding's copy is not stored."""
    if stage.is_first:
        yield from first_slots(held)
    for layer in stage.layers:
        yield from layer_slots(held, layer, layer)
    if stage.is_last:
        yield from last_slots(held, is_first=True)


def _ranks(whole: _Whole, target: Target) -> Iterator[tuple[Place, list[Stage]]]:
    """The model-parallel ranks, and their stages."""
    stages = numbered_stages(whole.config.num_hidden_layers, target)
    for rank in range(whole.topology.world_size):
        place = whole.topology.place(rank)
        yield place, [stage for stage, _ in stages[place.pp]]


def _entries(whole: _Whole, place: Place, stages: Sequence[Stage]) -> Iterator[Entry]:
    held = Held(whole.config, whole.topology, place)
    for stage in stages:
        for slot in _slots(held, stage):
            yield from in_variant(slot, whole.order)


def _is_new(item: Part | Other, seen: set[tuple[str, tuple[int, ...]]]) -> bool:
    """Whether no rank before holds the same, as all of a stage hold its norms."""
    key = (item.key, item.start if isinstance(item, Part) else ())
    if key in seen:
        return False
    seen.add(key)
    return True


def _parts(whole: _Whole, entry: Entry, tensors: Mapping[str, StoredTensor], prefix: str) -> Iterator[Part]:
    """The chunks of what a rank holds under one key."""
    key, lead, shape = _stacked(whole, entry.key, whole.entries[entry.key].fused.shape)
    for spans in _chunks(entry):
        starts = [_start_in(whole.entries[entry.key], span) for span in spans]
        first = starts[0]
        size = spans[0].size if len(spans) == 1 else entry.fused.shape
        pieces = tuple(
            Piece(
                tuple(at - base for at, base in zip(start, first, strict=True)),
                span.size,
                tensors[span.parameter],
                span.start,
            )
            for span, start in zip(spans, starts, strict=True)
        )
        values: StoredTensor = Assembled(prefix + key, pieces[0].source.dtype, size, pieces)
        if lead:
            values = Reshaped(values, (1, *size))
        # Megatron's plain optimizer has another name for master weights than its distributed one.
        alias = f"{_STATE}fp32_param.{key}" if prefix == f"{_STATE}{mcore_optimizer_write.MASTER}." else None
        yield Part(prefix + key, shape, (*lead, *first), values, alias)


def _stacked(whole: _Whole, key: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The key in the files, where in the stack of layers the entry lies, and the whole shape under that key."""
    layer = LAYER.fullmatch(key)
    if layer is None or not whole.is_stacked:
        return key, (), shape
    return STACK + layer[2], (int(layer[1]),), (whole.config.num_hidden_layers, *shape)


def _chunks(entry: Entry) -> list[tuple[Span, ...]]:
    """The spans of an entry that Megatron stores as one chunk each."""
    if _EXPERTS in entry.key:
        return [(_expert(span, number),) for span in entry.fused.spans for number in range(span.size[0])]
    if entry.key.endswith(_GATE_AND_UP):
        return [(span,) for span in entry.fused.spans]
    return [entry.fused.spans]


def _expert(span: Span, number: int) -> Span:
    first, *rest = span.start
    return Span(span.parameter, (first + number, *rest), (1, *span.size[1:]), span.at)


def _start_in(entry: Entry, span: Span) -> tuple[int, ...]:
    """Where a box of a parameter lies in the whole tensor of the entry."""
    for own in entry.fused.spans:
        inside = all(
            begin <= at and at + length <= begin + size
            for begin, size, at, length in zip(own.start, own.size, span.start, span.size, strict=True)
        )
        if own.parameter == span.parameter and inside:
            return tuple(at + own_at - begin for at, own_at, begin in zip(span.start, own.at, own.start, strict=True))
    raise ValueError(f"{span} is not in {entry.key}")


def _extra_states(whole: _Whole, entries: Sequence[Entry]) -> Iterator[Other]:
    """The state of each linear for 8-bit arithmetic, which is None, and without which Megatron does not load."""
    modules: dict[str, Entry] = {}
    for entry in entries:
        module = entry.key.rpartition(".")[0]
        if ".linear_" in module and not entry.key.endswith(".layer_norm_weight"):
            modules.setdefault(module, entry)
    if "te_moe" not in whole.order:
        layers = {key.partition(".self_attention.")[0] for key in modules if ".self_attention." in key}
        modules |= dict.fromkeys((f"{layer}.self_attention.core_attention" for layer in layers), entries[0])
    empty = other("", [None])
    for module, entry in modules.items():
        key, lead, _ = _stacked(whole, module, ())
        counts: tuple[int, ...] = (whole.config.num_hidden_layers,) if lead else ()
        places = [lead]
        if _EXPERTS in module + ".":
            span = entry.fused.spans[0]
            counts = (*counts, whole.config.num_experts)
            places = [(*lead, number) for number in range(span.start[0], span.start[0] + span.size[0])]
        for place in places:
            at, of = (".".join(map(str, numbers)) for numbers in (place or (0,), counts or (1,)))
            yield replace(empty, key=f"{key}._extra_state/shard_{at}_{of}")


def _expert_biases(whole: _Whole, stages: Sequence[Stage]) -> Iterator[Part]:
    """The router's bias of the choice."""
    biases = whole.source.config.expert_bias
    for layer in (layer for stage in stages for layer in stage.layers if biases and whole.config.has_experts(layer)):
        assert biases is not None
        key, lead, shape = _stacked(whole, f"{STACK}{layer}.{BIAS_OF_CHOICE}", (whole.config.num_experts,))
        values = torch.tensor(biases[layer]).reshape((1,) * len(lead) + (-1,))
        yield Part(key, shape, (*lead, 0), LoadedTensor(key, Path(), values))


def _dealt_out(items: Sequence[Part | Other], rank: int) -> dict[str, list[Part | Other]]:
    """A rank's items in files of about as many bytes, each with consecutive ones."""
    sizes = [
        len(item.content) if isinstance(item, Other) else math.prod(item.values.shape) * item.values.dtype.itemsize
        for item in items
    ]
    total = max(sum(sizes), 1)
    count = max(_FILES_PER_RANK, -(-total // _MAX_FILE_BYTES))
    files: dict[str, list[Part | Other]] = {}
    before = 0
    for item, size in zip(items, sizes, strict=True):
        number = min((before + size // 2) * count // total, count - 1)
        files.setdefault(f"__{rank}_{number}.distcp", []).append(item)
        before += size
    return files


def _common(source: StoredModel, target: Target, whole: _Whole, *, with_optimizer: bool) -> bytes:
    args = args_of(source.config, target, source, whole.rows) | {"ckpt_format": "torch_dist"}
    if not with_optimizer:
        args["no_save_optim"] = True
    # Megatron then asks for no random state.
    args["no_save_rng"] = True
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    content: dict[str, Any] = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": target.iteration or 0,
        "num_floating_point_operations_so_far": source.state.get("num_floating_point_operations_so_far", 0),
        "content_metadata": metadata,
    }
    if with_optimizer:
        sharding = mcore_optimizer_write.SHARDING
        metadata |= {"distrib_optim_sharding_type": sharding, "distrib_optim_fully_reshardable_mem_efficient": False}
        content["optimizer"] = mcore_optimizer_write.of_common(source, whole.entries.values(), target)
        content["opt_param_scheduler"] = dict(source.state["opt_param_scheduler"])
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
