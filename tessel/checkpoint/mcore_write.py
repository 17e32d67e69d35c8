"""Writing Megatron's `torch` format: which tensor of which rank is made of which parameters, then file by file.

The plan is made from the sharding table before anything is read. A file is written as a stream, so that
no more than one block of a tensor is held in memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tessel.checkpoint import companion, mcore_optimizer_write, torch_file
from tessel.checkpoint.flat_buffers import in_module_order
from tessel.checkpoint.four_bits import QUANTIZED, in_four_bits
from tessel.checkpoint.fused import assembled, gemm_of_experts
from tessel.checkpoint.mcore_args import args_of, divisor_of
from tessel.checkpoint.mcore_files import MODEL_FILES
from tessel.checkpoint.mcore_names import (
    EMBEDDING,
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
from tessel.checkpoint.mcore_optimizer_write import Kept
from tessel.checkpoint.megatron_folder import iteration_name, model_parallel, places, write_tracker
from tessel.checkpoint.metadata import write_metadata
from tessel.checkpoint.stored import Cast, PaddedRows, PlannedFile, StoredModel, StoredTensor, Target
from tessel.checkpoint.torch_file import Deferred, LoadedTensor
from tessel.errors import UsageError
from tessel.layout.stages import Stage, stages_of
from tessel.model.config import ModelConfig
from tessel.runtime.files import atomic_folder

# The tensors of a virtual pipeline chunk by key, in the order of the file.
Chunk = Mapping[str, StoredTensor]


def write_torch(source: StoredModel, folder: str | Path, target: Target, *, with_optimizer: bool = False) -> None:
    """Write `source` below `folder`: the iteration's folder appears whole or not at all, the tracker last.

    Raises:
        UsageError: degrees that do not fit the model.
        TesselError: the disk is full, or a tensor has values that its new dtype cannot hold.
    """
    write_planned(plan_torch(source, target, with_optimizer=with_optimizer), source, folder, target)


def write_planned(planned: Sequence[PlannedFile], source: StoredModel, folder: str | Path, target: Target) -> None:
    """Write the files of an iteration, as `write_torch` does."""
    folder = Path(folder)
    with atomic_folder(folder / iteration_name(target.iteration)) as temporary:
        for file in planned:
            path = temporary / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            file.write(path)
    write_companion(folder, source, target)
    write_tracker(folder, target.iteration)


def write_companion(root: Path, source: StoredModel, target: Target) -> None:
    """What goes along for the way back to Hugging Face: the source's own files, or a config.json made of its config."""
    folder = root / companion.FOLDER
    if companion.CONFIG in source.side_files:
        companion.write(folder, source.side_files)
    else:
        write_metadata(folder, source.config, target.dtype or source.dtypes[0], source.side_files)


def plan_torch(source: StoredModel, target: Target, *, with_optimizer: bool = False) -> list[PlannedFile]:
    """The files below the iteration's folder, and what each tensor in them is made of; nothing is read.

    Keys are "model:KEY", or "model0:KEY", "model1:KEY" for virtual pipeline chunks. `with_optimizer`: the source's
    moments and fp32 weights go along, as Megatron's plain Adam has them (without --use-distributed-optimizer), with
    the schedule.

    Raises:
        UsageError: degrees that do not fit the model.
        TesselError: the source has no such state.
    """
    return plan_ranks(source, target, None, with_optimizer=with_optimizer)


@dataclass(frozen=True)
class Dress:
    """Other names for what Megatron-core's stand for.

    `shown`: a key as the file has it. `state`: a chunk's tensors as they are nested there. `args`: what its args say
    besides.
    """

    shown: Callable[[str], str]
    state: Callable[[Chunk], Mapping[str, object]]
    args: Mapping[str, object]


def plan_ranks(
    source: StoredModel, target: Target, dress: Dress | None, *, with_optimizer: bool = False
) -> list[PlannedFile]:
    """What `plan_torch` does, the names those of `dress`."""
    config = source.config
    rows = padded_rows(config, target)
    tensors = prepared(source, target, rows)
    states = mcore_optimizer_write.states_of(source, rows) if with_optimizer else {}
    etp = target.tp if target.etp is None or not config.num_experts else target.etp
    topology = model_parallel(target.tp, target.pp, target.ep if config.num_experts else 1, etp)
    if target.ep > 1 and not config.num_experts:
        raise UsageError(f"--expert-model-parallel-size {target.ep}: the model has no experts; leave it out.")
    args = args_of(config, target, source, rows) | (dict(dress.args) if dress else {})
    padded = replace(config, vocab_size=rows)
    stages = numbered_stages(config.num_hidden_layers, target)
    planned = []
    for name, place in places(topology).items():
        part = Part(padded, topology, place)
        entries = [_entries(part, stage, numbers, target) for stage, numbers in stages[place.pp]]
        chunks = [_chunk(own, tensors) for own in entries]
        keys = ["model"] if target.num_chunks == 1 else [f"model{number}" for number in range(len(chunks))]
        named = {
            f"{key}:{dress.shown(own) if dress else own}": tensor
            for key, chunk in zip(keys, chunks, strict=True)
            for own, tensor in chunk.items()
        }
        by_key = dict(zip(keys, chunks, strict=True))
        biases = _biases(config, stages[place.pp], keys)
        more: dict[str, object] = {}
        if states:
            kept = [_kept(*own, states) for own in zip(entries, chunks, strict=True)]
            for key, items in zip(keys, kept, strict=True):
                named |= mcore_optimizer_write.planned(key, items)
            more["optimizer"] = mcore_optimizer_write.of_rank(source, [item for own in kept for item in own], target)
            more["opt_param_scheduler"] = dict(source.state["opt_param_scheduler"])
        write = functools.partial(_write_rank, by_key, args, target, biases, dress, more)
        planned.append(PlannedFile(f"{name}/{MODEL_FILES[0]}", named, write))
    return planned


def padded_rows(config: ModelConfig, target: Target) -> int:
    """Rows of the embedding in all files together.

    Raises:
        UsageError: without padding, as Pai has it, they cannot be dealt out.
    """
    if target.flavour == "v2" and target.vocab_divisor is None:
        return config.vocab_size
    if target.flavour == "pai" and target.vocab_divisor is None:
        if config.vocab_size % target.tp:
            raise UsageError(
                f"--tensor-model-parallel-size {target.tp} does not divide the vocabulary of {config.vocab_size} rows, "
                "which this tool does not pad: give --make-vocab-size-divisible-by."
            )
        return config.vocab_size
    multiple = divisor_of(target) * target.tp
    return -(-config.vocab_size // multiple) * multiple


def prepared(source: StoredModel, target: Target, rows: int) -> dict[str, StoredTensor]:
    """The parameters in the target's dtype, the vocabulary's padded by copies of the last row."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in source.tensors.items():
        is_padded = name in (EMBEDDING, HEAD) and rows > source.config.vocab_size
        whole: StoredTensor = PaddedRows(tensor, rows) if is_padded else tensor
        found[name] = whole if target.dtype in (None, tensor.dtype) else Cast(whole, target.dtype)
    return found


def numbered_stages(num_layers: int, target: Target) -> dict[int, list[tuple[Stage, list[int]]]]:
    """The stages of each pipeline rank, with the numbers that their layers have in the file.

    A place without a layer (--noop-layers) counts in these numbers.
    """
    split = {"num_chunks": target.num_chunks, "first": target.first, "last": target.last}
    options = {**split, "layer_list": target.layer_list, "placement": target.placement}
    stages = stages_of(num_layers, target.pp, noop_layers=target.noop_layers, **options)  # type: ignore[arg-type]
    dealt = stages_of(num_layers + len(target.noop_layers), target.pp, **options)  # type: ignore[arg-type]
    found: dict[int, list[tuple[Stage, list[int]]]] = {pp: [] for pp in range(target.pp)}
    for stage, dealt_out in zip(stages.stages, dealt.stages, strict=True):
        numbers = [number for number, at in enumerate(dealt_out.layers) if at not in target.noop_layers]
        found[stages.rank_of(stage.index)].append((stage, numbers))
    return found


def _entries(part: Part, stage: Stage, numbers: list[int], target: Target) -> list[Entry]:
    """The tensors of a chunk, in the order of named_parameters()."""
    slots: list[Slot] = first_slots(part) if stage.is_first else []
    for layer, number in zip(stage.layers, numbers, strict=True):
        slots += layer_slots(part, layer, number)
    if stage.is_last:
        slots += last_slots(part, stage.is_first)
    return in_module_order([entry for slot in slots for entry in slot[_wanted(slot, target)]])


def _chunk(entries: Sequence[Entry], tensors: Mapping[str, StoredTensor]) -> Chunk:
    made: dict[str, StoredTensor] = {}
    for entry in entries:
        dtype = tensors[entry.parameters[0]].dtype
        whole: StoredTensor = assembled(entry.key, entry.fused, tensors, dtype)
        made[entry.key] = gemm_of_experts(whole, entry.gemm == "first") if entry.gemm else whole
    return made


def _kept(entries: Sequence[Entry], chunk: Chunk, states: Mapping[str, Mapping[str, StoredTensor]]) -> list[Kept]:
    """The tensors of a chunk with their states, which are cut as they are."""
    by_kind = {kind: _chunk(entries, tensors) for kind, tensors in states.items()}
    return [Kept(entry, chunk[entry.key], {kind: own[entry.key] for kind, own in by_kind.items()}) for entry in entries]


def _wanted(slot: Slot, target: Target) -> Variant:
    """The variant to write. MindSpeed's second converter leaves the second norm its own name in fused layers."""
    order: list[Variant] = ["local"]
    if target.transformer_engine:
        order = ["te", "local"] if target.flavour == "v2" else ["te", "te_mlp", "local"]
    if target.grouped_gemm:
        order.insert(0, "te_gemm" if target.transformer_engine else "gemm")
    return next(variant for variant in order if variant in slot)


def _biases(config: ModelConfig, stages: list[tuple[Stage, list[int]]], keys: list[str]) -> dict[str, torch.Tensor]:
    """The router's bias of the choice, which Megatron keeps beside the router's weight, by "model:KEY"."""
    if config.expert_bias is None:
        return {}
    return {
        f"{key}:decoder.layers.{number}.mlp.router.expert_bias": torch.tensor(config.expert_bias[layer])
        for key, (stage, numbers) in zip(keys, stages, strict=True)
        for layer, number in zip(stage.layers, numbers, strict=True)
        if config.has_experts(layer)
    }


def _write_rank(
    chunks: Mapping[str, Chunk],
    args: Mapping[str, object],
    target: Target,
    biases: Mapping[str, torch.Tensor],
    dress: Dress | None,
    more: Mapping[str, object],
    path: Path,
) -> str:
    content: dict[str, object] = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": target.iteration or 0,
    }
    for key, chunk in chunks.items():
        own = {name.partition(":")[2]: bias for name, bias in biases.items() if name.startswith(f"{key}:")}
        content[key] = dress.state(chunk) if dress else OrderedDict(_state(chunk, own, target))
    content |= more
    if target.flavour != "v2":
        content["num_floating_point_operations_so_far"] = 0
    return torch_file.write(path, content)


def _state(chunk: Chunk, biases: Mapping[str, torch.Tensor], target: Target) -> Iterator[tuple[str, object]]:
    """The weights, and after each parallel linear's the state that it lacks: strict readers want the key."""
    keys = list(chunk)
    for key, following in itertools.zip_longest(keys, keys[1:], fillvalue=""):
        if target.nf4 and key.startswith("decoder.layers.") and key.endswith(QUANTIZED):
            yield from in_four_bits(key, chunk[key])
        else:
            yield key, Deferred(chunk[key])
        module = key.rpartition(".")[0]
        bias = f"{module}.expert_bias"
        if bias in biases:
            yield bias, Deferred(LoadedTensor(bias, Path(), biases[bias]))
        is_linear = module.rpartition(".")[2].startswith(("linear_", "output_layer"))
        if target.flavour != "v2" and is_linear and following.rpartition(".")[0] != module:
            yield f"{module}._extra_state", None
    if target.flavour != "v2" and keys and keys[-1] == "decoder.final_layernorm.weight":
        yield f"{HEAD_KEY.rpartition('.')[0]}._extra_state", None
