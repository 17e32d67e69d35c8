"""The static rules of the fine-tuning flags."""

from __future__ import annotations

import json
from collections.abc import Callable

from tessel.config.run import RunConfig
from tessel.config.schema import flag_of
from tessel.errors import UsageError

_DIALOGUE_FLAGS = (
    "handler_name",
    "prompt_type_path",
    "map_keys",
    "train_on_prompt",
    "mask_history",
    "pack",
    "neat_pack",
    "no_pad_to_seq_lengths",
    "no_cut_token",
    "cut_max_seqlen",
    "no_shuffle",
    "padded_samples",
    "full_shuffle_instruction_dataset",
    "calculate_per_sequence_loss",
)


def check_kind(cfg: RunConfig) -> None:
    """One kind of data, and no flag of dialogues without dialogues."""
    wanted = cfg.finetune
    ways = [
        flag
        for flag, given in (
            ("--is-instruction-dataset", wanted.is_instruction_dataset),
            ("--is-pairwise-dataset", wanted.is_pairwise_dataset),
            (f"--dataset {wanted.dataset}", wanted.dataset is not None),
        )
        if given
    ]
    if len(ways) > 1:
        raise UsageError(f"{' and '.join(ways)} say what the data is: keep one of them.")
    if wanted.train_mode is not None and wanted.dataset is None:
        raise UsageError(f"--train-mode {wanted.train_mode} is for --dataset MMAP: add that, or leave it out.")
    if wanted.dataset == "JSON-SFT" and wanted.train_mode == "pretrain":
        raise UsageError("--dataset JSON-SFT is dialogues: leave --train-mode pretrain out.")
    if wanted.reads_dialogues:
        return
    for name in _DIALOGUE_FLAGS:
        if getattr(wanted, name) and getattr(wanted, name) != "GeneralPretrainHandler":
            raise UsageError(
                f"{flag_of(name)} is for dialogues: say that the data holds some with --is-instruction-dataset, "
                "or leave it out."
            )
    if wanted.stage is not None:
        flag = "--is-pairwise-dataset" if wanted.stage == "dpo" else "--is-instruction-dataset"
        raise UsageError(f"--stage {wanted.stage} trains on dialogues: add {flag}, or leave it out.")


def check_preferences(cfg: RunConfig) -> None:
    """Numbers of the loss of pairs."""
    wanted = cfg.preference
    if wanted.precompute_ref_log_probs and not cfg.finetune.is_pairwise_dataset:
        raise UsageError("--precompute-ref-log-probs is for preferences: use tessel dpo, or leave it out.")
    if not wanted.dpo_beta > 0:
        raise UsageError(f"--dpo-beta {wanted.dpo_beta:g} must be above 0.")
    if not 0 <= wanted.dpo_label_smoothing < 0.5:
        raise UsageError(f"--dpo-label-smoothing {wanted.dpo_label_smoothing:g} must be at least 0 and below 0.5.")
    if wanted.dpo_label_smoothing and wanted.dpo_loss_type != "sigmoid":
        raise UsageError(f"--dpo-label-smoothing is for --dpo-loss-type sigmoid, not {wanted.dpo_loss_type}.")
    if wanted.pref_ftx < 0:
        raise UsageError(f"--pref-ftx {wanted.pref_ftx:g} must not be negative.")


def check_samples(cfg: RunConfig) -> None:
    """How samples are cut, padded and told apart."""
    wanted = cfg.finetune
    if wanted.no_cut_token and wanted.cut_max_seqlen:
        raise UsageError("--no-cut-token and --cut-max-seqlen contradict each other: keep one of them.")
    if wanted.no_cut_token and wanted.reads_dialogues and not wanted.no_pad_to_seq_lengths:
        raise UsageError("--no-cut-token needs --no-pad-to-seq-lengths: samples may be longer than --seq-length.")
    if wanted.no_shuffle and wanted.full_shuffle_instruction_dataset:
        raise UsageError("--no-shuffle and --full-shuffle-instruction-dataset contradict each other: keep one.")
    if wanted.train_on_prompt and wanted.mask_history:
        raise UsageError("--train-on-prompt and --mask-history contradict each other: keep one of them.")
    if wanted.map_keys is not None:
        try:
            content = json.loads(wanted.map_keys)
        except ValueError as error:
            raise UsageError(
                f'--map-keys is {wanted.map_keys!r}, which is no JSON ({error}): write {{"prompt": "question"}}.'
            ) from error
        if not isinstance(content, dict):
            raise UsageError(f'--map-keys is {wanted.map_keys!r}: it must be an object, such as {{"prompt": "q"}}.')


def check_adapters(cfg: RunConfig) -> None:
    """No flag of adapters without adapters."""
    wanted = cfg.lora
    for name in ("use_rslora", "use_dora", "qlora"):
        if getattr(wanted, name) and not wanted.is_on:
            raise UsageError(f"{flag_of(name)} is for adapters: ask for some with --lora-r, or leave it out.")
    if wanted.qlora_double_quant and not wanted.qlora:
        raise UsageError("--qlora-double-quant is for --qlora: add that, or leave it out.")


FINETUNE_RULES: tuple[Callable[[RunConfig], None], ...] = (
    check_kind,
    check_preferences,
    check_samples,
    check_adapters,
)
