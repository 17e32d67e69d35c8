"""What `tessel sft` takes for granted where `tessel pretrain` wants to be told."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from tessel.config.run import RunConfig

NUM_EPOCHS = 3.0
SEQ_LENGTH = 2048
# Section, field, value; a field that was given, or that another one given decides, stays.
_DEFAULTS: tuple[tuple[str, str, Any, tuple[str, ...]], ...] = (
    ("finetune", "is_instruction_dataset", True, ("is_pairwise_dataset", "dataset")),
    ("finetune", "no_pad_to_seq_lengths", True, ("dataset", "pack")),
    ("finetune", "num_train_epochs", NUM_EPOCHS, ("train_iters", "train_samples", "skip_train")),
    ("batch", "micro_batch_size", 4, ("rampup_batch_size", "reset_attention_mask", "pack")),
    ("batch", "global_batch_size", 16, ("micro_batch_size", "rampup_batch_size")),
    ("schedule", "lr_decay_style", "cosine", ()),
    ("schedule", "lr_warmup_fraction", 0.03, ("lr_warmup_iters", "lr_warmup_samples", "skip_train")),
    ("optimizer", "clip_grad", 1.0, ()),
    ("logging", "log_interval", 1, ()),
)
# Usual rates: of a whole model, and of adapters, which are small and start at nothing.
_RATE, _ADAPTER_RATE = 1e-5, 1e-4


def sft_defaults(cfg: RunConfig, given: Collection[str], longest: int | None) -> tuple[RunConfig, dict[str, Any]]:
    """`cfg` with the defaults of fine-tuning for what was not `given`, and these by field.

    `longest`: positions that the model has, if that is known.
    """
    seq_length = SEQ_LENGTH if longest is None else min(SEQ_LENGTH, longest)
    own = [
        ("batch", "seq_length", seq_length, ()),
        ("optimizer", "lr", _ADAPTER_RATE if cfg.lora.is_on else _RATE, ("skip_train",)),
        *_DEFAULTS,
    ]
    taken: dict[str, Any] = {}
    for section, name, value, unless in own:
        if name not in given and not any(other in given for other in unless):
            cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
            taken[name] = value
    return cfg, taken
