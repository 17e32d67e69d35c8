"""Which adapters a run trains, and where the model beside them comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tessel.checkpoint import training as run_checkpoint
from tessel.checkpoint.adapters import StoredAdapter, check_asked, open_adapter
from tessel.checkpoint.fill import fill_adapters
from tessel.checkpoint.tiles import held_tile, local_of, part_of, tiled
from tessel.config.lora import DEFAULT_RANK, Lora
from tessel.config.run import RunConfig
from tessel.errors import TesselError, UsageError
from tessel.layout.adapters import AdapterSpec, Held, groups_of, is_adapter
from tessel.layout.tiles import Tile
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.layers import Linear
from tessel.model.lora import Adapter
from tessel.model.moe import EXPERT_PROJECTIONS
from tessel.model.transformer import Transformer
from tessel.parallel.apply import release_gathered
from tessel.train.source import Kind, Source, find_source


@dataclass(frozen=True)
class Adapting:
    """Adapters are trained: of this kind, beside the weights of `base`, starting from `stored` if there is one."""

    spec: AdapterSpec
    base: Source
    stored: StoredAdapter | None

    @property
    def start(self) -> Path | None:
        """The folder of what is stored."""
        return None if self.stored is None else self.stored.folder

    def describe(self) -> str:
        """One line for the log."""
        spec = self.spec
        held = {"plain": "", "nf4": "; weights in NF4", "nf4-double": "; weights in NF4, their scales in 8 bits"}
        dora = ", with learned lengths (DoRA)" if spec.dora else ""
        shared = "".join(f"; {', '.join(group)} share one A" for group in spec.groups if len(group) > 1)
        start = "" if self.stored is None else f", starting from {self.stored.folder}"
        return (
            f"adapters of rank {spec.rank}, alpha {spec.alpha:g}, beside {', '.join(spec.targets)}"
            f"{dora}{shared}{held[spec.weights]}{start}"
        )


def adapting(cfg: RunConfig, source: Source, config: ModelConfig) -> Adapting | None:
    """What --lora-* ask for; None where the model itself is trained.

    Raises:
        UsageError: numbers out of range, unknown projections, or flags that contradict the stored adapter.
        TesselError: --lora-load holds no adapter of this model, or the run's model is not there any more.
    """
    if not cfg.lora.is_on:
        return None
    # What a run that learns preferences began with is its reference, to the end.
    start = cfg.lora.lora_load or (_start_of(source) if cfg.finetune.is_pairwise_dataset else None)
    stored = None if start is None else open_adapter(start, config)
    spec = _spec(cfg.lora, stored)
    adapts_experts = spec.experts and bool(set(EXPERT_PROJECTIONS) & set(spec.targets))
    if spec.dora and config.num_experts and adapts_experts:
        raise UsageError(
            "--use-dora is not for experts: name other projections with --lora-target-modules, such as linear_qkv "
            "linear_proj."
        )
    base = source
    if source.kind is Kind.RESUME:
        base = find_source(replace(cfg.checkpoint, no_resume=True, ckpt_step=None), cfg.model)
    if base.kind is Kind.RANDOM and cfg.lora.qlora:
        raise UsageError("--qlora needs --load: the model whose weights are held in four bits.")
    if base.kind is Kind.RUN and not _holds_weights(base):
        raise TesselError(
            f"--load {base.folder} is a run that trained adapters: give its model with --load, and the run with "
            "--lora-load."
        )
    return Adapting(spec, base, stored)


def _spec(lora: Lora, stored: StoredAdapter | None) -> AdapterSpec:
    if lora.lora_r is not None and lora.lora_r < 1:
        raise UsageError(f"--lora-r {lora.lora_r} must be at least 1.")
    if not 0 <= lora.lora_dropout < 1:
        raise UsageError(f"--lora-dropout {lora.lora_dropout} must be at least 0 and below 1.")
    names = lora.lora_target_modules
    groups = groups_of(names or ("all",))
    rank = DEFAULT_RANK if lora.lora_r is None else lora.lora_r
    alpha = 2.0 * rank if lora.lora_alpha is None else lora.lora_alpha
    held: Held = "plain" if not lora.qlora else "nf4-double" if lora.qlora_double_quant else "nf4"
    asked = AdapterSpec(rank, alpha, groups, lora.lora_dropout, lora.use_rslora, held, lora.use_dora)
    if stored is None:
        return asked
    check_asked(stored, lora.lora_r, lora.lora_alpha, groups if names else None)
    if lora.use_dora and not stored.spec.dora:
        raise UsageError(f"--use-dora: the adapter in {stored.folder} has no learned lengths. Leave the flag out.")
    return replace(stored.spec, dropout=lora.lora_dropout, weights=held)


def _start_of(source: Source) -> str | None:
    """The adapters that a run that goes on began with, if it was with stored ones."""
    if source.kind is not Kind.RESUME:
        return None
    start: str | None = _noted(source).get("start")
    return start


def _holds_weights(source: Source) -> bool:
    return not _noted(source)


def _noted(source: Source) -> Mapping[str, Any]:
    """What a run's checkpoint says of its adapters; empty if it has none."""
    assert source.folder is not None and source.iteration is not None
    noted: Mapping[str, Any] = run_checkpoint.read_state(source.folder, source.iteration).get("adapters", {})
    return noted


def load_adapters(
    parts: Sequence[Transformer],
    tiles: Mapping[str, Tile],
    config: ModelConfig,
    adapting: Adapting,
    source: Source,
    seed: int,
) -> None:
    """Fill the adapters of `parts`: from the run that goes on, the stored adapter, or by their random start."""
    for part in parts:
        held = {name: parameter for name, parameter in part.named_parameters() if is_adapter(name)}
        if source.kind is Kind.RESUME:
            assert source.folder is not None and source.iteration is not None
            weights = {f"model.{name}": parameter.detach() for name, parameter in held.items()}
            run_checkpoint.load_tensors(source.folder, source.iteration, tiled(weights, tiles))
        elif adapting.stored is not None:
            fill_adapters(part, adapting.stored.tensors, tiles=tiles)
        else:
            own = {name: held_tile(parameter, tiles[name]) for name, parameter in held.items()}
            initialize_(part, config, 0.0, seed, own, only=own.keys())
            _start_magnitudes(part)


@torch.no_grad()
def _start_magnitudes(part: Transformer) -> None:
    """The learned lengths of rows begin as those of the weights."""
    for module in part.modules():
        if isinstance(module, Linear) and isinstance(module.lora, Adapter) and module.lora.magnitude is not None:
            held = part_of(module.weight)
            weight = held.values if module.nf4 is None else module.nf4.weight(held.values, held.start[0])
            local_of(module.lora.magnitude).copy_(module.lora.norms(weight))


class StartingAdapters:
    """The adapters that a run begins with: what is stored, however far its own have been trained."""

    @torch.no_grad()
    def __init__(self, parts: Sequence[Transformer], tiles: Mapping[str, Tile], stored: StoredAdapter) -> None:
        self._parts = parts
        trained = [parameter for part in parts for name, parameter in part.named_parameters() if is_adapter(name)]
        self._own = [local_of(parameter) for parameter in trained]
        self._other = [own.clone() for own in self._own]
        for part in parts:
            fill_adapters(part, stored.tensors, tiles=tiles)
        self._exchange()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, they stand where those of the run do."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for part in self._parts:
            release_gathered(part)
        for own, other in zip(self._own, self._other, strict=True):
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)
