"""What `tessel sft` and `tessel dpo` take for granted where `tessel pretrain` wants to be told."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from tessel.config.run import RunConfig

SEQ_LENGTH = 2048
# Section, field, value; a field that was given, or that another one given decides, stays.
_Default = tuple[str, str, Any, tuple[str, ...]]
_DEFAULTS: tuple[_Default, ...] = (
    ("finetune", "no_pad_to_seq_lengths", True, ("dataset", "pack")),
    ("batch", "micro_batch_size", 4, ("rampup_batch_size", "reset_attention_mask", "pack")),
    ("batch", "global_batch_size", 16, ("micro_batch_size", "rampup_batch_size")),
    ("schedule", "lr_decay_style", "cosine", ()),
    ("schedule", "lr_warmup_fraction", 0.03, ("lr_warmup_iters", "lr_warmup_samples", "skip_train")),
    ("optimizer", "clip_grad", 1.0, ()),
    ("logging", "log_interval", 1, ()),
)
_LENGTH = ("train_iters", "train_samples", "skip_train")
_OF_SFT: tuple[_Default, ...] = (
    ("finetune", "is_instruction_dataset", True, ("is_pairwise_dataset", "dataset")),
    ("finetune", "num_train_epochs", 3.0, _LENGTH),
)
_OF_DPO: tuple[_Default, ...] = (
    ("finetune", "is_pairwise_dataset", True, ()),
    ("finetune", "num_train_epochs", 1.0, _LENGTH),
)
# Usual rates: of a whole model, and of adapters, which are small and start at nothing.
_SFT_RATES, _DPO_RATES = (1e-5, 1e-4), (1e-6, 1e-5)


def with_defaults(
    verb: str, cfg: RunConfig, given: Collection[str], longest: int | None
) -> tuple[RunConfig, dict[str, Any]]:
    """`cfg` with the defaults of `verb`, sft or dpo, for what was not `given`, and these by field.

    `longest`: positions that the model has, if that is known.
    """
    rates = _SFT_RATES if verb == "sft" else _DPO_RATES
    seq_length = SEQ_LENGTH if longest is None else min(SEQ_LENGTH, longest)
    own = [
        ("batch", "seq_length", seq_length, ()),
        ("optimizer", "lr", rates[cfg.lora.is_on], ("skip_train",)),
        *(_OF_SFT if verb == "sft" else _OF_DPO),
        *_DEFAULTS,
    ]
    taken: dict[str, Any] = {}
    for section, name, value, unless in own:
        if name not in given and not any(other in given for other in unless):
            cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
            taken[name] = value
    return cfg, taken
