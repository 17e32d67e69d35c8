"""A random start, by Megatron's law."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tessel.layout.sharding import ParamRule, pattern_of, rules
from tessel.layout.tiles import Tile
from tessel.model.config import ModelConfig


def initialize_(
    model: nn.Module,
    config: ModelConfig,
    std: float,
    seed: int,
    tiles: Mapping[str, Tile] | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Fill every parameter of `model`, or those named by `only`, in place.

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
    model.layers.*.mlp.gate.weight                 normal(0, std)
    model.layers.*.mlp.experts.gate_proj           normal(0, std)
    model.layers.*.mlp.experts.up_proj             normal(0, std)
    model.layers.*.mlp.experts.down_proj           normal(0, std / sqrt(2 * layers))
    model.layers.*.mlp.shared_expert_gate.weight   normal(0, std)
    model.norm.weight                              1
    lm_head.weight                                 normal(0, std)
    *.lora.A                                       uniform(-1 / sqrt(in), 1 / sqrt(in))
    *.lora.B                                       0
    *.lora.magnitude                               left 0: see `train/adapting.py`
    ============================================== =================================

    A shared expert has the laws of an MLP. `std` is `--init-method-std`. The laws stand in the sharding
    table; a test holds this one against it. A parameter's values depend on `seed` and its name alone: they
    are drawn on the CPU in fp32 from a generator of its own, whatever the device, the dtype or the layout,
    and the run's own random state is left as it was. A parameter that is held in part (`tiles`, by name) is
    drawn whole and cut; padding is 0. Experts are drawn one by one.
    """
    table = rules(config)
    stds = {"normal": std, "scaled_normal": std / math.sqrt(2 * config.num_hidden_layers)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only is None or name in only:
                tile = tiles[name] if tiles is not None else None
                _fill_(_held(parameter), table[pattern_of(name)], stds, seed, name, tile)


def _fill_(held: Tensor, rule: ParamRule, stds: Mapping[str, float], seed: int, name: str, tile: Tile | None) -> None:
    if rule.init == "uniform":
        draw_ = _draw_experts_ if rule.is_expert else _draw_
        draw_(held, rule.shape, _uniform(rule.shape[-1] ** -0.5), seed, name, tile)
    elif rule.init in stds:
        draw_ = _draw_experts_ if rule.is_expert else _draw_
        draw_(held, rule.shape, _normal(stds[rule.init]), seed, name, tile)
    else:
        held.fill_(1.0 if rule.init == "ones" else 0.0)


_Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _normal(std: float) -> _Draw:
    return lambda shape, generator: torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


def _uniform(bound: float) -> _Draw:
    return lambda shape, generator: torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


def _draw_(held: Tensor, shape: tuple[int, ...], draw: _Draw, seed: int, name: str, tile: Tile | None) -> None:
    generator = torch.Generator("cpu").manual_seed(_seed_of(seed, name))
    values = draw(shape, generator)
    if tile is None:
        held.copy_(values)
    else:
        held.zero_()[tile.local_index()] = values[tile.index()].to(held)


def _draw_experts_(held: Tensor, shape: tuple[int, ...], draw: _Draw, seed: int, name: str, tile: Tile | None) -> None:
    """Expert by expert, each from a generator of its own, so that a rank draws its own experts alone."""
    first, stop = (0, shape[0]) if tile is None else (tile.start[0], tile.stop[0])
    inside = (slice(None), slice(None)) if tile is None else tile.index()[1:]
    for expert in range(first, stop):
        generator = torch.Generator("cpu").manual_seed(_seed_of(seed, f"{name}.{expert}"))
        values = draw(shape[1:], generator)
        held[expert - first].copy_(values[inside])


def _held(parameter: nn.Parameter) -> Tensor:
    """This process's part, where a parameter is shared out; `tiles` then speak of that part."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
