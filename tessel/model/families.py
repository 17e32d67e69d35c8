"""What the families differ in: names, transformers' defaults, and which layers of a mixture have experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tessel.errors import TesselError

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
FAMILIES = tuple(ARCHITECTURES)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")

# What transformers assumes where config.json leaves a key out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "mixtral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
WHOLE = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "decoder_sparse_step",
)
SCORES = ("softmax", "sigmoid")
# Many times what any model has: a damaged file is not to make lists without end.
MAX_LAYERS = 10_000
MAX_EXPERTS = 200_000


class Mixture(Protocol):
    """What of a model is about its experts; `tessel.model.config.ModelConfig` is one."""

    @property
    def family(self) -> str: ...
    @property
    def raw(self) -> Mapping[str, Any]: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def shared_expert_intermediate_size(self) -> int: ...
    @property
    def dense_layers(self) -> tuple[int, ...]: ...
    @property
    def norm_topk_prob(self) -> bool: ...
    @property
    def scoring_func(self) -> str: ...
    @property
    def routed_scaling_factor(self) -> float: ...
    @property
    def expert_bias(self) -> tuple[tuple[float, ...], ...] | None: ...


def require_sizes(num_layers: int, num_experts: int) -> None:
    """Refuse numbers of layers, and of experts in all of them, that no model has.

    Raises:
        TesselError: one is too large.
    """
    if num_layers > MAX_LAYERS:
        raise TesselError(f"num_hidden_layers {num_layers} is more than {MAX_LAYERS:,}, the most that is supported.")
    if num_layers * num_experts > MAX_EXPERTS:
        raise TesselError(
            f"{num_experts} experts in {num_layers} layers are more than {MAX_EXPERTS:,}, the most that are supported."
        )


def experts_from_hf(raw: Mapping[str, Any], family: str, num_layers: int) -> dict[str, Any]:
    """The fields of a ModelConfig that are about experts; none for a dense family.

    `scoring_func`, `routed_scaling_factor` and `e_score_correction_bias` (of every layer and expert) are not
    of these families for transformers: tessel writes them where a run routes by them.

    Raises:
        TesselError: numbers that do not fit each other, or a feature that is not supported.
    """
    if family not in MIXTURES:
        return {}
    known = {**DEFAULTS[family], **raw}
    num_experts = int(raw.get("num_local_experts") or known["num_experts"])
    require_sizes(num_layers, num_experts)
    chosen = int(known["num_experts_per_tok"])
    if chosen > num_experts:
        raise TesselError(f"num_experts_per_tok {chosen} is more than the {num_experts} experts of a layer.")
    if family != "mixtral" and raw.get("use_sliding_window"):
        raise TesselError(f"use_sliding_window is not supported in a {family} model; supported is false.")
    scoring = known.get("scoring_func", "softmax")
    if scoring not in SCORES:
        raise TesselError(f"scoring_func {scoring!r} is not supported; supported are {', '.join(SCORES)}.")
    if raw.get("router_jitter_noise"):
        raise TesselError("router_jitter_noise is not supported; supported is 0.")
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": int(known.get("moe_intermediate_size") or known["intermediate_size"]),
        "shared_expert_intermediate_size": int(known.get("shared_expert_intermediate_size") or 0),
        "dense_layers": _dense_layers(known, num_layers),
        "norm_topk_prob": bool(known.get("norm_topk_prob", False)),
        "scoring_func": scoring,
        "routed_scaling_factor": float(known.get("routed_scaling_factor") or 1.0),
        "expert_bias": _expert_bias(known, num_layers, num_experts),
    }


def _expert_bias(known: Mapping[str, Any], num_layers: int, num_experts: int) -> tuple[tuple[float, ...], ...] | None:
    rows = known.get("e_score_correction_bias")
    if rows is None:
        return None
    whole = isinstance(rows, list) and len(rows) == num_layers and all(isinstance(row, list) for row in rows)
    if not whole or any(len(row) != num_experts or not all(type(x) is float for x in row) for row in rows):
        raise TesselError(
            f"e_score_correction_bias must have {num_layers} lists of {num_experts} numbers. Take config.json from the "
            "model's source."
        )
    return tuple(tuple(row) for row in rows)


def _dense_layers(known: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Layers with a plain MLP, by transformers' rule."""
    step, dense = int(known.get("decoder_sparse_step") or 1), known.get("mlp_only_layers") or []
    if not all(type(layer) is int for layer in dense):
        raise TesselError(f"mlp_only_layers is {dense!r}: it must be a list of layers' numbers.")
    return tuple(layer for layer in range(num_layers) if layer in dense or (layer + 1) % step)


def experts_to_hf(config: Mixture) -> dict[str, Any]:
    """The keys of config.json that say what `experts_from_hf` reads."""
    if not config.num_experts:
        return {}
    hf: dict[str, Any] = {"num_experts_per_tok": config.num_experts_per_tok}
    if config.family == "mixtral":
        hf["num_local_experts"] = config.num_experts
    else:
        hf["num_experts"] = config.num_experts
        hf["moe_intermediate_size"] = config.moe_intermediate_size
        hf["decoder_sparse_step"] = config.raw.get("decoder_sparse_step", 1)
        hf["mlp_only_layers"] = config.raw.get("mlp_only_layers", list(config.dense_layers))
    if config.family == "qwen2_moe":
        hf["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size
    if config.family != "mixtral" or not config.norm_topk_prob:
        hf["norm_topk_prob"] = config.norm_topk_prob
    if config.scoring_func != "softmax":
        hf["scoring_func"] = config.scoring_func
    if config.routed_scaling_factor != 1.0:
        hf["routed_scaling_factor"] = config.routed_scaling_factor
    if config.expert_bias is not None:
        hf["e_score_correction_bias"] = [list(row) for row in config.expert_bias]
    return hf
