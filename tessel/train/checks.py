"""Whether a run can be laid out as asked, before any process group or large allocation exists."""

from __future__ import annotations

from pathlib import Path

from tessel.config.run import RunConfig
from tessel.errors import UsageError
from tessel.layout.check import check_batch, check_copies, check_model, topology_of
from tessel.layout.context import check_context
from tessel.layout.topology import Topology
from tessel.model.config import ModelConfig
from tessel.runtime.files import require_writable
from tessel.train.identity import model_differences
from tessel.train.source import Kind, Source, asked_model, check_save


def check_layout(cfg: RunConfig, model_config: ModelConfig, world_size: int) -> Topology:
    """Everything that `world_size` processes or the model could refuse; the topology of the run if nothing is.

    `cfg` is as `validate` returns it.

    Raises:
        UsageError: names the flag, its value, and the values that would do.
    """
    topology = topology_of(cfg.layout, world_size, model_config)
    check_model(model_config, cfg.layout, topology)
    check_batch(cfg.batch, cfg.layout, topology)
    check_copies(cfg.layout, topology)
    heads, kv_heads = model_config.num_attention_heads, model_config.num_key_value_heads
    check_context(cfg.layout, heads, kv_heads, topology.tp, cfg.batch.seq_length or 0)
    return topology


def check_model_of_run(cfg: RunConfig, source: Source, model_config: ModelConfig) -> None:
    """The run in --save is of the model that --load or --init-from-config names beside it.

    Raises:
        UsageError: it is of another one, and --override is not given.
    """
    if source.kind is not Kind.RESUME or cfg.checkpoint.override or cfg.batch.skip_train:
        return
    asked = asked_model(source, cfg.checkpoint.load or cfg.model.init_from_config)
    differences = [] if asked is None else model_differences(model_config, asked)
    if differences:
        raise UsageError(
            f"--save {source.folder} holds a run of another model ({'; '.join(differences)}). Use another --save, or "
            "--override to go on with the run's model all the same (--no-resume starts anew)."
        )


def check_folders(cfg: RunConfig) -> None:
    """Where the run will write, before it spends time on anything else.

    Raises:
        TesselError: a folder cannot be written to, or holds what a run would overwrite.
    """
    if not cfg.batch.skip_train:
        check_save(cfg.checkpoint)
    for flag, folder in (
        ("--data-cache-path", cfg.data.data_cache_path),
        ("--tensorboard-dir", cfg.logging.tensorboard_dir),
        ("--wandb-save-dir", cfg.logging.wandb_save_dir),
    ):
        # A cache that others have filled may be one that this run can only read.
        if folder is not None and not (flag == "--data-cache-path" and Path(folder).is_dir()):
            require_writable(folder, flag)


def check_length(cfg: RunConfig, model_config: ModelConfig) -> None:
    """The model takes sequences of --seq-length.

    Raises:
        UsageError: it does not.
    """
    seq_length, longest = cfg.batch.seq_length, model_config.max_position_embeddings
    if seq_length is not None and seq_length > longest:
        raise UsageError(
            f"--seq-length {seq_length} is more than the model's max_position_embeddings {longest} allows. "
            "Lower it, or raise the value in config.json if the model is meant for longer text."
        )
