"""A random start: the law of every parameter, and that it depends on seed and name alone."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from tessel.layout.sharding import pattern_of, rules
from tessel.layout.tiles import tiles_of
from tessel.layout.topology import Topology
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.transformer import Transformer

BASE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def built(model_type: str, seed: int = 7, **overrides: Any) -> tuple[Transformer, ModelConfig]:
    config = ModelConfig.from_hf({"model_type": model_type, **BASE, **overrides})
    model = Transformer(config)
    initialize_(model, config, std=0.03, seed=seed)
    return model, config


MIXTURE = {
    "num_experts": 4,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 64,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    ("model_type", "more"), [("qwen2", {}), ("qwen3", {}), ("llama", {"mlp_bias": True}), ("qwen2_moe", MIXTURE)]
)
def test_every_parameter_follows_its_law(model_type: str, more: dict[str, Any]) -> None:
    model, config = built(model_type, **more)
    table = rules(config)
    stds = {"normal": 0.03, "scaled_normal": 0.03 / math.sqrt(16)}
    for name, parameter in model.named_parameters():
        law = table[pattern_of(name)].init
        if law in stds:
            error = 5 * stds[law] / math.sqrt(parameter.numel())  # five standard errors
            assert parameter.std().item() == pytest.approx(stds[law], abs=error), name
            assert parameter.mean().item() == pytest.approx(0.0, abs=error), name
            if parameter.numel() < 1000:
                continue
            assert (parameter.abs() > 2 * stds[law]).float().mean().item() == pytest.approx(0.0455, abs=0.02), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, 1.0 if law == "ones" else 0.0)), name


def test_the_docstring_says_what_the_table_says() -> None:
    laws = {
        "normal": "normal(0, std)",
        "scaled_normal": "normal(0, std / sqrt(2 * layers))",
        "ones": "1",
        "zeros": "0",
    }
    documented = dict(re.findall(r"^ +(\w[\w.*]+\.\w+) +(\S.*)$", initialize_.__doc__ or "", re.MULTILINE))
    expected = {}
    biases = {"attention_bias": True, "mlp_bias": True}
    for model_type, more in (("qwen2", {}), ("qwen3", {}), ("llama", biases), ("qwen2_moe", MIXTURE)):
        config = ModelConfig.from_hf({"model_type": model_type, **BASE, **more})
        table = {pattern.replace("shared_expert.", ""): laws[rule.init] for pattern, rule in rules(config).items()}
        assert all(expected.get(pattern, law) == law for pattern, law in table.items())
        expected.update(table)
    assert documented == expected


def test_each_expert_has_values_of_its_own() -> None:
    model, _ = built("qwen2_moe", **MIXTURE)
    more, _ = built("qwen2_moe", **MIXTURE | {"num_experts": 6})
    name = "model.layers.1.mlp.experts.down_proj"
    few, many = (dict(m.named_parameters())[name] for m in (model, more))
    assert torch.equal(few, many[:4]), "an expert's values depend on its number, not on how many there are"
    assert len({float(expert.detach().sum()) for expert in many}) == 6


def test_values_depend_on_seed_and_name_alone() -> None:
    model, _ = built("qwen2")
    shallower, _ = built("qwen2", num_hidden_layers=8, tie_word_embeddings=True)
    values = dict(model.named_parameters())
    for name, parameter in shallower.named_parameters():
        assert torch.equal(parameter, values[name]), name
    other_seed, _ = built("qwen2", seed=8)
    for name, parameter in other_seed.named_parameters():
        assert torch.equal(parameter, values[name]) == (parameter.dim() == 1), name
    assert not torch.equal(values["model.layers.0.mlp.up_proj.weight"], values["model.layers.1.mlp.up_proj.weight"])
    assert not torch.equal(values["model.layers.0.mlp.up_proj.weight"], values["model.layers.0.mlp.gate_proj.weight"])


def test_the_runs_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    built("qwen2")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("tp", "vocab_size"), [(2, 400), (4, 403)])
def test_a_rank_gets_its_part_of_what_one_process_draws(tp: int, vocab_size: int) -> None:
    """With 4 ranks, two hold each key/value head, and the vocabulary is padded."""
    model, config = built("qwen3", vocab_size=vocab_size, num_hidden_layers=2)
    topology = Topology(world_size=tp, tp=tp)
    whole = dict(model.named_parameters())
    for rank in range(tp):
        tiles = tiles_of(config, topology, topology.place(rank))
        part = Transformer(config)
        for name, tile in tiles.items():
            owner, _, own_name = name.rpartition(".")
            setattr(part.get_submodule(owner), own_name, nn.Parameter(torch.full(tile.local_shape, torch.nan)))
        initialize_(part, config, std=0.03, seed=7, tiles=tiles)
        for name, parameter in part.named_parameters():
            values = parameter.detach().clone()
            assert torch.equal(values[tiles[name].local_index()], whole[name][tiles[name].index()]), name
            values[tiles[name].local_index()] = 0
            assert not values.any(), f"{name}: padding"
