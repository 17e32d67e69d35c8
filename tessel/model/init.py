"""A random start, by Megatron's law."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import nn

from tessel.layout.sharding import pattern_of, rules
from tessel.layout.tiles import Tile
from tessel.model.config import ModelConfig


def initialize_(
    model: nn.Module, config: ModelConfig, std: float, seed: int, tiles: Mapping[str, Tile] | None = None
) -> None:
    """Fill every parameter of `model`, in place.

    ============================================== =================================
    parameter                                      law
    ============================================== =================================
    model.embed_tokens.weight                      normal(0, std)
    model.layers.*.input_layernorm.weight          1
    model.layers.*.self_attn.q_proj.weight         normal(0, std)
    model.layers.*.self_attn.k_proj.weight         normal(0, std)
    model.layers.*.self_attn.v_proj.weight         normal(0, std)
    model.layers.*.self_attn.q_proj.bias           0
    model.layers.*.self_attn.k_proj.bias           0
    model.layers.*.self_attn.v_proj.bias           0
    model.layers.*.self_attn.q_norm.weight         1
    model.layers.*.self_attn.k_norm.weight         1
    model.layers.*.self_attn.o_proj.weight         normal(0, std / sqrt(2 * layers))
    model.layers.*.self_attn.o_proj.bias           0
    model.layers.*.post_attention_layernorm.weight 1
    model.layers.*.mlp.gate_proj.weight            normal(0, std)
    model.layers.*.mlp.gate_proj.bias              0
    model.layers.*.mlp.up_proj.weight              normal(0, std)
    model.layers.*.mlp.up_proj.bias                0
    model.layers.*.mlp.down_proj.weight            normal(0, std / sqrt(2 * layers))
    model.layers.*.mlp.down_proj.bias              0
    model.norm.weight                              1
    lm_head.weight                                 normal(0, std)
    ============================================== =================================

    `std` is `--init-method-std`. The laws stand in the sharding table; a test holds this one against
    it. A parameter's values depend on `seed` and its name alone: they are drawn on the CPU in fp32 from
    a generator of its own, whatever the device, the dtype or the layout, and the run's own random
    state is left as it was. A parameter that is held in part (`tiles`, by name) is drawn whole and cut;
    padding is 0.
    """
    table = rules(config)
    stds = {"normal": std, "scaled_normal": std / math.sqrt(2 * config.num_hidden_layers)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            law = table[pattern_of(name)].init
            if law in stds:
                tile = tiles[name] if tiles is not None else None
                generator = torch.Generator("cpu").manual_seed(_seed_of(seed, name))
                shape = parameter.shape if tile is None else tile.shape
                values = torch.empty(shape, dtype=torch.float32, device="cpu")
                values.normal_(0.0, stds[law], generator=generator)
                if tile is None:
                    parameter.copy_(values)
                else:
                    parameter.zero_()[tile.local_index()] = values[tile.index()].to(parameter)
            else:
                parameter.fill_(1.0 if law == "ones" else 0.0)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
