"""Megatron's shape flags: as a model of their own, and against config.json."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from tessel.config.experts import Experts
from tessel.config.run import ModelShape
from tessel.errors import TesselError, UsageError
from tessel.model.balance import Balance, RouterOptions
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


EXPERTS = {"num_experts": 8, "ffn_hidden_size": 96}


def test_mixtures_of_experts() -> None:
    mixtral = ModelConfig.from_shape(shape(**EXPERTS))
    assert (mixtral.family, mixtral.num_experts, mixtral.num_experts_per_tok) == ("mixtral", 8, 2)
    assert (mixtral.moe_intermediate_size, mixtral.dense_layers, mixtral.norm_topk_prob) == (96, (), True)
    qwen3 = ModelConfig.from_shape(
        shape(**EXPERTS, qk_layernorm=True, moe_router_topk=4, moe_ffn_hidden_size=24, moe_layer_freq="[0]*1+[1]*1")
    )
    assert (qwen3.family, qwen3.num_experts_per_tok, qwen3.moe_intermediate_size) == ("qwen3_moe", 4, 24)
    assert (qwen3.dense_layers, qwen3.qk_norm, qwen3.intermediate_size) == ((0,), True, 96)
    shared = {"moe_shared_expert_intermediate_size": 40, "moe_shared_expert_gate": True}
    for bias in (False, True):
        qwen2 = ModelConfig.from_shape(shape(**EXPERTS, **shared, add_qkv_bias=bias, first_k_dense_replace=1))
        assert (qwen2.family, qwen2.shared_expert_intermediate_size, qwen2.attention_bias) == ("qwen2_moe", 40, bias)
        assert qwen2.dense_layers == (0,)
        assert ModelConfig.from_hf(qwen2.to_hf()) == qwen2


@pytest.mark.parametrize(
    ("freq", "dense"),
    [
        ("1", ()),
        ("-1", ()),
        ("2", (1, 3, 5)),
        ("([0]+[1]*2)*2", (0, 3)),
        ("[1,0,1,0,1,1]", (1, 3)),
    ],
)
def test_layers_with_experts(freq: str, dense: tuple[int, ...]) -> None:
    flags = shape(**EXPERTS, num_layers=6, qk_layernorm=True, moe_layer_freq=freq)
    assert ModelConfig.from_shape(flags).dense_layers == dense


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"moe_router_topk": 9}, "--moe-router-topk 9 is more than --num-experts 8"),
        ({"moe_layer_freq": "2"}, "Dense layers beside layers with experts.*need --qk-layernorm"),
        ({"moe_ffn_hidden_size": 24}, "--moe-ffn-hidden-size other than --ffn-hidden-size"),
        ({"add_qkv_bias": True}, "--num-experts with --add-qkv-bias fits Qwen2-MoE alone"),
        ({"moe_shared_expert_intermediate_size": 8}, "needs --moe-shared-expert-gate"),
        (
            {"moe_shared_expert_intermediate_size": 8, "qk_layernorm": True},
            "--moe-shared-expert-intermediate-size and --qk-layernorm together fit no supported family",
        ),
        ({"qk_layernorm": True, "moe_layer_freq": "[1]*3"}, "is about 3 layers, and the model has 2"),
        ({"moe_layer_freq": "[2]*2"}, "must be a whole number, or a list of 0 and 1"),
        ({"moe_layer_freq": "0"}, "must be a whole number, or a list of 0 and 1"),
        ({"moe_layer_freq": "__import__('os')"}, "must be a whole number, or a list of 0 and 1"),
        ({"moe_layer_freq": "[0"}, "must be a whole number, or a list of 0 and 1"),
        ({"moe_layer_freq": "[1]*-1+1"}, "must be a whole number, or a list of 0 and 1"),
        ({"moe_layer_freq": "[1]*9999*9999*9999"}, "must be a whole number, or a list of 0 and 1"),
    ],
)
def test_mixtures_that_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelConfig.from_shape(shape(**EXPERTS | flags))


MIXTURE = ModelConfig.from_hf(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    }
)


def test_a_mixtures_flags_agree_or_contradict() -> None:
    agreeing = {
        "num_experts": 8,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 24,
        "ffn_hidden_size": 96,
        "moe_layer_freq": "-1",
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    }
    MIXTURE.check_shape_flags(ModelShape(**agreeing), set(agreeing))
    for flags, message in (
        ({"num_experts": 4}, r"--num-experts 4 \(the model: 8\)"),
        ({"moe_router_topk": 2}, r"--moe-router-topk 2 \(the model: 4\)"),
        ({"moe_shared_expert_intermediate_size": 9}, r"intermediate-size 9 \(the model: None\)"),
        ({"moe_layer_freq": "1"}, r"layers \(\) without experts \(the model: \(0,\)\)"),
    ):
        with pytest.raises(UsageError, match=message):
            MIXTURE.check_shape_flags(ModelShape(**flags), set(flags))
    with pytest.raises(UsageError, match=r"--num-experts 4 \(the model: None\)"):
        check(num_experts=4)
    # Scripts for dense models of the suites hold it.
    check(norm_topk_prob=True)


def test_router_options_change_the_model() -> None:
    def changed(config: ModelConfig = MIXTURE, *given: str, **options: Any) -> ModelConfig:
        return config.with_router_options(Experts(**options), {*options, *given})

    assert changed() == MIXTURE
    assert changed(moe_router_pre_softmax=True).norm_topk_prob is False
    assert changed(MIXTURE, "norm_topk_prob", moe_router_pre_softmax=True).norm_topk_prob is True
    # A name of MindSpeed's does not overrule config.json, and is all that a model from flags has.
    assert changed(moe_router_load_balancing_type="softmax_topk").norm_topk_prob is True
    from_flags = ModelConfig.from_shape(shape(**EXPERTS))
    assert changed(from_flags, moe_router_load_balancing_type="softmax_topk").norm_topk_prob is False
    sigmoid = changed(moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.5)
    assert (sigmoid.scoring_func, sigmoid.routed_scaling_factor) == ("sigmoid", 2.5)
    assert ModelConfig.from_hf(sigmoid.to_hf()) == sigmoid
    with pytest.raises(UsageError, match="--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid"):
        changed(moe_router_enable_expert_bias=True)
    with pytest.raises(UsageError, match="--moe-aux-loss-coeff: the model has no experts"):
        changed(MODEL, moe_aux_loss_coeff=0.1)
    assert changed(MODEL, moe_token_dispatcher_type="alltoall") == MODEL


def test_the_bias_of_experts_is_kept_in_config_json() -> None:
    balance = Balance(MIXTURE, RouterOptions(expert_bias=True))
    assert balance.bias_LX is not None
    balance.bias_LX += torch.arange(32).view(4, 8) * 0.1
    kept = ModelConfig.from_hf(json.loads(json.dumps(balance.config_now(MIXTURE).to_hf())))
    again = Balance(kept, RouterOptions(expert_bias=True)).bias_LX
    assert again is not None and torch.equal(again, balance.bias_LX)
    assert kept == MIXTURE, "it is state, not shape"
    with pytest.raises(TesselError, match="e_score_correction_bias must have 4 lists of 8 numbers"):
        ModelConfig.from_hf({**MIXTURE.to_hf(), "e_score_correction_bias": [[0.0] * 8] * 3})
