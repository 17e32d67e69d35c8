"""Megatron's shape flags: as a model of their own, and against config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tessel.config.run import ModelShape
from tessel.errors import UsageError
from tessel.model.config import ModelConfig

COMPLETE = ModelShape(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    max_position_embeddings=256,
    normalization="RMSNorm",
    swiglu=True,
    position_embedding_type="rope",
    disable_bias_linear=True,
    vocab_size=512,
)


def shape(**flags: Any) -> ModelShape:
    return dataclasses.replace(COMPLETE, **flags)


def test_megatrons_defaults() -> None:
    assert ModelConfig.from_shape(COMPLETE) == ModelConfig(
        family="llama",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,  # 4 * 64 * 2 / 3 = 170.7, in blocks of 64
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        initializer_range=0.02,
    )


def test_families_and_values() -> None:
    qwen2 = ModelConfig.from_shape(shape(add_qkv_bias=True, untie_embeddings_and_output_weights=True, rotary_base=1e6))
    assert (qwen2.family, qwen2.attention_bias, qwen2.attention_output_bias) == ("qwen2", True, False)
    assert (qwen2.tie_word_embeddings, qwen2.rope_theta) == (False, 1e6)
    grouped = shape(qk_layernorm=True, group_query_attention=True, num_query_groups=2, kv_channels=16)
    qwen3 = ModelConfig.from_shape(grouped)
    assert (qwen3.family, qwen3.qk_norm, qwen3.num_key_value_heads, qwen3.head_dim) == ("qwen3", True, 2, 16)
    other = ModelConfig.from_shape(shape(ffn_hidden_size=96, norm_epsilon=1e-6, init_method_std=0.01))
    assert (other.intermediate_size, other.rms_norm_eps, other.initializer_range) == (96, 1e-6, 0.01)
    assert ModelConfig.from_shape(shape(group_query_attention=True)).num_key_value_heads == 1, "Megatron's default"


@pytest.mark.parametrize(
    ("flags", "tokenizer_size", "rows"),
    [
        ({"vocab_size": 500}, None, 512),
        ({"vocab_size": 511}, 512, 512),
        ({"vocab_size": 512}, 513, 640),
        ({"vocab_size": 500, "make_vocab_size_divisible_by": 1}, None, 500),
        ({"vocab_size": 500, "make_vocab_size_divisible_by": 64}, None, 512),
        ({"vocab_size": None, "padded_vocab_size": 777}, None, 777),
        ({"vocab_size": None}, 100, 128),
    ],
)
def test_rows_of_the_embedding(flags: dict[str, Any], tokenizer_size: int | None, rows: int) -> None:
    assert ModelConfig.from_shape(shape(**flags), tokenizer_size).vocab_size == rows


def test_rope_scaling() -> None:
    llama3 = ModelConfig.from_shape(shape(use_rope_scaling=True)).rope_scaling
    assert llama3 == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    yarn = ModelConfig.from_shape(shape(rope_scaling_type="yarn", rope_scaling_factor=4.0)).rope_scaling
    assert yarn == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    linear = ModelConfig.from_shape(shape(rope_scaling_type="linear", rope_scaling_factor=2.0)).rope_scaling
    assert linear == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_layers": None, "hidden_size": None}, "needs --num-layers, --hidden-size as well"),
        ({"normalization": None}, "needs --normalization RMSNorm as well"),
        ({"swiglu": False}, "needs --swiglu"),
        ({"position_embedding_type": None}, "needs --position-embedding-type rope"),
        ({"disable_bias_linear": False}, "needs --disable-bias-linear"),
        ({"add_qkv_bias": True, "qk_layernorm": True}, "together fit no supported family"),
        ({"num_query_groups": 2}, "--num-query-groups 2 needs --group-query-attention"),
        ({"group_query_attention": True, "num_query_groups": 3}, "--num-query-groups 3; choose a divisor of 8"),
        ({"rotary_percent": 0.5}, "--rotary-percent 0.5 fits no supported family"),
        ({"hidden_size": 60}, "--hidden-size 60 is not a multiple of --num-attention-heads 8; give --kv-channels"),
        ({"vocab_size": None}, "needs --vocab-size, --padded-vocab-size or a tokenizer"),
        ({"padded_vocab_size": 500}, "--padded-vocab-size 500 is smaller than the vocabulary of 512"),
        ({"make_vocab_size_divisible_by": 0}, "--make-vocab-size-divisible-by 0 must be at least 1"),
        ({"rope_scaling_type": "yarn"}, "--rope-scaling-type yarn needs --rope-scaling-factor"),
    ],
)
def test_what_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelConfig.from_shape(shape(**flags))


MODEL = ModelConfig.from_hf(
    {
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "max_position_embeddings": 256,
    }
)


def check(**flags: Any) -> None:
    MODEL.check_shape_flags(ModelShape(**flags), set(flags))


def test_flags_that_agree() -> None:
    check(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        group_query_attention=True,
        num_query_groups=2,
        kv_channels=8,
        rotary_base=1000000,
        norm_epsilon=1e-6,
        swiglu=True,
        disable_bias_linear=True,
        add_qkv_bias=True,
        untie_embeddings_and_output_weights=True,
        normalization="RMSNorm",
        position_embedding_type="rope",
        init_method_std=0.5,
    )
    check(max_position_embeddings=32)
    check(max_position_embeddings=4096)
    check(vocab_size=511, make_vocab_size_divisible_by=128)
    check(padded_vocab_size=512)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_layers": 5}, r"--num-layers 5 \(the model: 4\)"),
        ({"num_layers": 5, "hidden_size": 3}, r"--hidden-size 3 \(the model: 64\); --num-layers 5 \(the model: 4\)"),
        ({"num_query_groups": 4}, r"--num-query-groups 4 \(the model: 2\)"),
        ({"group_query_attention": False}, r"--group-query-attention off \(the model has 2 key/value heads\)"),
        ({"rotary_base": 10000}, r"--rotary-base 10000 \(the model: 1000000.0\)"),
        ({"qk_layernorm": True}, r"--qk-layernorm True \(the model: False\)"),
        ({"add_qkv_bias": False}, r"--add-qkv-bias False \(the model: True\)"),
        ({"vocab_size": 513}, r"--vocab-size 513 \(the model has 512 rows\)"),
        ({"padded_vocab_size": 640}, r"--padded-vocab-size 640 \(the model has 512 rows\)"),
        ({"make_vocab_size_divisible_by": 1024}, r"--make-vocab-size-divisible-by 1024 \(the model has 512 rows\)"),
        ({"use_rope_scaling": True}, r"--use-rope-scaling \(the model's RoPE scaling: None\)"),
        ({"rope_scaling_type": "yarn"}, r"--rope-scaling-type yarn \(the model: None\)"),
    ],
)
def test_flags_that_contradict(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message + r".*Leave these flags out"):
        check(**flags)
    # A value that was not given is a default, and says nothing.
    MODEL.check_shape_flags(ModelShape(**flags), set())
