"""A configuration made whole: rules checked, and values that follow from others filled in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from tessel.config.context import resolved_context
from tessel.config.rules import RULES, SAMPLE_RULES
from tessel.config.run import Evaluation, Logging, RunConfig

# Megatron's defaults, for runs that are long enough for them.
MOST_EVAL_ITERS = 100
LONGEST_LOG_INTERVAL = 100

if TYPE_CHECKING:
    from tessel.config.verbs import SamplesConfig


def validate(cfg: RunConfig) -> RunConfig:
    """Check the static rules of a training run and fill in what follows from other fields.

    Filled in: `global_batch_size`, `start_weight_decay`, `end_weight_decay`, `decoupled_min_lr`,
    `recompute_granularity`, `cp_comm_type`, `position_embedding_type`, `loss_scale`, `eval_iters`, `log_interval`,
    and `lr` where nothing is trained.

    Raises:
        UsageError: a rule is broken; names field, value, rule and remedy.
    """
    for rule in RULES:
        rule(cfg)
    return _resolved(cfg)


def validate_samples(cfg: SamplesConfig) -> SamplesConfig:
    """Check what the samples of a run depend on; a model, a schedule and a length may be missing.

    Raises:
        UsageError: a rule is broken.
    """
    for rule in SAMPLE_RULES:
        rule(cfg.run)
    return replace(cfg, run=_resolved(cfg.run))


def advice(cfg: RunConfig, given: Collection[str]) -> list[str]:
    """Lines on flags of `given` that do nothing beside the others, for the start of a run.

    Megatron takes such flags, and its users' scripts hold them, so they are no errors.
    """
    idle: list[tuple[str, str]] = []
    if cfg.checkpoint.save is None:
        saving = ("save_interval", "save_hf_interval", "keep_last_k", "async_save", "ckpt_format")
        idle += [(name, "--save") for name in saving]
    if not cfg.memory.optimizer_cpu_offload:
        offloading = ("overlap_cpu_optimizer_d2h_h2d", "no_pin_cpu_grads", "no_pin_cpu_params")
        idle += [(name, "--optimizer-cpu-offload") for name in offloading]
    if not cfg.profiling.profile:
        idle += [(f.name, "--profile") for f in fields(cfg.profiling) if f.name != "profile"]
    if not cfg.kernels.manual_gc:
        idle += [("manual_gc_interval", "--manual-gc")]
    if cfg.schedule.lr_decay_style != "WSD":
        wsd = ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples")
        idle += [(name, "--lr-decay-style WSD") for name in wsd]
    if cfg.experts.moe_router_load_balancing_type in ("none", "softmax_topk"):
        idle += [("moe_aux_loss_coeff", "--moe-router-load-balancing-type aux_loss")]
    if cfg.experts.moe_expert_capacity_factor is None:
        idle += [("moe_token_drop_policy", "--moe-expert-capacity-factor")]
    if not cfg.experts.moe_router_enable_expert_bias:
        idle += [("moe_router_bias_update_rate", "--moe-router-enable-expert-bias")]
    if cfg.logging.tensorboard_dir is None:
        idle += [("log_timers_to_tensorboard", "--tensorboard-dir"), ("log_memory_to_tensorboard", "--tensorboard-dir")]
    lines = [f"--{name.replace('_', '-')} does nothing without {needed}" for name, needed in idle if name in given]
    if cfg.checkpoint.save is None and not cfg.batch.skip_train:
        lines.append("nothing will be saved: there is no --save")
    return lines


def _resolved(cfg: RunConfig) -> RunConfig:
    optimizer, kernels = cfg.optimizer, cfg.kernels
    if optimizer.weight_decay_incr_style == "constant":
        optimizer = replace(
            optimizer, start_weight_decay=optimizer.weight_decay, end_weight_decay=optimizer.weight_decay
        )
    if optimizer.decoupled_lr is not None and optimizer.decoupled_min_lr is None:
        optimizer = replace(optimizer, decoupled_min_lr=cfg.schedule.min_lr)
    if kernels.recompute_activations:
        kernels = replace(kernels, recompute_granularity="selective")
    if cfg.batch.skip_train and optimizer.lr is None:
        optimizer = replace(optimizer, lr=0.0)
    batch, model, precision = cfg.batch, cfg.model, cfg.precision
    if batch.global_batch_size is None:
        batch = replace(batch, global_batch_size=batch.micro_batch_size)
    if model.use_rotary_position_embeddings:
        model = replace(model, position_embedding_type="rope")
    if precision.loss_scale == 0:
        # Megatron's old spelling of a dynamic loss scale.
        precision = replace(precision, loss_scale=None)
    cfg = replace(cfg, optimizer=optimizer, kernels=kernels, batch=batch, model=model, precision=precision)
    layout = resolved_context(cfg.layout)
    return replace(cfg, layout=layout, evaluation=_sized_evaluation(cfg), logging=_sized_logging(cfg))


def _num_iters(cfg: RunConfig) -> int | None:
    """Iterations of the run, as far as the flags alone tell (a batch ramp makes a few more)."""
    if cfg.batch.train_samples is None:
        return cfg.batch.train_iters
    return cfg.batch.train_samples // (cfg.batch.global_batch_size or 1)


def _sized_evaluation(cfg: RunConfig) -> Evaluation:
    """Megatron's 100 iterations would make the evaluation of a short run longer than the run."""
    if cfg.evaluation.eval_iters is not None:
        return cfg.evaluation
    num_iters = _num_iters(cfg)
    return replace(cfg.evaluation, eval_iters=min(MOST_EVAL_ITERS, max(num_iters or MOST_EVAL_ITERS, 1)))


def _sized_logging(cfg: RunConfig) -> Logging:
    """Ten lines at least: with Megatron's interval of 100, a short run would print none."""
    if cfg.logging.log_interval is not None:
        return cfg.logging
    num_iters = _num_iters(cfg)
    interval = LONGEST_LOG_INTERVAL if num_iters is None else min(LONGEST_LOG_INTERVAL, max(num_iters // 10, 1))
    return replace(cfg.logging, log_interval=interval)
