"""What a run is, so that a resumed one can be told from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from tessel.config.run import RunConfig
from tessel.data.blend import BlendedDataset, Part
from tessel.data.build import Dataset, Splits
from tessel.data.samples import GPTDataset
from tessel.errors import TesselError
from tessel.model.config import ModelConfig

# Entries of config.json that say nothing about the shape.
_NOT_SHAPE = (
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "initializer_range",
    "e_score_correction_bias",
)
# Fields that router options change after config.json was read; the run's own config.json holds them.
_ROUTED = ("norm_topk_prob", "scoring_func", "routed_scaling_factor")
_PROBES = 64
_PROBE_TOKENS = 256
# Flags that decide which tokens a step trains on, or with which loss.
_DATA_FLAGS = ("split", "eod_mask_loss", "reset_position_ids", "reset_attention_mask", "dataloader_type")
_DIALOGUE_FLAGS = (
    "neat_pack", "no_cut_token", "cut_max_seqlen", "no_shuffle", "padded_samples", "full_shuffle_instruction_dataset",
    "calculate_per_sequence_loss",
)  # fmt: skip


def run_identity(cfg: RunConfig, model_config: ModelConfig, splits: Splits) -> dict[str, Any]:
    """What must stay the same for a run to go on: the model's shape and the data, by content."""
    model = {key: value for key, value in model_config.to_hf().items() if key not in _NOT_SHAPE}
    spec = model_config.adapters
    if spec is not None:
        groups = [list(group) for group in spec.groups]
        model["adapters"] = {"rank": spec.rank, "scale": spec.scale, "groups": groups}
        if spec.weights != "plain":
            model["adapters"]["weights"] = spec.weights
        if spec.dora:
            model["adapters"]["dora"] = True
    data: dict[str, Any] = {f"--{name.replace('_', '-')}": getattr(cfg.data, name) for name in _DATA_FLAGS}
    data |= {
        "--seq-length": cfg.batch.seq_length,
        "--seed": cfg.precision.seed,
        "--calculate-per-token-loss": cfg.batch.calculate_per_token_loss,
        "training data": dataset_identity(splits.train),
    }
    if cfg.finetune.reads_dialogues:
        data |= {f"--{name.replace('_', '-')}": getattr(cfg.finetune, name) for name in _DIALOGUE_FLAGS}
    return {"model": model, "data": data, "order": _num_epochs(splits.train)}


def _num_epochs(dataset: Dataset | None) -> list[int]:
    """Epochs that the index of each part was built for: the order of all samples hangs on it."""
    if dataset is None:
        return []
    return [part.num_epochs for part in (dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset])]


def dataset_identity(dataset: Dataset | None) -> list[str]:
    """What each part of a dataset holds, in a line."""
    if dataset is None:
        return []
    if not isinstance(dataset, BlendedDataset):
        return [_part_identity(dataset)]
    weights = dataset.weights if dataset.weights is not None else [None] * len(dataset.datasets)
    return [
        f"{'' if weight is None else f'{weight:g} of '}{_part_identity(part)}"
        for weight, part in zip(weights, dataset.datasets, strict=True)
    ]


def _part_identity(part: Part) -> str:
    """By content, not by path: all lengths, and some tokens, since packed data has one length throughout."""
    digest = hashlib.blake2b(np.ascontiguousarray(part.indexed.lengths).data, digest_size=8)
    for indexed in (part.indexed,) if isinstance(part, GPTDataset) else part.files:
        for sequence in np.linspace(0, len(indexed) - 1, num=min(len(indexed), _PROBES), dtype=np.int64).tolist():
            tokens = indexed.get(sequence)[:_PROBE_TOKENS]
            digest.update(tokens.astype(np.int64).tobytes())
    return f"{part.tokens_per_epoch} tokens, digest {digest.hexdigest()}"


def model_differences(ours: ModelConfig, asked: ModelConfig) -> list[str]:
    """In what the model that the command line names differs in shape from the run's own."""
    return [
        f"model: {f.name} was {getattr(ours, f.name)!r} and is {getattr(asked, f.name)!r}"
        for f in fields(ModelConfig)
        if f.compare and f.name not in (*_NOT_SHAPE, *_ROUTED) and getattr(ours, f.name) != getattr(asked, f.name)
    ]


def check_same_run(
    saved: Mapping[str, Any], ours: Mapping[str, Any], where: str, override: bool, others: Sequence[str] = ()
) -> list[str]:
    """The differences between a checkpoint's identity and this run's and `others`, refused unless `override`.

    Raises:
        TesselError: there are some; they are listed.
    """
    differences = list(others) + [
        f"{kind}: {key} was {saved.get(kind, {}).get(key)!r} and is {ours[kind].get(key)!r}"
        for kind in ("model", "data")
        for key in sorted({**saved.get(kind, {}), **ours[kind]})
        if saved.get(kind, {}).get(key) != ours[kind].get(key)
    ]
    if differences and not override:
        raise TesselError(
            f"{where} is of another run: {'; '.join(differences)}. "
            "Use another --save, or --override to go on all the same (--no-resume starts anew)."
        )
    return differences
