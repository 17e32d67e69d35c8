"""From a source of weights to a model and an optimizer that can take a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tessel.checkpoint import huggingface
from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.fill import fill_model
from tessel.checkpoint.run_model import open_run
from tessel.checkpoint.tiles import held_tile, local_of, tiled
from tessel.config.layout import Layout
from tessel.config.layout_rules import sharding_strategy_of
from tessel.config.run import ModelShape, Precision, RunConfig
from tessel.config.tokenizer import Tokenizer
from tessel.data.tokenizer import load_tokenizer
from tessel.errors import TesselError, UsageError
from tessel.layout.adapters import is_adapter
from tessel.layout.asked import num_shards, stages_asked
from tessel.layout.sharding import parameters as sharding_rules
from tessel.layout.stages import Stages
from tessel.layout.tiles import Tile, num_padding_elements, tile_of
from tessel.layout.topology import Place, Topology
from tessel.model.balance import Balance, RouterOptions
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.kernels import choose
from tessel.model.lora import freeze_base, hold_in_nf4, nf4_of
from tessel.model.offload import Offload
from tessel.model.recompute import Recompute
from tessel.model.shape import contradictions
from tessel.model.transformer import Transformer
from tessel.parallel.apply import Sharding, parallelize
from tessel.parallel.context import localizer
from tessel.parallel.gradients import PartialSums, num_copies
from tessel.parallel.groups import Groups, build_groups
from tessel.parallel.overlap import FusedProducts, enable_overlap
from tessel.parallel.peers import Peers
from tessel.parallel.pipeline import PipelineRunner
from tessel.parallel.runner import Localize, PlainRunner, Runner, whole
from tessel.runtime.device import compile_backend
from tessel.runtime.log import log, warn_once
from tessel.runtime.process import mesh_of_one
from tessel.train import foreign, frugal
from tessel.train.adapting import Adapting, load_adapters
from tessel.train.gradients import Gradients
from tessel.train.learner import Learner, named_parameters
from tessel.train.optimizer import build_optimizer, parameter_groups
from tessel.train.scaler import build_scaler
from tessel.train.source import Kind, Source


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of forward and backward."""
    if precision.bf16:
        return torch.bfloat16
    return torch.float16 if precision.fp16 else torch.float32


def groups_of(cfg: RunConfig, topology: Topology, model_config: ModelConfig, device: torch.device) -> Groups | None:
    """The process groups of the layout that was asked for; None for one process alone."""
    if topology.world_size == 1:
        return None
    shards = num_shards(cfg.layout, topology, sharding_strategy_of(cfg.layout))
    return build_groups(topology, device, *shards, model_config.num_key_value_heads)


def build_learner(
    cfg: RunConfig,
    model_config: ModelConfig,
    source: Source,
    device: torch.device,
    groups: Groups | None,
    stack: contextlib.ExitStack,
    adapting: Adapting | None = None,
) -> Learner:
    """Build this process's part of the model on `device` with the weights of `source`, in the precision asked for.

    With `adapting`, the weights are those of its base, and frozen, and adapters are what is trained.

    A run's optimizer state is not loaded here. `stack` closes the process group of mixed precision.
    """
    dtype = compute_dtype(cfg.precision)
    balance = Balance(model_config, RouterOptions.from_options(cfg.experts))
    tiles = tiles_of(model_config, groups)
    stages = stages_asked(cfg.layout, model_config.num_hidden_layers)
    compiler = _compiler(cfg, device)
    parts = parallelize(
        _builder(cfg, model_config, balance, device),
        model_config,
        groups,
        stages,
        cfg.layout,
        lambda parts: _load_all(parts, tiles, model_config, source, cfg, device, adapting),
        compiler,
        _sharding(cfg, groups, dtype, device, stack),
        _hold(model_config, tiles, dtype),
        _products(cfg, groups, dtype, device, compiler is not None),
    )
    parameters = named_parameters(parts)
    optimizer_groups = parameter_groups(parameters.items(), model_config, cfg.optimizer)
    optimizer = build_optimizer(optimizer_groups, cfg.optimizer, cfg.memory)
    for line in frugal.notes(cfg.memory, device, optimizer):
        log(line)
    return Learner(
        parts=tuple(parts),
        optimizer=optimizer,
        scaler=build_scaler(cfg.precision),
        dtype=dtype,
        runner=_runner(cfg, parts, stages, groups),
        gradients=_gradients(parameters, model_config, groups, cfg.layout),
        peers=Peers(groups),
        tiles=tiles,
        balance=balance,
    )


def build_reference(
    cfg: RunConfig,
    model_config: ModelConfig,
    source: Source,
    device: torch.device,
    groups: Groups | None,
    stack: contextlib.ExitStack,
) -> Runner:
    """What runs a frozen model with the weights of `source`, laid out as the one that is trained."""
    plain = replace(model_config, adapters=None)
    dtype = compute_dtype(cfg.precision)
    balance = Balance(plain, RouterOptions.from_options(cfg.experts))
    tiles = tiles_of(plain, groups)
    stages = stages_asked(cfg.layout, plain.num_hidden_layers)
    build = _builder(cfg, plain, balance, device)

    def frozen() -> Transformer:
        model = build()
        freeze_base(model, dtype)
        return model

    parts = parallelize(
        frozen,
        plain,
        groups,
        stages,
        cfg.layout,
        lambda parts: load_weights(parts, tiles, plain, source, cfg, device),
        _compiler(cfg, device),
        _sharding(cfg, groups, dtype, device, stack),
    )
    for part in parts:
        part.eval()
    return _runner(cfg, parts, stages, groups)


def _compiler(cfg: RunConfig, device: torch.device) -> Any:
    """What compiles layers, where it is asked for and the device can; else None."""
    if not cfg.kernels.compile:
        return None
    backend, reason = compile_backend(device)
    if reason is not None:
        warn_once(f"--compile is off: {reason}")
    return backend


def _products(
    cfg: RunConfig, groups: Groups | None, dtype: torch.dtype, device: torch.device, compiled: bool
) -> FusedProducts | None:
    """What multiplies and gathers or scatters at once, where `--tp-comm-overlap` asks for it and the device can."""
    if not cfg.layout.tp_comm_overlap:
        return None
    group = None if groups is None else groups.tp
    products, line = enable_overlap(device, group, cfg.layout.sequence_parallel, compiled, dtype)
    log(line)
    return products


def _hold(
    model_config: ModelConfig, tiles: Mapping[str, Tile], dtype: torch.dtype
) -> Callable[[Transformer], None] | None:
    """What puts the frozen weights of a part in four bits, where that is asked for."""
    spec = model_config.adapters
    if spec is None or spec.weights == "plain":
        return None
    return lambda part: hold_in_nf4(part, tiles, dtype, spec.weights == "nf4-double")


def _builder(
    cfg: RunConfig, model_config: ModelConfig, balance: Balance, device: torch.device
) -> Callable[[], Transformer]:
    """What makes a whole model on the meta device."""
    kernels = choose(
        device,
        compute_dtype(cfg.precision),
        cfg.kernels.attention_backend,
        head_dim=model_config.head_dim,
        dropout=cfg.model.attention_dropout,
    )
    log(kernels.describe())
    if cfg.layout.context_parallel_size > 1:
        log(f"context parallelism: {cfg.layout.cp_comm_type}, over blocks of attention of its own")

    def build() -> Transformer:
        with torch.device("meta"):
            model = Transformer(
                model_config,
                kernels,
                attention_dropout=cfg.model.attention_dropout,
                hidden_dropout=cfg.model.hidden_dropout,
                recompute=Recompute.from_options(cfg.kernels, cfg.memory, has_experts=model_config.num_experts > 0),
                offload=Offload.from_options(cfg.memory),
                balance=balance,
            )
        if model_config.adapters is not None:
            freeze_base(model, compute_dtype(cfg.precision))
        return model

    return build


def tiles_of(model_config: ModelConfig, groups: Groups | None) -> dict[str, Tile]:
    """This process's tile of every parameter of the model, whatever stage it is on."""
    topology, place = (Topology(), Place()) if groups is None else (groups.topology, groups.place)
    return {name: tile_of(rule, topology, place) for name, rule in sharding_rules(model_config).items()}


def _sharding(
    cfg: RunConfig, groups: Groups | None, dtype: torch.dtype, device: torch.device, stack: contextlib.ExitStack
) -> Sharding | None:
    if groups is None:
        if dtype is torch.float32:
            return None
        mesh = stack.enter_context(mesh_of_one(device))
        return Sharding(mesh, mesh, dtype)
    if dtype is torch.float32 and groups.replicas.size() == 1 and groups.expert_replicas.size() == 1:
        return None
    in_bf16 = cfg.layout.grad_reduce_in_bf16 and dtype is torch.bfloat16
    return Sharding(
        groups.replicas,
        groups.expert_replicas,
        dtype,
        reduce_dtype=torch.bfloat16 if in_bf16 else torch.float32,
        reshard_after_forward=sharding_strategy_of(cfg.layout) == "optim_grads_params",
        prefetch=cfg.layout.overlap_param_gather,
    )


def _runner(cfg: RunConfig, parts: Sequence[Transformer], stages: Stages, groups: Groups | None) -> Runner:
    localize: Localize = whole
    if groups is not None and groups.cp is not None:
        localize = localizer(parts[0].config, groups, cfg.layout.cp_comm_type, cfg.layout.ulysses_degree_in_cp)
    if groups is not None and groups.pp is not None:
        return PipelineRunner(
            list(parts), stages, groups, cfg.layout, localize, compute_dtype=compute_dtype(cfg.precision)
        )
    strategy = sharding_strategy_of(cfg.layout)
    reduce_each = groups is None or strategy in ("optim_grads", "optim_grads_params")
    return PlainRunner(parts[0], localize, reduce_each=reduce_each, gather_each=strategy == "optim_grads_params")


def _gradients(
    parameters: Mapping[str, nn.Parameter], model_config: ModelConfig, groups: Groups | None, layout: Layout
) -> Gradients:
    if groups is None:
        return Gradients(parameters)
    rules = sharding_rules(model_config)
    padding = sum(num_padding_elements(rule, groups.topology) for rule in rules.values())
    copies = {name: num_copies(rules[name], groups) for name in parameters}
    partial = PartialSums(parameters, rules, groups, layout.sequence_parallel)
    return Gradients(parameters, Peers(groups), copies, padding, partial)


def _load_all(
    parts: Sequence[Transformer],
    tiles: Mapping[str, Tile],
    model_config: ModelConfig,
    source: Source,
    cfg: RunConfig,
    device: torch.device,
    adapting: Adapting | None,
) -> None:
    if adapting is None:
        load_weights(parts, tiles, model_config, source, cfg, device)
        return
    load_weights(parts, tiles, model_config, adapting.base, cfg, device)
    load_adapters(parts, tiles, model_config, adapting, source, cfg.precision.seed)


def load_weights(
    parts: Sequence[nn.Module],
    tiles: Mapping[str, Tile],
    model_config: ModelConfig,
    source: Source,
    cfg: RunConfig,
    device: torch.device,
) -> None:
    """Fill `parts`, which are on the meta device: plain tensors until it is known that the weights fit them."""
    for part in parts:
        names = {name for name, _ in part.named_parameters() if not is_adapter(name)}
        has_adapters = model_config.adapters is not None
        is_shared_out = has_adapters or any(isinstance(parameter, DTensor) for parameter in part.parameters())
        if is_shared_out or not (source.kind is Kind.HUGGINGFACE or source.stored is not None):
            _make_room(part, tiles, device)
        if source.kind is Kind.HUGGINGFACE:
            assert source.folder is not None
            huggingface.load_into(part, source.folder, device, tiles)
        elif source.stored is not None:
            flags = cfg.checkpoint
            # A run's own weights are the fp32 ones, whatever becomes of its moments.
            with_optimizer = source.kind is not Kind.FOREIGN or not (
                flags.finetune or flags.no_load_optim or cfg.batch.skip_train
            )
            fill_model(part, foreign.weights(source.stored, with_optimizer), device, tiles)
        elif source.kind is Kind.RANDOM:
            held = {name: held_tile(parameter, tiles[name]) for name, parameter in part.named_parameters()}
            initialize_(part, model_config, cfg.model.init_method_std, cfg.precision.seed, held, only=names)
        elif nf4_of(part):
            assert source.folder is not None
            fill_model(part, open_run(source.folder, source.iteration).tensors, device, tiles)
        else:
            assert source.folder is not None and source.iteration is not None
            weights = {f"model.{name}": p.detach() for name, p in part.named_parameters() if name in names}
            run_checkpoint.load_tensors(source.folder, source.iteration, tiled(weights, tiles))


def _make_room(part: nn.Module, tiles: Mapping[str, Tile], device: torch.device) -> None:
    """Memory for what this process holds of its parameters: padding is 0, and nothing else in it yet."""
    try:
        part.to_empty(device=device)
    except RuntimeError as error:  # torch has no narrower one for memory of the CPU
        size_gib = sum(local_of(parameter).numel() for parameter in part.parameters()) * 4 / 2**30
        raise TesselError(
            f"The weights alone take {size_gib:,.1f} GiB in fp32, more than {device} has free. "
            "Take a smaller model or a larger machine."
        ) from error
    for name, parameter in part.named_parameters():
        if tiles[name].size != tiles[name].local_shape:
            local_of(parameter).zero_()


def largest_gradient(precision: Precision) -> float:
    """Where a scaled fp16 gradient counts as overflowed.

    Megatron sums fp16 gradients in fp16 unless told otherwise, and skips when the sum overflows.
    Sums are fp32 here, so the same steps are skipped by holding them against fp16's largest number.
    """
    if precision.fp16 and not precision.accumulate_allreduce_grads_in_fp32:
        return torch.finfo(torch.float16).max
    return math.inf


def model_config_of(
    source: Source, shape: ModelShape, given: frozenset[str], tokenizer_section: Tokenizer, override: bool = False
) -> ModelConfig:
    """The model's configuration: config.json where the source has one, else the shape flags.

    A run that goes on keeps its own model; `override` lets it, whatever the shape flags say.

    Raises:
        UsageError: a shape flag contradicts config.json; both values are shown.
    """
    if source.kind is Kind.FOREIGN:
        assert source.stored is not None
        config = foreign.with_given(source.stored, shape, given)
        config.check_shape_flags(shape, set(given))
        return config
    folder: Path | None = source.model_folder
    if folder is None:
        return ModelConfig.from_shape(shape, _tokenizer_rows(shape, tokenizer_section))
    config = ModelConfig.from_folder(folder)
    if source.kind is not Kind.RESUME:
        config.check_shape_flags(shape, set(given))
        return config
    wrong = "; ".join(contradictions(config, shape, set(given)))
    if wrong and not override:
        raise UsageError(
            f"--save {source.folder} holds a run of another model, which contradicts {wrong}. Use another --save, or "
            "--override to go on with the run's model all the same (--no-resume starts anew)."
        )
    if wrong:
        warn_once(f"--override: the run's model contradicts {wrong}, and is kept")
    return config


def _tokenizer_rows(shape: ModelShape, section: Tokenizer) -> int | None:
    """Entries of the tokenizer, for a model from shape flags; None where --vocab-size says it all."""
    if shape.vocab_size is not None and section.tokenizer_type != "NullTokenizer":
        return None
    return load_tokenizer(section, None, shape.vocab_size).vocab_size
