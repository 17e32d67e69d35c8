"""The model that preferences are measured against."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tessel.config.run import RunConfig
from tessel.data.loader import Loader
from tessel.errors import UsageError
from tessel.model.config import ModelConfig
from tessel.model.transformer import Transformer
from tessel.parallel.groups import Groups
from tessel.parallel.peers import Peers
from tessel.parallel.runner import Runner
from tessel.runtime.log import log
from tessel.train.adapting import Adapting
from tessel.train.identity import dataset_identity
from tessel.train.learner import Learner
from tessel.train.preference import Preferences, without_adapters
from tessel.train.reference_logps import folder_digest, num_pairs_of, place_of, read_logps
from tessel.train.setup import build_reference, compute_dtype
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
    loader: Loader,
) -> Preferences | None:
    """What weighs the pairs of a run, which `loader` reads; None for a run that has none."""
    if not cfg.finetune.is_pairwise_dataset:
        return None
    source = reference_source(cfg, adapting is not None)
    known, path = None, None
    num_pairs = num_pairs_of(loader, cfg.finetune.full_shuffle_instruction_dataset)
    if cfg.preference.precompute_ref_log_probs:
        path = _place(cfg, source, adapting, loader)
        known = read_logps(path, num_pairs)
    own: tuple[Runner, Sequence[Transformer], Peers] = (learner.runner, learner.parts, learner.peers)
    if known is not None:
        return Preferences(cfg.preference, *own, None, contextlib.nullcontext, known)
    if source is None:
        log("reference: the model without its adapters")
        as_reference = lambda: without_adapters(learner.parts)  # noqa: E731
        preferences = Preferences(cfg.preference, *own, learner.runner, as_reference)
    else:
        log(f"reference: {source.describe().removeprefix('starting from ')}")
        reference = build_reference(cfg, model_config, source, device, groups, stack)
        preferences = Preferences(cfg.preference, *own, reference, contextlib.nullcontext)
    if path is None:
        return preferences
    known = preferences.precompute(path, loader, num_pairs, cfg.batch.micro_batch_size)
    return Preferences(cfg.preference, *own, None, contextlib.nullcontext, known)


def _place(cfg: RunConfig, source: Source | None, adapting: Adapting | None, loader: Loader) -> Path:
    base = source if source is not None or adapting is None else adapting.base
    assert base is not None and base.folder is not None
    held = "plain" if source is not None or adapting is None else adapting.spec.weights
    parts = [
        folder_digest(base.folder), str(base.iteration), str(compute_dtype(cfg.precision)), held,
        *dataset_identity(loader.dataset), str(cfg.batch.seq_length), str(cfg.finetune.cut_max_seqlen),
        str(cfg.finetune.no_cut_token),
    ]  # fmt: skip
    return place_of(loader, parts)
