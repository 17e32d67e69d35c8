"""The recipes of this repository, read as their verbs read them, and what they take of a device."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from tessel.config.layout_rules import sharding_strategy_of
from tessel.config.megatron import MEGATRON
from tessel.config.parser import Parsed, parse
from tessel.config.run import RunConfig
from tessel.config.show import format_config, mark_changes
from tessel.config.tune import with_defaults
from tessel.config.validate import validate
from tessel.layout.choice import Choice, RecomputeChoice
from tessel.layout.memory import Memory, MemoryModel
from tessel.layout.sharding import parameters
from tessel.layout.tiles import tile_of
from tessel.layout.topology import Place, Topology
from tessel.model.catalog import known_model
from tessel.model.config import ModelConfig
from tessel.model.lora import freeze_base, hold_in_nf4
from tessel.model.recompute import Recompute
from tessel.model.transformer import Transformer
from tessel.train.adapting import adapting
from tessel.train.checks import check_layout, check_length
from tessel.train.source import Kind, Source

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
GIB = 2**30
# Of an element of a matrix that is made from four bits: its number and scale in fp32, and both in bf16.
DEQUANTIZED_BYTES = 12


@dataclass(frozen=True)
class Recipe:
    """A file of recipes/, and what its first lines say: the models it is for, and on what."""

    name: str
    models: tuple[str, ...]
    num_devices: int
    memory_gib: int

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.yaml"

    @property
    def verb(self) -> str:
        return "dpo" if self.name.startswith("dpo/") else "sft"


def read_recipes() -> list[Recipe]:
    """All but what others share."""
    found = []
    for path in sorted(FOLDER.glob("*/*.yaml")):
        if path.stem.startswith("base"):
            continue
        models, devices = path.read_text().splitlines()[:2]
        number, memory_gib = re.fullmatch(r"# devices: (\d+)x(\d+)GB", devices).groups()  # type: ignore[union-attr]
        names = tuple(models.removeprefix("# models: ").split(", "))
        found.append(Recipe(f"{path.parent.name}/{path.stem}", names, int(number), int(memory_gib)))
    return found


def resolved(recipe: Recipe, longest: int | None = None) -> tuple[RunConfig, Parsed]:
    """The configuration of a run by a recipe, its model and its data left out."""
    argv = ["--config", str(recipe.path), "--load", "MODEL", "--data-path", "DATA"]
    parsed = parse(RunConfig, argv, f"tessel {recipe.verb}", MEGATRON)
    cfg, taken = with_defaults(recipe.verb, parsed.value, parsed.given, longest)
    provenance = parsed.provenance | dict.fromkeys(taken, f"default of {recipe.verb}")
    return validate(cfg), replace(parsed, value=cfg, provenance=provenance)


def differences(recipe: Recipe) -> str:
    """Of the resolved configuration, what is not the default of `tessel pretrain`."""
    cfg, parsed = resolved(recipe)
    text = format_config(cfg, mark_changes(parsed.value, cfg, parsed.provenance, "derived"))
    sections: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("  "):
            sections.append([line])
        elif not line.endswith("# default"):
            sections[-1].append(re.sub(r"  +#", "  #", line))
    return "".join("\n".join(section) + "\n" for section in sections if len(section) > 1)


@dataclass(frozen=True)
class Built:
    """A model by a recipe, on the meta device, as one rank's layers before they are shared out."""

    cfg: RunConfig
    config: ModelConfig
    topology: Topology
    model: Transformer


def build(recipe: Recipe, name: str) -> Built:
    """The model of a name by a recipe; what the recipe's number of devices would refuse is refused."""
    config = known_model(name)
    cfg, _ = resolved(recipe, config.max_position_embeddings)
    topology = check_layout(cfg, config, recipe.num_devices)
    check_length(cfg, config)
    adapters = adapting(cfg, Source(Kind.HUGGINGFACE, Path("MODEL"), None, None), config)
    if adapters is not None:
        config = replace(config, adapters=adapters.spec)
    with torch.device("meta"):
        model = Transformer(
            config, recompute=Recompute.from_options(cfg.kernels, cfg.memory, has_experts=config.num_experts > 0)
        )
    if adapters is not None:
        freeze_base(model, torch.bfloat16)
    return Built(cfg, config, topology, model)


def needs(built: Built) -> int:
    """Bytes on the fullest rank, by the planner; more than it takes where there are adapters or a reference."""
    choice = _choice(built)
    memory = MemoryModel(built.config).worst(choice)[1]
    if not built.cfg.lora.is_on:
        copy = _reference(choice, memory) if built.cfg.finetune.is_pairwise_dataset else 0
        return memory.peak + copy
    if built.cfg.lora.qlora:
        tiles = {n: tile_of(r, built.topology, Place()) for n, r in parameters(built.config).items()}
        hold_in_nf4(built.model, tiles, torch.bfloat16, built.cfg.lora.qlora_double_quant)
    return _with_adapters(built, choice, memory)


def _choice(built: Built) -> Choice:
    cfg = built.cfg
    recompute = {None: "none", "full": "full", "selective": "mlp"}[cfg.kernels.recompute_granularity]
    pair = 2 if cfg.finetune.is_pairwise_dataset else 1  # both answers are in one pass
    return Choice(
        built.topology,
        (built.config.num_hidden_layers,),
        cfg.batch.seq_length or 0,
        pair * cfg.batch.micro_batch_size,
        pair * (cfg.batch.global_batch_size or 0),
        sharding_strategy=sharding_strategy_of(cfg.layout),
        recompute=cast("RecomputeChoice", recompute),
    )


def _reference(choice: Choice, memory: Memory) -> int:
    """A second model in bf16, shared out as the first is; what is gathered of it, too."""
    return memory.parameters * choice.compute_bytes // 4 + memory.gathered


def _with_adapters(built: Built, choice: Choice, memory: Memory) -> int:
    """What is held, two layers and the rest gathered, activations, and the most of loss and of one layer's backward."""
    held = 0.0
    dense_shards, expert_shards = choice.num_shards
    for name, parameter in built.model.named_parameters():
        share = built.topology.ep * expert_shards if ".experts." in name else dense_shards
        # A trained one is in fp32, as are its gradient and two moments.
        held += parameter.nbytes * (4 if parameter.requires_grad else 1) / share
    layers = [_bytes(layer.named_parameters(), built.topology) for layer in built.model.layers.values()]
    root = _bytes(built.model.named_parameters(), built.topology) - sum(layers)
    planner = MemoryModel(built.config).activations
    mixture = built.config.num_experts > 0
    working = planner.inside_backward(choice, mixture) + planner.again(choice, mixture)
    if built.cfg.lora.qlora:
        working += DEQUANTIZED_BYTES * built.config.hidden_size * built.config.intermediate_size
    return int(held + root + 2 * max(layers) + memory.activations + max(memory.loss, working))


def _bytes(named: Iterable[tuple[str, nn.Parameter]], topology: Topology) -> float:
    return sum(p.nbytes / (topology.ep if "experts." in name and "shared" not in name else 1) for name, p in named)
