"""What the flags of `tessel preprocess`, `merge-datasets` and `split` must be, alone and together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace

from tessel.config.preprocess import MergeConfig, PreprocessConfig, SplitConfig
from tessel.errors import UsageError

PRETRAIN_HANDLERS = (
    "GeneralPretrainHandler",
    "AlpacaPretrainHandler",
    "SharegptPretrainHandler",
    "StackOverflowPythonPretrainHandler",
)
"""Handlers of MindSpeed-LLM that write plain text; the others write instructions."""

REGISTRY_HANDLER = "LlamaFactoryInstructionHandler"
"""The handler of MindSpeed-LLM whose --input names data sets of a registry."""


def validate_preprocess(cfg: PreprocessConfig) -> PreprocessConfig:
    """Check the rules of preprocessing, and name the tokenizer once.

    Filled in: `tokenizer.tokenizer_name_or_path` from `load`. Where it is given beside
    `tokenizer_model`, as other tools' command lines with a flag added have it, it counts alone.

    Raises:
        UsageError: a rule is broken; names field, value, rule and remedy.
    """
    for rule in _RULES:
        rule(cfg)
    tokenizer = cfg.tokenizer
    if tokenizer.tokenizer_name_or_path is not None:
        tokenizer = replace(tokenizer, tokenizer_model=None)
    elif cfg.load is not None and tokenizer.tokenizer_model is None:
        tokenizer = replace(tokenizer, tokenizer_name_or_path=cfg.load)
    return replace(cfg, tokenizer=tokenizer)


def validate_merge(cfg: MergeConfig) -> MergeConfig:
    """Check the rules of merging.

    Raises:
        UsageError: a key is named twice.
    """
    _check_once("--merge-group-keys", cfg.merge_group_keys)
    return cfg


def validate_split(cfg: SplitConfig) -> SplitConfig:
    """Check the shares.

    Raises:
        UsageError: they are no numbers, or leave nothing to divide.
    """
    shares(cfg.split)
    return cfg


def shares(text: str) -> list[float]:
    """`90,5,5` as fractions of 1.

    Raises:
        UsageError: not two numbers or more, a negative one, or only zeros.
    """
    if not re.fullmatch(r"\s*\d*\.?\d+(\s*[,/]\s*\d*\.?\d+)+\s*", text):
        raise UsageError(f"--split is {text!r}: it must be two or more shares, such as 90,5,5.")
    values = [float(part) for part in re.split("[,/]", text)]
    if not sum(values):
        raise UsageError(f"--split is {text!r}: at least one share must be above 0.")
    return [value / sum(values) for value in values]


def probabilities_of(cfg: PreprocessConfig, num_sets: int) -> list[float] | None:
    """--interleave-probs, one for each data set; None where none are given.

    Raises:
        UsageError: not so many numbers, a negative one, another sum than 1, or a 0 that would never end.
    """
    text = cfg.interleave_probs
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--interleave-probs is {text!r}: it must be numbers, such as 0.7,0.3.") from error
    if len(values) != num_sets:
        raise UsageError(
            f"--interleave-probs is {text!r}, {len(values)} for {num_sets} data sets: give one for each of --input."
        )
    if not all(value >= 0 for value in values) or not math.isclose(sum(values), 1, abs_tol=1e-8):
        raise UsageError(f"--interleave-probs is {text!r}: none may be negative, and their sum must be 1.")
    if cfg.mix_strategy == "interleave_over" and not all(values):
        raise UsageError(
            f"--interleave-probs is {text!r}: with interleave_over all data sets are used up, and one that is never "
            "drawn would not be. Leave its name out of --input."
        )
    return values


def shard_of(cfg: PreprocessConfig) -> tuple[int, int]:
    """Which part of how many --shard asks for, the part counted from 0; (0, 1) is all.

    Raises:
        UsageError: not I/N with 1 <= I <= N.
    """
    if cfg.shard is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", cfg.shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard is {cfg.shard!r}: it must be I/N with I from 1 to N, such as 3/8.")
    return int(found[1]) - 1, int(found[2])


def is_instructions(cfg: PreprocessConfig) -> bool:
    """Whether dialogues are written (`_packed_` datasets), not plain text."""
    if cfg.handler_name is None:
        return cfg.prompt_type is not None or cfg.prompt_type_path is not None
    return cfg.handler_name not in PRETRAIN_HANDLERS


def _check_ranges(cfg: PreprocessConfig) -> None:
    for name in (
        "workers", "partitions", "n_subs", "pad_to_multiple_of", "log_interval", "seq_length", "preview", "max_samples",
    ):  # fmt: skip
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1 is needed.")
    if not cfg.output_prefix and cfg.preview is None:
        raise UsageError("tessel preprocess needs --output-prefix, where to write; see tessel preprocess --help.")
    if cfg.extra_vocab_size < 0:
        raise UsageError(f"--extra-vocab-size {cfg.extra_vocab_size}: it must not be negative.")
    if not 0 <= cfg.seed < 2**32:
        raise UsageError(f"--seed {cfg.seed}: it must be from 0 to 4294967295.")


def _check_keys(cfg: PreprocessConfig) -> None:
    for flag, names in (
        ("--json-keys", cfg.json_keys),
        ("--merge-group-keys", cfg.merge_group_keys),
        ("--dataset-additional-keys", cfg.dataset_additional_keys),
    ):
        _check_once(flag, names)
    if cfg.map_keys is None:
        return
    try:
        content = json.loads(cfg.map_keys)
    except ValueError as error:
        raise UsageError(
            f'--map-keys is {cfg.map_keys!r}, which is no JSON ({error}): write {{"prompt": "question"}}.'
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f'--map-keys is {cfg.map_keys!r}: it must be an object, such as {{"prompt": "question"}}.')


def _check_once(flag: str, names: tuple[str, ...]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(f"{flag} names {name} twice; each is written to a file of its own, once.")


def _check_instructions(cfg: PreprocessConfig) -> None:
    """Flags of dialogues need dialogues."""
    if cfg.neat_pack and not cfg.pack:
        raise UsageError("--neat-pack needs --pack: it says how the samples of a pack are told apart.")
    if cfg.pack and cfg.seq_length is None:
        raise UsageError("--pack needs --seq-length: the tokens that a pack holds.")
    if cfg.sequence_packing and cfg.compatible != "pai-sft":
        raise UsageError("--sequence-packing is for --compatible pai-sft: use --pack for the other formats.")
    if cfg.sequence_packing and cfg.partitions > 1:
        raise UsageError("--sequence-packing and --partitions: samples are packed in one go; leave --partitions out.")
    if is_instructions(cfg):
        return
    for name in (
        "prompt_type",
        "prompt_type_path",
        "map_keys",
        "reasoning_effort",
        "pack",
        "mask_history",
        "train_on_prompt",
    ):
        if getattr(cfg, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is for instructions: name how rows are read with --handler-name, such as "
                "AlpacaStyleInstructionHandler, or leave it out."
            )
    if cfg.preview is not None and cfg.compatible != "pai-sft":
        raise UsageError("--preview shows instructions: name how rows are read with --handler-name.")


def _check_text(cfg: PreprocessConfig) -> None:
    """Options that would change plain text need the tool that does so."""
    if cfg.keep_newlines and not cfg.split_sentences:
        raise UsageError("--keep-newlines is for --split-sentences: add that, or leave it out.")
    if is_instructions(cfg) and cfg.split_sentences:
        raise UsageError("--split-sentences is for plain text: leave it out with --handler-name.")
    if cfg.pad_to_multiple_of > 1 and (cfg.compatible != "mindspeed" or is_instructions(cfg)):
        raise UsageError(
            f"--pad-to-multiple-of {cfg.pad_to_multiple_of} is for plain text with --compatible mindspeed: it stores "
            "an id that no model has, which training must know of. Leave it out: training cuts documents anywhere."
        )
    if cfg.seq_length is not None and cfg.compatible is None and not is_instructions(cfg):
        raise UsageError(
            f"--seq-length {cfg.seq_length}: MindSpeed-LLM's tool drops longer documents, which --compatible mindspeed "
            "does too. Leave it out: documents of any length are kept, and training cuts them."
        )


def _check_registry(cfg: PreprocessConfig) -> None:
    """Flags of a registry of data sets belong together."""
    if cfg.handler_name != REGISTRY_HANDLER:
        for name in ("dataset_dir", "interleave_probs", "max_samples"):
            if getattr(cfg, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} is for data sets of a registry: add --handler-name "
                    f"{REGISTRY_HANDLER}, or leave it out."
                )
        if cfg.mix_strategy != "concat":
            raise UsageError(
                f"--mix-strategy {cfg.mix_strategy} is for data sets of a registry: add --handler-name "
                f"{REGISTRY_HANDLER}, or mix by weights in --data-path."
            )
        return
    if cfg.dataset_dir is None:
        raise UsageError(f"--handler-name {REGISTRY_HANDLER} needs --dataset-dir, the folder of dataset_info.json.")
    if cfg.interleave_probs is not None and cfg.mix_strategy == "concat":
        raise UsageError("--interleave-probs needs --mix-strategy interleave_under or interleave_over.")
    if cfg.map_keys is not None:
        raise UsageError(f"--map-keys: {REGISTRY_HANDLER} takes the columns of dataset_info.json; name them there.")
    if cfg.shard is not None:
        raise UsageError(f"--shard {cfg.shard}: data sets are mixed as a whole; leave it out.")


def _check_parts(cfg: PreprocessConfig) -> None:
    """Parts that the input is cut into."""
    _, num_shards = shard_of(cfg)
    if num_shards == 1:
        return
    whole = {
        "--shuffle": cfg.shuffle,
        "--pack": cfg.pack,
        "--sequence-packing": cfg.sequence_packing,
        "--partitions": cfg.partitions > 1
        and cfg.compatible in ("megatron", "pai")
        and not cfg.keep_sequential_samples,
    }
    for flag, is_given in whole.items():
        if is_given:
            raise UsageError(f"--shard {cfg.shard} and {flag}: that needs the whole input; leave one of them out.")


_RULES: tuple[Callable[[PreprocessConfig], None], ...] = (
    _check_ranges,
    _check_keys,
    _check_instructions,
    _check_text,
    _check_registry,
    _check_parts,
)
