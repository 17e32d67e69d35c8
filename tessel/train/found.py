"""What a run is made of, found and refused before anything large is read; its length and its data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tessel.config.run import RunConfig
from tessel.data.build import Splits, build_datasets, num_samples_for
from tessel.data.check import check_dataset
from tessel.data.instruct.build import num_training_samples
from tessel.data.tokenizer import Tokenizer, check_fits, load_tokenizer
from tessel.layout.topology import Topology
from tessel.model.config import ModelConfig
from tessel.runtime.log import log
from tessel.runtime.process import Processes
from tessel.runtime.world import World
from tessel.train.adapting import Adapting, adapting
from tessel.train.checks import check_folders, check_layout, check_length, check_model_of_run
from tessel.train.formats import check_formats
from tessel.train.reference import reference_source
from tessel.train.setup import model_config_of
from tessel.train.sinks import check_packages
from tessel.train.source import Source, find_source


@dataclass(frozen=True)
class Found:
    """What the flags and the folders that they name come to."""

    source: Source
    model_config: ModelConfig
    topology: Topology
    tokenizer: Tokenizer
    adapting: Adapting | None = None


def find(cfg: RunConfig, given: frozenset[str], world: World) -> Found:
    """Read what the flags name, as far as there is something to refuse in it; nothing large, no other process."""
    if cfg.finetune.is_pairwise_dataset:
        reference_source(cfg, cfg.lora.is_on)
    check_folders(cfg)
    check_packages(cfg.logging)
    source = find_source(cfg.checkpoint, cfg.model)
    model_config = model_config_of(source, cfg.model, given, cfg.tokenizer, cfg.checkpoint.override)
    check_model_of_run(cfg, source, model_config)
    model_config = model_config.with_router_options(cfg.experts, given)
    adapters = adapting(cfg, source, model_config)
    if adapters is not None:
        model_config = replace(model_config, adapters=adapters.spec)
    check_length(cfg, model_config)
    topology = check_layout(cfg, model_config, world.world_size)
    check_formats(cfg, model_config)
    tokenizer = load_tokenizer(cfg.tokenizer, source.model_folder, cfg.model.vocab_size)
    check_fits(tokenizer, model_config.vocab_size)
    return Found(source, model_config, topology, tokenizer, adapters)


def with_length(cfg: RunConfig, found: Found, processes: Processes) -> RunConfig:
    """The iterations that --num-train-epochs come to: whole batches, one at least."""
    epochs = cfg.finetune.num_train_epochs
    if epochs is None:
        return cfg
    with processes.first("preprocessing dialogues", per_node=cfg.launch.no_shared_storage):
        num_samples = num_training_samples(cfg, found.tokenizer)
    assert cfg.batch.global_batch_size is not None
    train_iters = max(int(epochs * num_samples) // cfg.batch.global_batch_size, 1)
    log(f"{epochs:g} epochs of {num_samples:,} samples: {train_iters:,} iterations")
    return replace(cfg, batch=replace(cfg.batch, train_iters=train_iters))


def build_splits(cfg: RunConfig, found: Found, train_iters: int, processes: Processes) -> Splits:
    """The data; one process (of each node, without shared storage) tokenizes and builds what the others then read."""
    with processes.first("tokenizing and indexing the data", per_node=cfg.launch.no_shared_storage):
        splits = build_datasets(cfg, found.tokenizer, num_samples_for(cfg, train_iters))
        for dataset in splits.by_name().values():
            check_dataset(dataset, found.model_config.vocab_size, found.tokenizer)
    return splits
