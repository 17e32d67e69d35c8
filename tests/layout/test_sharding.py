"""The table covers every parameter once, and its slices are disjoint, complete and joinable."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tessel.errors import TesselError, UsageError
from tessel.layout.sharding import ParamRule, parameters, pattern_of, rule_of, rules
from tessel.layout.tiles import Slice, slice_of
from tessel.model.config import ModelConfig

BASE: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 10},
    "qwen3 biases": {"model_type": "qwen3", "attention_bias": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 8},
    "llama biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [0, 5],
    },
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
}


def config_of(family: str) -> ModelConfig:
    return ModelConfig.from_hf({**BASE, **FAMILIES[family]})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_exactly_once(family: str) -> None:
    import torch

    from tessel.model.transformer import Transformer

    config = config_of(family)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: rule.shape for name, rule in parameters(config).items()} == shapes
    assert {pattern_of(name) for name in shapes} == rules(config).keys(), "a row that no parameter uses"
    for name in shapes:
        assert rule_of(name, config) == parameters(config)[name]


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_are_disjoint_cover_and_join(family: str, degree: int) -> None:
    for name, rule in rules(config_of(family)).items():
        whole = np.arange(np.prod(rule.shape)).reshape(rule.shape)
        try:
            slices = [slice_of(rule, rule.shape, degree, rank) for rank in range(degree)]
        except UsageError:
            assert rule.blocks % degree, name
            continue
        pieces = [whole[piece.index(whole.ndim)] for piece in slices]
        padded = [piece.shape[rule.dim or 0] + part.padding for piece, part in zip(pieces, slices, strict=True)]
        assert len(set(padded)) == 1, f"{name}: ranks hold different sizes"
        if rule.dim is None:
            assert all(np.array_equal(piece, whole) for piece in pieces)
            continue
        copies = slices[0].copies
        for first in range(0, degree, copies):
            assert len(set(slices[first : first + copies])) == 1
        assert np.array_equal(np.concatenate(pieces[::copies], axis=rule.dim), whole), name
        assert all(part.padding == 0 for part in slices) or rule.split == "vocab"


def test_heads_stay_whole() -> None:
    table = rules(config_of("qwen3"))
    query, key = table["model.layers.*.self_attn.q_proj.weight"], table["model.layers.*.self_attn.k_proj.weight"]
    assert slice_of(query, query.shape, 4, 1) == Slice(0, 20, 40)
    assert slice_of(key, key.shape, 2, 1) == Slice(0, 10, 20)
    # More ranks than key/value heads: neighbours hold the head that their query heads look at.
    assert [slice_of(key, key.shape, 4, rank) for rank in range(4)] == [
        Slice(0, 0, 10, copies=2),
        Slice(0, 0, 10, copies=2),
        Slice(0, 10, 20, copies=2),
        Slice(0, 10, 20, copies=2),
    ]


def test_vocabulary_is_padded_at_its_end() -> None:
    rule = rules(config_of("qwen2"))["lm_head.weight"]
    assert slice_of(rule, (307, 48), 4, 3) == Slice(0, 231, 307, padding=1)
    assert slice_of(rule, (5, 48), 4, 3) == Slice(0, 5, 5, padding=2), "a rank may hold padding alone"


def test_what_cannot_be_cut_is_refused_with_what_can() -> None:
    table = rules(config_of("qwen2"))
    with pytest.raises(UsageError, match=r"--tensor-model-parallel-size 3 .* 8 blocks .* one of \[1, 2, 4, 8\]"):
        slice_of(table["model.layers.*.self_attn.o_proj.weight"], (48, 48), 3, 0)
    with pytest.raises(UsageError, match="--tensor-model-parallel-size 3"):
        slice_of(table["model.layers.*.self_attn.v_proj.weight"], (12, 48), 3, 0)
    with pytest.raises(UsageError, match=r"rank 2 is not in 0\.\.1"):
        slice_of(table["model.norm.weight"], (48,), 2, 2)


@pytest.mark.parametrize("name", ["model.layers.12.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "head"])
def test_an_unknown_parameter_is_refused(name: str) -> None:
    with pytest.raises(TesselError, match="no such parameter.*model.embed_tokens.weight"):
        rule_of(name, config_of("qwen2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_and_partial_sums(family: str) -> None:
    config = config_of(family)
    for name, rule in rules(config).items():
        assert rule.weight_decay == (not name.endswith(".bias") and "norm" not in name), name
        assert rule.is_expert == (".mlp.experts." in name)
        assert rule.is_embedding_or_output == (name in ("model.embed_tokens.weight", "lm_head.weight"))
        assert ("kv_replicas" in rule.partial_axes) == (".k_proj." in name or ".v_proj." in name)
        assert ("tp" in rule.partial_axes) == ("q_norm" in name or "k_norm" in name)
        assert ("tied_stages" in rule.partial_axes) == (config.tie_word_embeddings and "embed_tokens" in name)
        # A vector that is not cut and not per head is added to each token: partial where tokens are cut.
        per_token = rule.split == "replicated" and "tp" not in rule.partial_axes
        assert ("sequence" in rule.partial_axes) == per_token


def test_parameter_counts_of_known_models() -> None:
    """Qwen2.5-0.5B, Qwen3-0.6B and Llama 3.1 8B have as many parameters as their files."""
    keys = (*BASE, "model_type", "tie_word_embeddings")
    known = {
        494_032_768: (151936, 896, 4864, 24, 14, 2, "qwen2", True),
        596_049_920: (151936, 1024, 3072, 28, 16, 8, "qwen3", True),
        8_030_261_248: (128256, 4096, 14336, 32, 32, 8, "llama", False),
    }
    for count, values in known.items():
        table = parameters(ModelConfig.from_hf(dict(zip(keys, values, strict=True))))
        assert sum(int(np.prod(rule.shape)) for rule in table.values()) == count


def test_the_table_needs_no_torch() -> None:
    code = "import sys, tessel.layout.sharding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_rule_is_plain_data() -> None:
    assert ParamRule((3,), "replicated", "ones") == ParamRule((3,), "replicated", "ones")
    assert slice_of(ParamRule((3,), "replicated", "ones"), (3,), 4, 2) == Slice(None, 0, 3, copies=4)
