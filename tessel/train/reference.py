"""The model that preferences are measured against."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tessel.config.run import RunConfig
from tessel.data.loader import Loader
from tessel.errors import UsageError
from tessel.model.config import ModelConfig
from tessel.parallel.groups import Groups
from tessel.parallel.runner import Runner
from tessel.runtime.log import log
from tessel.train.adapting import Adapting, StartingAdapters
from tessel.train.identity import dataset_identity
from tessel.train.learner import Learner
from tessel.train.preference import Preferences, without_adapters
from tessel.train.reference_logps import folder_digest, num_pairs_of, place_of, read_logps
from tessel.train.setup import build_reference, compute_dtype
from tessel.train.source import Kind, Source, find_source


def reference_source(cfg: RunConfig, adapters: bool) -> Source | None:
    """Where the reference's weights come from; None where it is the model as it is before adapters are trained.

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
    loaders: Mapping[str, Loader],
) -> dict[str, Preferences]:
    """What weighs the pairs that each of `loaders` reads, by the same names; empty for a run that has none.

    The reference is built once, and not at all where files hold all its log-probabilities.
    """
    if not cfg.finetune.is_pairwise_dataset or not loaders:
        return {}
    source = reference_source(cfg, adapting is not None)
    num_pairs = {
        name: num_pairs_of(loader, cfg.finetune.full_shuffle_instruction_dataset) for name, loader in loaders.items()
    }
    before = loaders if cfg.preference.precompute_ref_log_probs else {}
    paths = {name: _place(cfg, source, adapting, name, loader) for name, loader in before.items()}
    known = {name: read_logps(path, num_pairs[name]) for name, path in paths.items()}
    reference: Runner | None = None
    as_reference: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    if known and None not in known.values():
        pass  # no second model is read
    elif source is None and adapting is not None and adapting.stored is not None:
        log(f"reference: the model with the adapters of {adapting.stored.folder}, with which the run begins")
        start = StartingAdapters(learner.parts, learner.tiles, adapting.stored)
        reference, as_reference = learner.runner, start.in_place
    elif source is None:
        log("reference: the model without its adapters")
        reference, as_reference = learner.runner, functools.partial(without_adapters, learner.parts)
    else:
        log(f"reference: {source.describe().removeprefix('starting from ')}")
        reference = build_reference(cfg, model_config, source, device, groups, stack)
    own = learner.runner, learner.parts, learner.peers
    preferences = Preferences(cfg.preference, *own, reference, as_reference)
    micro_batch_size = cfg.batch.micro_batch_size
    found = dict.fromkeys(loaders, preferences)
    for name, path in paths.items():
        values = known[name] or preferences.precompute(path, loaders[name], num_pairs[name], micro_batch_size)
        found[name] = preferences.with_known(values)
    return found


def _place(cfg: RunConfig, source: Source | None, adapting: Adapting | None, split: str, loader: Loader) -> Path:
    base = source if source is not None or adapting is None else adapting.base
    assert base is not None and base.folder is not None
    held, start = "plain", []
    if source is None and adapting is not None:
        held = adapting.spec.weights
        start = [] if adapting.stored is None else [folder_digest(Path(adapting.stored.folder))]
    parts = [
        folder_digest(base.folder), str(base.iteration), str(compute_dtype(cfg.precision)), held,
        *dataset_identity(loader.dataset), str(cfg.batch.seq_length), str(cfg.finetune.cut_max_seqlen),
        str(cfg.finetune.no_cut_token), *start,
        *([] if split == "train" else [split]),
    ]  # fmt: skip
    return place_of(loader, parts)
