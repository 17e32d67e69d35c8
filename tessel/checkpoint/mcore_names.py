"""THE table of Megatron-core's names: which tensors a rank's part of a model has, and what lies in each.

A tensor may go by several names, as layers are fused or not: each place in the model is a `Slot`, whose
variants are the ways it can be stored. A reader takes the variant that it finds, a writer the one it wants.

    local      Megatron's own layers; experts one by one, as mlp.experts.local_experts.J
    te         a norm inside Transformer Engine's linear_qkv
    te_mlp     a norm inside its linear_fc1, in a layer with a plain MLP
    te_moe     the same name in a layer with experts: torch_dist's way of the local layers; never written here
    gemm       all experts of the rank in mlp.experts.weight1 and weight2
    te_gemm    experts in mlp.experts.linear_fc1.weightJ and linear_fc2.weightJ
    stacked    all experts in mlp.experts.experts.linear_fc1.weight and linear_fc2.weight: torch_dist's way
    singleton  torch_dist's other way: mlp.experts.experts.J.linear_fc1.weight

Within a variant, and from slot to slot, tensors come in the order of Megatron's named_parameters().
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tessel.checkpoint.fused import Fused, Rows, alone, fuse, gate_up_rows, qkv_rows
from tessel.errors import UsageError
from tessel.layout.sharding import ParamRule, parameters
from tessel.layout.tiles import Tile, tile_of
from tessel.layout.topology import Place, Topology
from tessel.model.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EMBEDDING_KEY = "embedding.word_embeddings.weight"
HEAD_KEY = "output_layer.weight"
FINAL_NORM_KEY = "decoder.final_layernorm.weight"

Variant = Literal["local", "te", "te_mlp", "te_moe", "gemm", "te_gemm", "stacked", "singleton"]
Gemm = Literal["first", "second"]


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. With `gemm` the fused tensor is stored as one grouped matrix (`fused.gemm_of_experts`)."""

    key: str
    fused: Fused
    gemm: Gemm | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters it holds something of."""
        return tuple(dict.fromkeys(span.parameter for span in self.fused.spans))

    @property
    def is_expert(self) -> bool:
        """Whether it is of experts, which expert parallelism deals out."""
        return ".mlp.experts." in self.fused.spans[0].parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        if self.gemm is None:
            return self.fused.shape
        experts, features_out, features_in = self.fused.shape
        if self.gemm == "first":
            return (features_in, experts * features_out)
        return (experts * features_in, features_out)


Slot = Mapping[Variant, tuple[Entry, ...]]


class Part:
    """What a rank holds of a model: `config` with the vocabulary as it is padded, and where the rank stands."""

    def __init__(self, config: ModelConfig, topology: Topology, place: Place) -> None:
        if config.num_key_value_heads % topology.tp:
            raise UsageError(
                f"--tensor-model-parallel-size {topology.tp} does not divide the {config.num_key_value_heads} "
                "key/value heads, and Megatron's files hold whole query groups: use a divisor of their number."
            )
        self.config = config
        self._rules: Mapping[str, ParamRule] = parameters(config)
        self._topology, self._place = topology, place

    def has(self, name: str) -> bool:
        """Whether the model has such a parameter."""
        return name in self._rules

    def tile(self, name: str) -> Tile:
        """What the rank holds of a parameter."""
        return tile_of(self._rules[name], self._topology, self._place)


def first_slots(part: Part) -> list[Slot]:
    """What the first stage has in front of its layers."""
    return [{"local": (_alone(part, EMBEDDING_KEY, EMBEDDING),)}]


def last_slots(part: Part, is_first: bool) -> list[Slot]:
    """What the last stage has behind its layers; with a tied embedding a copy of it, unless it is the first as well."""
    slots: list[Slot] = [{"local": (_alone(part, FINAL_NORM_KEY, "model.norm.weight"),)}]
    if part.has(HEAD):
        slots.append({"local": (_alone(part, HEAD_KEY, HEAD),)})
    elif not is_first:
        slots.append({"local": (_alone(part, HEAD_KEY, EMBEDDING),)})
    return slots


def layer_slots(part: Part, layer: int, number: int) -> list[Slot]:
    """The slots of a layer of the model that has this `number` in the file."""
    name, key = f"model.layers.{layer}.", f"decoder.layers.{number}."
    attention, mlp = key + "self_attention.", key + "mlp."
    has_experts = part.config.has_experts(layer)
    norm = "post_attention_layernorm.weight"
    slots: list[Slot] = [
        {
            "local": (_alone(part, key + "input_layernorm.weight", name + "input_layernorm.weight"),),
            "te": (_alone(part, attention + "linear_qkv.layer_norm_weight", name + "input_layernorm.weight"),),
        },
        *_optional(part, attention + "linear_proj.", name + "self_attn.o_proj."),
        *_qkv(part, attention + "linear_qkv.", name + "self_attn."),
        *_optional(part, attention + "q_layernorm.", name + "self_attn.q_norm."),
        *_optional(part, attention + "k_layernorm.", name + "self_attn.k_norm."),
        {
            "local": (_alone(part, key + "pre_mlp_layernorm.weight", name + norm),),
            "te_moe" if has_experts else "te_mlp": (_alone(part, mlp + "linear_fc1.layer_norm_weight", name + norm),),
        },
    ]
    if not has_experts:
        return slots + _mlp(part, mlp, name + "mlp.")
    slots.append({"local": (_alone(part, mlp + "router.weight", name + "mlp.gate.weight"),)})
    slots.append(_experts(part, mlp + "experts.", name + "mlp.experts."))
    slots += _optional(part, mlp + "shared_experts.gate_", name + "mlp.shared_expert_gate.")
    return slots + _mlp(part, mlp + "shared_experts.", name + "mlp.shared_expert.")


def _alone(part: Part, key: str, name: str) -> Entry:
    tile = part.tile(name)
    return Entry(key, alone(name, tile.start, tile.size))


def _optional(part: Part, key: str, name: str) -> list[Slot]:
    """The weight and the bias of a module, as far as the model has them."""
    kinds = ("weight", "bias")
    return [{"local": (_alone(part, key + kind, name + kind),)} for kind in kinds if part.has(name + kind)]


def _qkv(part: Part, key: str, name: str) -> list[Slot]:
    config, slots = part.config, []
    head = config.head_dim
    for kind in ("weight", "bias"):
        names = [f"{name}{which}_proj.{kind}" for which in "qkv"]
        if part.has(names[0]):
            keys = part.tile(names[1])
            heads_per_group = config.num_attention_heads // config.num_key_value_heads
            rows = qkv_rows(keys.start[0] // head, keys.size[0] // head, heads_per_group, head)
            slots.append(_joined(part, key + kind, names, rows))
    return slots


def _mlp(part: Part, key: str, name: str) -> list[Slot]:
    slots = []
    for kind in ("weight", "bias"):
        names = [f"{name}{which}_proj.{kind}" for which in ("gate", "up")]
        if part.has(names[0]):
            tile = part.tile(names[0])
            slots.append(_joined(part, f"{key}linear_fc1.{kind}", names, gate_up_rows(tile.start[0], tile.stop[0])))
    return slots + _optional(part, key + "linear_fc2.", name + "down_proj.")


def _joined(part: Part, key: str, names: list[str], rows: list[Rows]) -> Slot:
    tile = part.tile(names[0])
    return {"local": (Entry(key, fuse(names, rows, tile.start, tile.size)),)}


def _experts(part: Part, key: str, name: str) -> Slot:
    """The experts of the rank, numbered from 0 in the file."""
    gate, down = part.tile(name + "gate_proj"), part.tile(name + "down_proj")
    names = [name + "gate_proj", name + "up_proj"]
    rows = gate_up_rows(gate.start[1], gate.stop[1])

    def first(start: int, size: int, drop: int) -> Fused:
        return fuse(names, rows, (start, *gate.start[1:]), (size, *gate.size[1:]), 1, drop)

    def second(start: int, size: int, drop: int) -> Fused:
        return alone(name + "down_proj", (start, *down.start[1:]), (size, *down.size[1:]), drop)

    begin, num_experts = gate.start[0], gate.size[0]
    sequential: list[Entry] = []
    singleton: list[Entry] = []
    numbered: tuple[list[Entry], list[Entry]] = ([], [])
    for number in range(num_experts):
        both = first(begin + number, 1, 1), second(begin + number, 1, 1)
        for which, fused in enumerate(both):
            sequential.append(Entry(f"{key}local_experts.{number}.linear_fc{which + 1}.weight", fused))
            singleton.append(Entry(f"{key}experts.{number}.linear_fc{which + 1}.weight", fused))
            numbered[which].append(Entry(f"{key}linear_fc{which + 1}.weight{number}", fused))
    return {
        "local": tuple(sequential),
        "gemm": (
            Entry(key + "weight1", first(begin, num_experts, 0), "first"),
            Entry(key + "weight2", second(begin, num_experts, 0), "second"),
        ),
        "te_gemm": (*numbered[0], *numbered[1]),
        "stacked": (
            Entry(key + "experts.linear_fc1.weight", first(begin, num_experts, 0)),
            Entry(key + "experts.linear_fc2.weight", second(begin, num_experts, 0)),
        ),
        "singleton": tuple(singleton),
    }
