"""Megatron's shape flags, as a model of their own or held against config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tessel.config.run import ModelShape
from tessel.errors import UsageError
from tessel.layout.sharding import DecoderShape
from tessel.model.families import Mixture
from tessel.model.mixture import dense_layers, experts_from_shape, family_of, flags_of_experts

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


class ShapedModel(DecoderShape, Mixture, Protocol):
    """What flags are compared with; `tessel.model.config.ModelConfig` is one."""

    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> Mapping[str, Any] | None: ...


def flag(name: str) -> str:
    """A field's name as it is written on the command line."""
    return "--" + name.replace("_", "-")


def fields_from_shape(shape: ModelShape, vocab_size: int | None = None) -> dict[str, Any]:
    """The fields of a ModelConfig that the flags describe; see `ModelConfig.from_shape`.

    Raises:
        UsageError: flags that are missing, or that no supported family can express.
    """
    _check_expressible(shape)
    hidden, heads, layers = shape.hidden_size, shape.num_attention_heads, shape.num_layers
    assert hidden is not None and heads is not None and layers is not None
    if shape.kv_channels is None and hidden % heads:
        raise UsageError(
            f"--hidden-size {hidden} is not a multiple of --num-attention-heads {heads}; give --kv-channels."
        )
    kv_heads = (shape.num_query_groups or 1) if shape.group_query_attention else heads
    if heads % kv_heads:
        raise UsageError(
            f"--num-attention-heads {heads} is not a multiple of --num-query-groups {kv_heads}; "
            f"choose a divisor of {heads}."
        )
    family = family_of(shape)
    # Megatron's rule for a gated MLP: two thirds of 4 x hidden, in whole blocks of 64.
    inner = shape.ffn_hidden_size or int(4 * hidden * 2 / 3 / 64) * 64
    return {
        "family": family,
        "vocab_size": _rows(shape, vocab_size),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": shape.kv_channels or hidden // heads,
        "rms_norm_eps": 1e-5 if shape.norm_epsilon is None else shape.norm_epsilon,
        "rope_theta": 10000.0 if shape.rotary_base is None else float(shape.rotary_base),
        "rope_scaling": _scaling(shape),
        "tie_word_embeddings": not shape.untie_embeddings_and_output_weights,
        "attention_bias": shape.add_qkv_bias,
        "qk_norm": shape.qk_layernorm,
        "max_position_embeddings": shape.max_position_embeddings,
        "initializer_range": shape.init_method_std,
        **experts_from_shape(shape, family, layers, inner),
    }


def _check_expressible(shape: ModelShape) -> None:
    missing = [flag(name) for name in _REQUIRED if getattr(shape, name) is None]
    # Megatron's defaults are another kind of model; what differs has to be said, not guessed.
    if shape.normalization is None:
        missing.append("--normalization RMSNorm")
    if not shape.swiglu:
        missing.append("--swiglu")
    if shape.position_embedding_type is None:
        missing.append("--position-embedding-type rope")
    if not shape.disable_bias_linear:
        missing.append("--disable-bias-linear")
    if missing:
        raise UsageError(
            f"A model from shape flags needs {', '.join(missing)} as well: without them Megatron's flags describe "
            "a model that is not of the Llama or Qwen kind."
        )
    if shape.add_qkv_bias and shape.qk_layernorm:
        raise UsageError("--add-qkv-bias and --qk-layernorm together fit no supported family; leave one of them out.")
    if shape.num_query_groups is not None and not shape.group_query_attention:
        raise UsageError(f"--num-query-groups {shape.num_query_groups} needs --group-query-attention; add it.")
    if shape.rotary_percent not in (None, 1.0):
        raise UsageError(
            f"--rotary-percent {shape.rotary_percent} fits no supported family; leave it out, or give 1.0."
        )


def _rows(shape: ModelShape, tokenizer_size: int | None) -> int:
    """Rows of the embedding."""
    size = shape.vocab_size if tokenizer_size is None else tokenizer_size
    if shape.padded_vocab_size is not None:
        if size is not None and shape.padded_vocab_size < size:
            raise UsageError(
                f"--padded-vocab-size {shape.padded_vocab_size} is smaller than the vocabulary of {size}; "
                f"give {size} or more."
            )
        return shape.padded_vocab_size
    if size is None:
        raise UsageError("A model from shape flags needs --vocab-size, --padded-vocab-size or a tokenizer.")
    multiple = 128 if shape.make_vocab_size_divisible_by is None else shape.make_vocab_size_divisible_by
    if multiple < 1:
        raise UsageError(f"--make-vocab-size-divisible-by {multiple} must be at least 1.")
    return -(-size // multiple) * multiple


def _scaling(shape: ModelShape) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, from the flags."""
    kind = shape.rope_scaling_type or ("llama3" if shape.use_rope_scaling else None)
    if kind is None:
        return None
    if kind == "llama3":  # Megatron's defaults are Llama 3.1's numbers
        return {
            "rope_type": "llama3",
            "factor": 8.0 if shape.rope_scaling_factor is None else shape.rope_scaling_factor,
            "low_freq_factor": 1.0 if shape.low_freq_factor is None else shape.low_freq_factor,
            "high_freq_factor": 4.0 if shape.high_freq_factor is None else shape.high_freq_factor,
            "original_max_position_embeddings": shape.original_max_position_embeddings or 8192,
        }
    if shape.rope_scaling_factor is None:
        raise UsageError(f"--rope-scaling-type {kind} needs --rope-scaling-factor.")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": shape.rope_scaling_factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = (
            shape.original_max_position_embeddings or shape.max_position_embeddings
        )
    return scaling


def contradictions(config: ShapedModel, shape: ModelShape, given: set[str]) -> list[str]:
    """Each given flag that disagrees with the model, with both values; empty where they agree."""
    actual = flags_of(config)
    wrong = []
    for name in sorted(given & actual.keys()):
        value = getattr(shape, name)
        if value is not None and value != actual[name]:
            wrong.append(f"{flag(name)} {value} (the model: {actual[name]})")
    for name in ("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by"):
        value = getattr(shape, name)
        if name in given and value is not None and value > config.vocab_size:
            wrong.append(f"{flag(name)} {value} (the model has {config.vocab_size} rows)")
    # With as many groups as heads, grouped and plain attention are one and the same.
    grouped = config.num_key_value_heads < config.num_attention_heads
    if "group_query_attention" in given and grouped and not shape.group_query_attention:
        wrong.append(f"--group-query-attention off (the model has {config.num_key_value_heads} key/value heads)")
    if config.num_experts and given & {"moe_layer_freq", "first_k_dense_replace"}:
        asked = dense_layers(shape, config.num_hidden_layers)
        if asked != config.dense_layers:
            wrong.append(f"--moe-layer-freq: layers {asked} without experts (the model: {config.dense_layers})")
    if shape.use_rope_scaling and "use_rope_scaling" in given and actual["rope_scaling_type"] != "llama3":
        wrong.append(f"--use-rope-scaling (the model's RoPE scaling: {actual['rope_scaling_type']})")
    return wrong


def flags_of(config: ShapedModel) -> dict[str, Any]:
    """What each flag would have to say to describe the model."""
    scaling = config.rope_scaling or {}
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "position_embedding_type": "rope",
        "rotary_base": config.rope_theta,
        "rotary_percent": 1.0,
        "rope_scaling_type": scaling.get("rope_type"),
        "rope_scaling_factor": scaling.get("factor"),
        "low_freq_factor": scaling.get("low_freq_factor"),
        "high_freq_factor": scaling.get("high_freq_factor"),
        "original_max_position_embeddings": scaling.get("original_max_position_embeddings"),
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "disable_bias_linear": not (config.attention_output_bias or config.mlp_bias),
        "add_qkv_bias": config.attention_bias,
        "qk_layernorm": config.qk_norm,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        **flags_of_experts(config),
    }
