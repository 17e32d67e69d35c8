"""The formats that a run saves in (--ckpt-format), and what of them can be refused before it begins."""

from __future__ import annotations

from tessel.checkpoint import run_formats
from tessel.checkpoint.run_formats import HUGGING_FACE, MEGATRON, OWN, Formats
from tessel.checkpoint.stored import Target
from tessel.config.layout_rules import whole_numbers
from tessel.config.run import RunConfig
from tessel.errors import UsageError
from tessel.layout.asked import degrees_of, stages_asked
from tessel.model.config import ModelConfig
from tessel.runtime.log import warn_once
from tessel.train.setup import compute_dtype


def formats_of(cfg: RunConfig, config: ModelConfig) -> Formats:
    """What --ckpt-format and the flags of the layout say: Megatron's formats are cut as the run is."""
    flags, layout, degrees = cfg.checkpoint, cfg.layout, degrees_of(cfg.layout)
    stages = stages_asked(layout, config.num_hidden_layers)
    target = Target(
        tp=degrees.tp,
        pp=degrees.pp,
        ep=degrees.ep,
        etp=degrees.etp,
        num_chunks=stages.num_chunks,
        layer_list=whole_numbers("--num-layer-list", layout.num_layer_list),
        first=layout.decoder_first_pipeline_num_layers,
        last=layout.decoder_last_pipeline_num_layers,
        noop_layers=whole_numbers("--noop-layers", layout.noop_layers) or (),
        placement=stages.placement,
        vocab_divisor=cfg.model.make_vocab_size_divisible_by,
        dtype=compute_dtype(cfg.precision),
    )
    interval = flags.save_hf_interval
    return Formats(
        tuple(dict.fromkeys(flags.ckpt_format or (OWN,))),
        target,
        with_optimizer=not flags.no_save_optim,
        keep_last_k=flags.keep_last_k,
        keeps_hf=lambda iteration: bool(interval) and iteration % (interval or 1) == 0,
    )


def check_formats(cfg: RunConfig, config: ModelConfig) -> None:
    """Refuse a format that could not hold what is trained, before work is spent.

    Raises:
        UsageError: says which, and why.
    """
    formats = formats_of(cfg, config)
    if cfg.checkpoint.save is None or cfg.batch.skip_train or not formats.others:
        return
    asked = f"--ckpt-format {' '.join(formats.names)}"
    if cfg.launch.no_shared_storage:
        raise UsageError(
            f"{asked} is made of what all processes have saved, and with --no-shared-storage none sees all of that: "
            f"use {OWN}, and bring the nodes' folders together for tessel convert."
        )
    if config.adapters is not None:
        raise UsageError(
            f"{asked}: what is saved of adapters is the adapters. Leave it out; tessel merge gives a model."
        )
    needs_adam = formats.with_optimizer and any(name in MEGATRON for name in formats.names)
    if needs_adam and cfg.optimizer.optimizer != "adam":
        raise UsageError(
            f"{asked} has a place for Adam's state, and not for that of --optimizer {cfg.optimizer.optimizer}: use "
            f"{OWN}, or pass --no-save-optim."
        )
    run_formats.check(formats, config)
    if formats.names == (HUGGING_FACE,):
        warn_once(f"{asked} saves weights alone: a run that is stopped cannot go on from it. Add {OWN} for that")
