"""From a source of weights to a model and an optimizer that can take a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tessel.checkpoint import huggingface
from tessel.checkpoint import training as run_checkpoint
from tessel.config.run import ModelShape, Precision, RunConfig, Tokenizer
from tessel.data.tokenizer import load_tokenizer
from tessel.errors import TesselError, UsageError
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.kernels import choose, compile_layers
from tessel.model.shape import contradictions
from tessel.model.transformer import Recompute, Transformer
from tessel.parallel.apply import apply_mixed_precision
from tessel.runtime.log import log, warn_once
from tessel.runtime.process import mesh_of_one
from tessel.train.optimizer import build_optimizer, local, parameter_groups, state_by_name
from tessel.train.scaler import GradScaler, build_scaler
from tessel.train.source import Kind, Source


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of forward and backward."""
    if precision.bf16:
        return torch.bfloat16
    return torch.float16 if precision.fp16 else torch.float32


@dataclass(frozen=True)
class Learner:
    """A model, what updates it, and the names under which a checkpoint holds both."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler | None
    dtype: torch.dtype

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name, fp32, not copies."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def tensors(self, with_optimizer: bool) -> dict[str, Tensor]:
        """What a checkpoint of the run holds, not copies."""
        tensors = {f"model.{name}": tensor for name, tensor in self.weights().items()}
        return tensors | self.optimizer_tensors() if with_optimizer else tensors

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's part of `tensors`: loading into it in place is loading the optimizer."""
        return {f"optimizer.{name}": tensor for name, tensor in state_by_name(self.optimizer).items()}


def build_learner(
    cfg: RunConfig, model_config: ModelConfig, source: Source, device: torch.device, stack: contextlib.ExitStack
) -> Learner:
    """Build the model on `device` with the weights of `source`, in the precision asked for.

    A run's optimizer state is not loaded here. `stack` closes the process group of mixed precision.
    """
    dtype = compute_dtype(cfg.precision)
    kernels = choose(
        device,
        dtype,
        cfg.kernels.attention_backend,
        head_dim=model_config.head_dim,
        dropout=cfg.model.attention_dropout,
    )
    log(kernels.describe())
    with torch.device("meta"):
        model = Transformer(
            model_config,
            kernels,
            attention_dropout=cfg.model.attention_dropout,
            hidden_dropout=cfg.model.hidden_dropout,
            recompute=Recompute.from_options(cfg.kernels),
        )
    _load_weights(model, model_config, source, cfg, device)
    if cfg.kernels.compile:
        compile_layers(model.layers)
    if dtype is not torch.float32:
        mesh = stack.enter_context(mesh_of_one(device))
        apply_mixed_precision(model, model.layers.values(), mesh, dtype)
    groups = parameter_groups(model.named_parameters(), model_config, cfg.optimizer)
    return Learner(model, build_optimizer(groups, cfg.optimizer), build_scaler(cfg.precision), dtype)


def _load_weights(
    model: nn.Module, model_config: ModelConfig, source: Source, cfg: RunConfig, device: torch.device
) -> None:
    """Fill `model`, which is on the meta device until it is known that the weights fit it."""
    if source.kind is Kind.HUGGINGFACE:
        assert source.folder is not None
        huggingface.load_into(model, source.folder, device)
        return
    try:
        model.to_empty(device=device)
    except RuntimeError as error:  # torch has no narrower one for memory of the CPU
        size_gib = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**30
        raise TesselError(
            f"The weights alone take {size_gib:,.1f} GiB in fp32, more than {device} has free. "
            "Take a smaller model or a larger machine."
        ) from error
    if source.kind is Kind.RANDOM:
        initialize_(model, model_config, std=cfg.model.init_method_std, seed=cfg.precision.seed)
    else:
        assert source.folder is not None and source.iteration is not None
        weights = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        run_checkpoint.load_tensors(source.folder, source.iteration, weights)


def largest_gradient(precision: Precision) -> float:
    """Where a scaled fp16 gradient counts as overflowed.

    Megatron sums fp16 gradients in fp16 unless told otherwise, and skips when the sum overflows.
    Sums are fp32 here, so the same steps are skipped by holding them against fp16's largest number.
    """
    if precision.fp16 and not precision.accumulate_allreduce_grads_in_fp32:
        return torch.finfo(torch.float16).max
    return math.inf


def full_weights(weights: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Whole tensors for export."""
    return [(name, local(tensor)) for name, tensor in weights.items()]


def model_config_of(
    source: Source, shape: ModelShape, given: frozenset[str], tokenizer_section: Tokenizer, override: bool = False
) -> ModelConfig:
    """The model's configuration: config.json where the source has one, else the shape flags.

    A run that goes on keeps its own model; `override` lets it, whatever the shape flags say.

    Raises:
        UsageError: a shape flag contradicts config.json; both values are shown.
    """
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
