"""Legacy Megatron and ModelLink checkpoints: the `torch` format's files with the names from before Megatron-core.

A rank's weights are nested dictionaries, dotted below the third level:

    model["language_model"]["embedding"]["word_embeddings"]["weight"]
    model["language_model"]["encoder"]["layers.0.self_attention.query_key_value.weight"]
    model["language_model"]["output_layer"]["weight"], or for a tied model on several stages
    model["word_embeddings_for_head"]["weight"], the last stage's copy of the embedding

What lies in each is what lies in Megatron-core's, so they are read and written under those names
(mcore.py, mcore_write.py). checkpoint_version 2 and 3 differ in the args alone; before 2 q, k and v lay in another
order, which is read and not written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tessel.checkpoint.mcore import open_ranks
from tessel.checkpoint.mcore_files import Dialect, tensors_of
from tessel.checkpoint.mcore_names import EMBEDDING_KEY, FINAL_NORM_KEY, HEAD_KEY
from tessel.checkpoint.mcore_write import Chunk, Dress, plan_ranks, write_planned
from tessel.checkpoint.stored import PlannedFile, StoredModel, Target
from tessel.checkpoint.torch_file import Deferred
from tessel.errors import TesselError, UsageError
from tessel.model.config import ModelConfig

# A layer's modules, Megatron-core's name and the legacy one, in the order of the legacy layer.
_MODULES = {
    "input_layernorm": "input_norm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_norm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}
_OF_LEGACY = {legacy: core for core, legacy in _MODULES.items()}
# Names that older versions had for the same: of modules in a layer, and of the parts of the model.
_OLDER = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "post_attention_norm",
    "attention.query_key_value": "self_attention.query_key_value",
    "attention.dense": "self_attention.dense",
}
_MODEL, _ENCODER = "language_model", "encoder"
_CORE_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LEGACY_LAYER = re.compile(rf"{_MODEL}\.(?:encoder|transformer)\.layers\.(\d+)\.(.+)\.(weight|bias)")
_WHOLE = {
    f"{_MODEL}.embedding.word_embeddings.weight": EMBEDDING_KEY,
    **{
        f"{_MODEL}.{part}.{name}.weight": FINAL_NORM_KEY
        for part in (_ENCODER, "transformer")
        for name in ("final_norm", "final_layernorm")
    },
    f"{_MODEL}.output_layer.weight": HEAD_KEY,
    "word_embeddings_for_head.weight": HEAD_KEY,
}
_MAX_LEVELS = 8


def open_legacy(folder: str | Path, *, ckpt_step: int | None = None, hf_dir: str | Path | None = None) -> StoredModel:
    """A legacy checkpoint: an iteration, a release, or the folder above them with its tracker.

    `hf_dir` gives the model's config.json where none travels along; without one it is derived from the args.

    Raises:
        TesselError: files are missing or damaged, contradict each other, or are not those of the config.
    """
    return open_ranks("legacy", Dialect(_weights, shown, 0), folder, ckpt_step, hf_dir)


def write_legacy(source: StoredModel, folder: str | Path, target: Target) -> None:
    """Write `source` below `folder`: the iteration's folder appears whole or not at all, the tracker last.

    Raises:
        UsageError: degrees that do not fit the model, or a model that the format cannot hold.
        TesselError: the disk is full, or a tensor has values that its new dtype cannot hold.
    """
    write_planned(plan_legacy(source, target), source, folder, target)


def plan_legacy(source: StoredModel, target: Target) -> list[PlannedFile]:
    """The files below the iteration's folder, and what each tensor in them is made of; nothing is read.

    Keys are "model:KEY", or "model0:KEY", "model1:KEY" for virtual pipeline chunks, nested keys joined by dots.

    Raises:
        UsageError: degrees that do not fit the model, or a model that the format cannot hold.
    """
    config = source.config
    lacking = "experts" if config.num_experts else "norms of q and k" if config.qk_norm else None
    if lacking is not None:
        raise UsageError(
            f"--to legacy: the format has no names for the {lacking} of a {config.family} model. Use --to torch."
        )
    plain = replace(target, transformer_engine=False, grouped_gemm=False)
    dress = Dress(
        lambda key: ".".join(_path(key, config)), lambda chunk: _state(chunk, config), {"use_mcore_models": False}
    )
    return plan_ranks(source, plain, dress)


def shown(key: str) -> str:
    """A key as legacy files have it, nested keys joined by dots; one that is none of Megatron-core's stays."""
    layer = _CORE_LAYER.fullmatch(key)
    if layer is not None:
        number, module, kind = layer.groups()
        return f"{_MODEL}.{_ENCODER}.layers.{number}.{_MODULES.get(module, module)}.{kind}"
    return next((legacy for legacy, core in _WHOLE.items() if core == key), key)


def _weights(path: Path, state: Any) -> dict[str, Tensor]:
    flat: dict[str, Any] = {}
    _flatten(path, state, "", flat, 0)
    found: dict[str, Tensor] = {}
    for key, tensor in tensors_of(path, flat).items():
        core = _core(key)
        if core in found:
            raise TesselError(f"{path} holds {key} twice, under two names. Take another copy of the checkpoint.")
        found[core] = tensor
    return found


def _flatten(path: Path, state: Any, prefix: str, flat: dict[str, Any], level: int) -> None:
    if not isinstance(state, Mapping) or level > _MAX_LEVELS:
        raise TesselError(f"{path}: its weights are not nested as Megatron's were. Take another copy.")
    for key, value in state.items():
        if isinstance(value, Mapping):
            _flatten(path, value, f"{prefix}{key}.", flat, level + 1)
        else:
            flat[f"{prefix}{key}"] = value


def _core(key: str) -> str:
    layer = _LEGACY_LAYER.fullmatch(key)
    if layer is None:
        return _WHOLE.get(key, key)
    number, module, kind = layer.groups()
    core = _OF_LEGACY.get(_OLDER.get(module, module))
    return key if core is None else f"decoder.layers.{number}.{core}.{kind}"


def _path(key: str, config: ModelConfig) -> tuple[str, ...]:
    """Where a tensor lies in the nested dictionaries."""
    if key == HEAD_KEY and config.tie_word_embeddings:
        return ("word_embeddings_for_head", "weight")
    if key in (EMBEDDING_KEY, HEAD_KEY):
        return tuple(shown(key).split("."))
    model, encoder, name = shown(key).split(".", 2)
    return (model, encoder, name)


def _place(key: str) -> tuple[float, int]:
    """Where a tensor comes in the order of the legacy modules: layer by layer, the rest around them."""
    layer = _CORE_LAYER.fullmatch(key)
    if layer is not None:
        return int(layer[1]), list(_MODULES).index(layer[2])
    return (-1, 0) if key == EMBEDDING_KEY else (float("inf"), key == HEAD_KEY)


def _state(chunk: Chunk, config: ModelConfig) -> dict[str, Any]:
    """The nested dictionaries; after each parallel linear comes the state that it lacks, since strict readers ask."""
    state: dict[str, Any] = {}
    keys = sorted(chunk, key=_place)
    for key, following in zip(keys, [*keys[1:], ""], strict=True):
        *levels, name = _path(key, config)
        level = state
        for part in levels:
            level = level.setdefault(part, {})
        level[name] = Deferred(chunk[key])
        module, other = (text.rpartition(".")[0] for text in (shown(key), shown(following)))
        is_linear = module.endswith(("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "output_layer"))
        if is_linear and levels[0] == _MODEL and module != other:
            level[f"{name.rpartition('.')[0]}._extra_state".lstrip(".")] = None
    return state
