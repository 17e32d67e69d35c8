"""What a model is: read from config.json as transformers 4 and 5 write it, or from Megatron's shape flags."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tessel.config.experts import Experts
from tessel.config.run import ModelShape
from tessel.errors import TesselError, UsageError
from tessel.layout.adapters import AdapterSpec
from tessel.model.families import (
    ARCHITECTURES,
    DEFAULTS,
    FAMILIES,
    WHOLE,
    experts_from_hf,
    experts_to_hf,
    require_sizes,
)
from tessel.model.mapping import ModelMapping, OwnConfig
from tessel.model.mixture import router_changes
from tessel.model.shape import contradictions, fields_from_shape, flags_of

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What must be a number where config.json has it; null says "not given" for the keys in _MAY_BE_NULL alone.
_WHOLE = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", *WHOLE)
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "rope_theta", "sliding_window")
_POSITIVE = ("rms_norm_eps", "rope_theta")

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ROPE_TEXTS = ("type", "rope_type")
_ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with RMSNorm, SwiGLU and rotary positions, dense or a mixture of experts.

    `rope_scaling` is None for plain RoPE, else a mapping with `rope_type` (linear, llama3 or yarn)
    and that type's numbers. `layer_types` has one of "full_attention" and "sliding_attention" a
    layer, or is None where all layers are alike. `raw` is config.json as it was read, in the family's words; `own`
    is there where it had others.

    A mixture has `num_experts` in each layer but the `dense_layers`, and `num_experts_per_tok` of them see a
    token; `norm_topk_prob` says whether their weights add up to 1. A shared expert, of an inner width above 0,
    sees every token. `expert_bias`, of every layer and expert, is added to scores when experts are chosen.
    `adapters` are no part of the model, but what is learned beside it.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    initializer_range: float = 0.02
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = True
    scoring_func: str = "softmax"
    routed_scaling_factor: float = 1.0
    expert_bias: tuple[tuple[float, ...], ...] | None = field(default=None, repr=False, compare=False)
    adapters: AdapterSpec | None = field(default=None, repr=False, compare=False)
    dtype: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    own: OwnConfig | None = field(default=None, repr=False, compare=False)

    def window(self, layer: int) -> int | None:
        """How many positions, its own among them, a query of this layer may see; None for all."""
        if self.layer_types is None:
            return self.sliding_window
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """The model that a Hugging Face folder's config.json describes.

        Raises:
            TesselError: there is no such file, it is not JSON, or the model is not supported.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise TesselError(f"{path}: no such file. A Hugging Face folder has a config.json; check the path.")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TesselError(f"{path}: not valid JSON ({error}). Download the file again.") from error
        if not isinstance(raw, dict):
            raise TesselError(f"{path}: holds a {type(raw).__name__}, not an object. Download the file again.")
        try:
            return cls.from_hf(raw, ModelMapping.of_folder(path.parent))
        except TesselError as error:
            raise TesselError(f"{path}: {error}") from error

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], mapping: ModelMapping | None = None) -> ModelConfig:
        """The model that a config.json describes, with transformers' defaults for absent keys.

        `mapping`: what its keys are called in a known family.

        Raises:
            TesselError: a family or a feature that is not supported, or a key that is missing.
        """
        if mapping is not None:
            return replace(cls.from_hf(mapping.family_config(raw)), own=OwnConfig(mapping, dict(raw)))
        family = _family(raw)
        _check_features(raw, family)
        _check_values(raw)
        known = {**DEFAULTS[family], **raw}
        heads, layers = int(raw["num_attention_heads"]), int(raw["num_hidden_layers"])
        require_sizes(layers, 0)
        kv_heads = int(known.get("num_key_value_heads") or heads)
        head_dim = int(known.get("head_dim") or int(raw["hidden_size"]) // heads)
        if heads % kv_heads:
            raise TesselError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}.")
        if head_dim < 1:
            raise TesselError(f"hidden_size {raw['hidden_size']} is less than num_attention_heads {heads}.")
        if head_dim % 2:
            raise TesselError(f"head_dim {head_dim} is odd, and rotary positions turn pairs.")
        sliding_window, layer_types = _windows(known, family, layers)
        theta, scaling = _rope(raw, int(known["max_position_embeddings"]), DEFAULTS[family].get("rope_theta", 10000.0))
        bias = family in ("qwen3", "llama", "qwen3_moe") and bool(raw.get("attention_bias", False))
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        return cls(
            family=family,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(known.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=family == "qwen2" or bias or (family == "qwen2_moe" and bool(known["qkv_bias"])),
            attention_output_bias=bias,
            mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
            qk_norm=family in ("qwen3", "qwen3_moe"),
            max_position_embeddings=int(known["max_position_embeddings"]),
            sliding_window=sliding_window,
            layer_types=layer_types,
            **experts_from_hf(raw, family, layers),
            initializer_range=float(raw.get("initializer_range", 0.02)),
            dtype=str(dtype).removeprefix("torch.") if dtype else None,
            raw=dict(raw),
        )

    @classmethod
    def from_shape(cls, shape: ModelShape, vocab_size: int | None = None) -> ModelConfig:
        """The model that Megatron's shape flags describe, by Megatron's defaults for the flags that are left out.

        Qwen2 with `--add-qkv-bias`, Qwen3 with `--qk-layernorm`, else Llama; with `--num-experts` Qwen2-MoE where
        there is a shared expert, Qwen3-MoE with `--qk-layernorm`, else Mixtral. Embedding rows are
        `--padded-vocab-size`, or the vocabulary padded to `--make-vocab-size-divisible-by`
        (128). `vocab_size` is the tokenizer's size where it is known, and stands before
        `--vocab-size` (a NullTokenizer has one id more than that flag says).

        Raises:
            UsageError: flags that are missing, or that no supported family can express.
        """
        return cls(**fields_from_shape(shape, vocab_size))

    def check_shape_flags(self, shape: ModelShape, given: set[str]) -> None:
        """Refuse shape flags that contradict this model. `given` names the fields that the user set.

        No contradictions: `--max-position-embeddings`, which is a bound on the sequence; and
        vocabulary sizes at or under the rows of the embedding.

        Raises:
            UsageError: a flag and config.json disagree; shows both values.
        """
        wrong = contradictions(self, shape, given)
        if wrong:
            raise UsageError(
                f"The model's config.json contradicts {'; '.join(wrong)}. Leave these flags out, or load another model."
            )

    def with_router_options(self, experts: Experts, given: frozenset[str] | set[str]) -> ModelConfig:
        """This model with what a run's options change about how its tokens are routed; config.json says it then, too.

        Raises:
            UsageError: options that do not go together, or that are about experts which the model lacks.
        """
        return replace(self, **router_changes(self, experts, given))

    def shape_flags(self) -> dict[str, Any]:
        """The model as Megatron's shape flags would have it, by field name."""
        return flags_of(self) | {
            "group_query_attention": self.num_key_value_heads < self.num_attention_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "padded_vocab_size": self.vocab_size,
        }

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 both read, with every key that was read kept.

        RoPE is written both ways (`rope_theta` and `rope_scaling`, and `rope_parameters`), and so is the dtype. A model
        with words of its own keeps its config.json, but for what has changed.
        """
        if self.own is not None:
            mapping, raw = self.own.mapping, self.own.raw
            before = ModelConfig.from_hf(mapping.family_config(raw)).to_hf()
            return mapping.own_config(raw, before, replace(self, own=None).to_hf())
        rope = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        hf = dict(self.raw)
        hf.update(
            architectures=[ARCHITECTURES[self.family]],
            model_type=self.family,
            hidden_act="silu",
            rope_scaling=dict(self.rope_scaling) if self.rope_scaling else None,
            rope_parameters=rope,
        )
        for key in (*_REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
            hf[key] = getattr(self, key)
        for key in ("tie_word_embeddings", "max_position_embeddings", "initializer_range"):
            hf[key] = getattr(self, key)
        if self.family in ("qwen3", "llama", "qwen3_moe"):
            hf["attention_bias"] = self.attention_bias
        if self.family == "llama":
            hf["mlp_bias"] = self.mlp_bias
        if self.family == "qwen2_moe":
            hf["qkv_bias"] = self.attention_bias
        if self.family in ("mistral", "mixtral"):
            hf["sliding_window"] = self.sliding_window
        if self.family in ("qwen2", "qwen3"):
            hf["use_sliding_window"] = self.sliding_window is not None
            hf["sliding_window"] = self.sliding_window
            hf["layer_types"] = list(self.layer_types or ["full_attention"] * self.num_hidden_layers)
        hf |= experts_to_hf(self)
        if self.dtype is not None:
            hf["dtype"] = hf["torch_dtype"] = self.dtype
        return hf


def _family(raw: Mapping[str, Any]) -> str:
    architectures = raw.get("architectures") or []
    kind = raw.get("model_type")
    if kind is None:
        by_architecture = {name: family for family, name in ARCHITECTURES.items()}
        kind = next((by_architecture[name] for name in architectures if name in by_architecture), None)
    if kind in FAMILIES:
        return str(kind)
    supported = f"supported are {', '.join(FAMILIES)}"
    raise TesselError(f"model_type {kind!r} (architectures {architectures}) is not supported; {supported}.")


def _check_features(raw: Mapping[str, Any], family: str) -> None:
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise TesselError(
            f"config.json of a {family} model lacks {', '.join(missing)}. Take it from the model's source."
        )
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise TesselError(f"hidden_act {activation!r} is not supported in a {family} model; supported is 'silu'.")
    if raw.get("quantization_config"):
        raise TesselError("quantization_config: quantised weights are not supported; take the unquantised model.")


def _check_values(raw: Mapping[str, Any]) -> None:
    """Numbers are numbers, and what should be an object or a list is one."""
    for key in (*_WHOLE, *_POSITIVE, "initializer_range", "sliding_window", "max_window_layers"):
        if key not in raw or (raw[key] is None and key in _MAY_BE_NULL):
            continue
        value = raw[key]
        number = value if type(value) in (int, float) else math.nan  # a truth value is an int to isinstance
        if key in _WHOLE:
            rule, good = "a whole number above 0", type(value) is int and number > 0
        elif key in _POSITIVE:
            rule, good = "a number above 0", number > 0
        else:
            rule, good = "a number, 0 or more", number >= 0
        if not good:
            raise TesselError(f"{key} is {value!r}: it must be {rule}. Take config.json from the model's source.")
    for key, kind, what in (
        ("rope_scaling", Mapping, "an object"),
        ("rope_parameters", Mapping, "an object"),
        ("layer_types", list, "a list"),
        ("mlp_only_layers", list, "a list"),
    ):
        if raw.get(key) is not None and not isinstance(raw[key], kind):
            raise TesselError(f"{key} is {raw[key]!r}: it must be {what}. Take config.json from the model's source.")


def _windows(known: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, tuple[str, ...] | None]:
    """Sliding window and layer types, by the rules of transformers' configuration classes."""
    window = known.get("sliding_window")
    if family == "llama":
        return None, None
    if family in ("mistral", "mixtral"):
        return (int(window) if window else None), None
    if family in ("qwen2_moe", "qwen3_moe"):
        return None, None
    window = known.get("sliding_window", 4096) if known.get("use_sliding_window", False) else None
    types = known.get("layer_types")
    if types is None:
        first = known.get("max_window_layers", 28)
        types = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
    if unknown or len(types) != layers:
        raise TesselError(
            f"layer_types must name full_attention or sliding_attention for each of {layers} layers; it has "
            f"{len(types)} entries of kinds {sorted({str(kind) for kind in types})}."
        )
    if "sliding_attention" in types and not window:
        raise TesselError("layer_types asks for sliding_attention, but use_sliding_window is off; set sliding_window.")
    if "sliding_attention" not in types:
        return None, None
    return int(window or 0), tuple(types)


def _is_rope_value(value: Any) -> bool:
    """A number, a truth value (`truncate`), a list of numbers, or null."""
    return value is None or isinstance(value, (int, float, list))


def _rope(
    raw: Mapping[str, Any], max_position_embeddings: int, default_theta: float
) -> tuple[float, Mapping[str, Any] | None]:
    """(theta, scaling) from any spelling: rope_theta + rope_scaling (transformers 4), rope_parameters (5)."""
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise TesselError("rope_parameters that differ between layer types are not supported.")
    wrong = [key for key, value in rope.items() if key not in _ROPE_TEXTS and not _is_rope_value(value)]
    if wrong:
        raise TesselError(f"{wrong[0]} of the RoPE parameters is {rope[wrong[0]]!r}: it must be a number.")
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or default_theta
    old_spelling = rope.pop("type", None)
    kind = rope.pop("rope_type", None) or old_spelling or "default"
    if kind not in _ROPE_TYPES:
        raise TesselError(f"RoPE scaling {kind!r} is not supported; supported are {', '.join(_ROPE_TYPES)}.")
    partial = rope.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise TesselError(f"partial_rotary_factor {partial} is not supported; supported is 1.0.")
    if kind == "default":
        return float(theta), None
    missing = [key for key in _ROPE_NEEDS[kind] if rope.get(key) is None]
    if missing:
        raise TesselError(f"RoPE scaling {kind!r} lacks {', '.join(missing)} in config.json.")
    if kind in ("llama3", "yarn"):
        outside = raw.get("original_max_position_embeddings")
        inside = rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = outside or inside or max_position_embeddings
    return float(theta), {"rope_type": kind, **rope}
