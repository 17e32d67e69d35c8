"""The model that preferences are measured against."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch

from tessel.config.run import RunConfig
from tessel.errors import UsageError
from tessel.model.config import ModelConfig
from tessel.parallel.groups import Groups
from tessel.runtime.log import log
from tessel.train.adapting import Adapting
from tessel.train.learner import Learner
from tessel.train.preference import Preferences, without_adapters
from tessel.train.setup import build_reference
from tessel.train.source import Kind, Source, find_source


def reference_source(cfg: RunConfig, adapters: bool) -> Source | None:
    """Where the reference's weights come from; None where the frozen model of the adapters is the reference.

    Raises:
        UsageError: --load is missing: a random model is no reference.
        TesselError: --ref-model holds no weights.
    """
    named = cfg.preference.ref_model
    if named is None and adapters:
        return None
    checkpoint = replace(cfg.checkpoint, no_resume=True, ckpt_step=None, load=named or cfg.checkpoint.load)
    source = find_source(checkpoint, cfg.model)
    if source.kind is Kind.RANDOM:
        raise UsageError("Learning preferences needs --load: the model to start from, which is the reference, too.")
    return source


def build_preferences(
    cfg: RunConfig,
    learner: Learner,
    model_config: ModelConfig,
    adapting: Adapting | None,
    device: torch.device,
    groups: Groups | None,
    stack: contextlib.ExitStack,
) -> Preferences | None:
    """What weighs the pairs of a run; None for a run that has none."""
    if not cfg.finetune.is_pairwise_dataset:
        return None
    source = reference_source(cfg, adapting is not None)
    options = cfg.preference
    if source is None:
        log("reference: the model without its adapters")
        return Preferences(
            options,
            learner.runner,
            learner.parts,
            learner.peers,
            learner.runner,
            lambda: without_adapters(learner.parts),
        )
    log(f"reference: {source.describe().removeprefix('starting from ')}")
    reference = build_reference(cfg, model_config, source, device, groups, stack)
    return Preferences(options, learner.runner, learner.parts, learner.peers, reference, contextlib.nullcontext)
