"""A model opened for use: of any format, with an adapter beside it, on one process or dealt out over several.

Every process of several opens it alike, holds its tiles, and gets the same logits from each call, so that all of
them take the same steps: what one decides by logits and seeds, the others do too. Rank 0 alone need speak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tessel.checkpoint import huggingface
from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.adapters import StoredAdapter, base_of, check_asked, find_adapter, open_adapter
from tessel.checkpoint.fill import fill_adapters, fill_model
from tessel.checkpoint.tiles import tiled
from tessel.config.layout import Launch, Layout
from tessel.config.run import ModelShape
from tessel.config.tokenizer import Tokenizer as TokenizerSection
from tessel.config.verbs import Loading
from tessel.data.tokenizer import Tokenizer, check_fits, load_tokenizer
from tessel.errors import TesselError, UsageError
from tessel.generate.batcher import Model
from tessel.generate.engine import ModelSource, find_model, load_model, stop_ids, suit_few_rows
from tessel.generate.packed import suit_many_texts, suit_one_text
from tessel.generate.parts import PartModel
from tessel.layout.adapters import groups_of, is_adapter
from tessel.layout.asked import stages_asked
from tessel.layout.check import check_model, topology_of
from tessel.layout.sharding import parameters
from tessel.layout.stages import Stage
from tessel.layout.tiles import Tile, tile_of
from tessel.layout.topology import Topology
from tessel.model.config import ModelConfig
from tessel.model.kernels import Kernels, choose
from tessel.model.stage import keep_stage
from tessel.model.transformer import Transformer
from tessel.parallel.expert import apply_expert_parallel
from tessel.parallel.groups import Groups, build_groups
from tessel.parallel.tensor import apply_tensor_parallel
from tessel.runtime import device as devices
from tessel.runtime.process import Processes, on_every_node, process_group
from tessel.runtime.world import World


@dataclass(frozen=True)
class Opened:
    """A model to use, and what belongs to it.

    `model` is called as `batcher.Model` says. `stop_ids` end a text, by the model's files, else the tokenizer's
    end-of-document id. `topology`: of several `processes`, who holds what; see `num_replicas`.
    `notes`: what to tell the user, a line each.
    """

    model: Model
    config: ModelConfig
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    device: torch.device
    topology: Topology
    folder: Path
    notes: tuple[str, ...]
    processes: Processes


@dataclass(frozen=True)
class _Found:
    """What the flags name, before anything large is read."""

    source: ModelSource
    config: ModelConfig
    adapter: StoredAdapter | None
    topology: Topology
    tokenizer: Tokenizer


@contextmanager
def open_for_use(
    loading: Loading,
    tokenizer: TokenizerSection | None = None,
    launch: Launch | None = None,
    *,
    shape: ModelShape | None = None,
    given: frozenset[str] = frozenset(),
    replicas: bool = False,
    together: bool = True,
) -> Iterator[Opened]:
    """The model that `loading` names, on this process or its part of it; torch.distributed lasts as long as the body.

    `shape`, with the names of the fields that are `given`, must agree with the model. With `replicas`, more processes
    than hold one copy of the model hold further ones. `together`: many texts will run at once, not one.

    Raises:
        UsageError: contradictory flags, or a layout that does not fit the model or the number of processes.
        TesselError: no model, no tokenizer, an adapter of another model, or damaged files.
    """
    world = World.from_environment()
    look = on_every_node(lambda: _find(loading, tokenizer, world, shape, given, replicas), world)
    device = devices.resolve(loading.device, world)
    minutes = Launch().distributed_timeout_minutes if launch is None else launch.distributed_timeout_minutes
    with process_group(device, minutes, world) as processes:
        found = processes.together(look)
        dtype = dtype_of(loading)
        kernels = choose(device, dtype, head_dim=found.config.head_dim)
        model = processes.together(lambda: _load(found, loading, device, dtype, kernels))
        assert isinstance(model, torch.nn.Module)
        (suit_many_texts if together else suit_one_text)(model)
        ends = stop_ids(found.source.folder, found.config)
        if not ends and found.tokenizer.eod is not None:
            ends = frozenset({found.tokenizer.eod})
        notes = (*_notes(loading, found), kernels.describe())
        yield Opened(
            model, found.config, found.tokenizer, ends, device, found.topology, found.source.folder, notes, processes
        )


def dtype_of(loading: Loading) -> torch.dtype:
    """What is computed in."""
    if loading.bf16:
        return torch.bfloat16
    return torch.float16 if loading.fp16 else torch.float32


def check_before_launch(
    loading: Loading,
    tokenizer: TokenizerSection | None,
    num_processes: int,
    shape: ModelShape | None = None,
    given: frozenset[str] = frozenset(),
    replicas: bool = False,
) -> None:
    """What `open_for_use` will refuse in each of some processes, refused once, before they start."""
    _find(loading, tokenizer, World(world_size=num_processes), shape, given, replicas)


def model_and_adapter(loading: Loading) -> tuple[str, str | None]:
    """The folders of the model and of the adapter beside it; a run or PEFT folder given as the model may be the latter.

    Raises:
        TesselError: the adapter does not say which model it is for, or that is not there.
    """
    load, adapter = loading.load, loading.lora_load
    if load is not None and adapter is None and not (Path(load) / "config.json").is_file():
        exports = (Path(load) / run_checkpoint.EXPORT_FOLDER / "config.json").is_file()
        if not exports and find_adapter(load) is not None:
            load, adapter = None, load
    if load is not None:
        return load, adapter
    base = None if adapter is None else base_of(adapter)
    if base is None:
        flag = "--load" if loading.load is not None else "--lora-load"
        raise TesselError(
            f"{flag} {adapter} is an adapter, and the model that it was trained beside is not where it says: give that "
            f"with --load, and --lora-load {adapter}."
        )
    return base, adapter


def _find(
    loading: Loading,
    tokenizer: TokenizerSection | None,
    world: World,
    shape: ModelShape | None,
    given: frozenset[str],
    replicas: bool,
) -> _Found:
    load, adapter_folder = model_and_adapter(loading)
    source = find_model(load, loading.hf_dir)
    config = source.config()
    if shape is not None:
        config.check_shape_flags(shape, set(given))
    adapter = None if adapter_folder is None else open_adapter(adapter_folder, config)
    if adapter is not None:
        names = loading.lora_target_modules
        check_asked(adapter, loading.lora_r, loading.lora_alpha, groups_of(names) if names else None)
        config = replace(config, adapters=adapter.spec)
    layout = layout_of(loading, config)
    topology = topology_of(layout, world.world_size, config)
    check_model(config, layout, topology)
    if (copies := num_replicas(topology)) > 1 and not replicas:
        product = world.world_size // copies
        raise UsageError(
            f"{world.world_size} processes are more than --tensor-model-parallel-size {topology.tp} x "
            f"--pipeline-model-parallel-size {topology.pp} = {product} need: start {product}, or raise a degree."
        )
    found = load_tokenizer(tokenizer or TokenizerSection(), source.folder, config.vocab_size - 1)
    check_fits(found, config.vocab_size)
    return _Found(source, config, adapter, topology, found)


def num_replicas(topology: Topology) -> int:
    """Copies of the model that can work apart. Those that share experts cannot, and work on the same texts."""
    return topology.tp * topology.dp // math.lcm(topology.tp, topology.ep * topology.etp)


def layout_of(loading: Loading, config: ModelConfig) -> Layout:
    """The degrees as the layout's own section has them. A mixture of experts shares tokens, too."""
    return Layout(
        tensor_model_parallel_size=loading.tensor_model_parallel_size,
        pipeline_model_parallel_size=loading.pipeline_model_parallel_size,
        expert_model_parallel_size=loading.expert_model_parallel_size,
        expert_tensor_parallel_size=loading.expert_tensor_parallel_size,
        sequence_parallel=loading.tensor_model_parallel_size > 1 and config.num_experts > 0,
    )


def _notes(loading: Loading, found: _Found) -> Iterator[str]:
    source = found.source
    if source.stored is not None:
        yield "; ".join([f"a checkpoint in the {source.stored.format} format", *source.stored.guessed])
    elif source.run is not None:
        yield f"the run has written no Hugging Face folder yet: its checkpoint of iteration {source.iteration}"
    elif loading.load is None or Path(loading.load) != source.folder:
        what = "the adapter's model" if found.adapter is not None else "the run's Hugging Face folder"
        yield f"{what}: {source.folder}"
    if found.adapter is not None:
        yield found.adapter.describe()
    if found.topology.world_size > 1:
        yield f"layout: {found.topology.describe()}"


# ----------------------------------------------------------------------------------------- parts


def _load(found: _Found, loading: Loading, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> Model:
    adapter = None if found.adapter is None else found.adapter.folder
    if found.topology.world_size == 1:
        return load_model(found.source, device, dtype, kernels, adapter)[0]
    topology, config, layout = found.topology, found.config, layout_of(loading, found.config)
    groups = build_groups(topology, device, 1, 1, config.num_key_value_heads)
    (stage,) = stages_asked(layout, config.num_hidden_layers).of_rank(groups.place.pp)
    with torch.device("meta"):
        part = keep_stage(Transformer(config, kernels).to(dtype), stage)
    apply_tensor_parallel(part, config, groups, layout.sequence_parallel)
    if config.num_experts:
        apply_expert_parallel(part, config, groups)
    suit_few_rows(part, device)
    _fill(part, found, groups, device)
    return _wrapped(part.eval().requires_grad_(False), stage, groups, layout)


def _wrapped(part: Transformer, stage: Stage, groups: Groups, layout: Layout) -> Model:
    multiple = groups.topology.tp if layout.sequence_parallel else 1
    if groups.pp is None and multiple == 1:
        return part
    return PartModel(part, stage, groups, multiple)


def _fill(part: Transformer, found: _Found, groups: Groups, device: torch.device) -> None:
    """The weights that this process holds, read by its tiles."""
    source = found.source
    table = parameters(found.config)
    tiles: dict[str, Tile] = {name: tile_of(rule, groups.topology, groups.place) for name, rule in table.items()}
    if source.stored is not None:
        fill_model(part, source.stored.tensors, device, tiles)
    elif source.run is None or source.iteration is None:
        huggingface.load_into(part, source.folder, device, tiles)
    else:
        part.to_empty(device=device)
        held = {name: parameter.detach() for name, parameter in part.named_parameters() if not is_adapter(name)}
        for parameter in held.values():
            parameter.zero_()  # padding of a vocabulary
        weights = {f"model.{name}": parameter for name, parameter in held.items()}
        run_checkpoint.load_tensors(source.run, source.iteration, tiled(weights, tiles))
    if found.adapter is not None:
        fill_adapters(part, found.adapter.tensors, device, tiles)
