"""THE table: how each parameter is cut, summed, decayed, trained and started.

Everything that depends on a parameter's kind is written down in `rules` and nowhere else: the
tensor-parallel modules, the loader that reads only its slice of a file, the distributed checkpoint,
the optimizer's groups, the gradient norm and the initialisation read it. Reading the body of
`rules` answers "how is this model sharded"; the arithmetic on it is in `tiles.py`.

Names are those of the Hugging Face checkpoint; `*` stands for a layer's number. Shapes are those
of the whole, uncut and unpadded parameter, [output features, input features] for a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from tessel.errors import TesselError
from tessel.layout.adapters import AdapterSpec

# How tensor parallelism (tp) cuts a parameter.
#   replicated  every rank holds the whole
#   column      cut along its output features (dim 0), between whole blocks
#   row         cut along its input features (dim 1), between whole blocks
#   vocab       cut along the vocabulary (dim 0) after padding it to a multiple of the degree
Split = Literal["replicated", "column", "row", "vocab"]

# Between which ranks a gradient is only a partial sum after backward. Data and context parallelism
# hold for every parameter and are not listed.
#   tp           each rank saw its own heads only: always, when tp > 1
#   sequence     each rank saw its own tokens only: under --sequence-parallel
#   kv_replicas  the ranks that hold a copy of the same key/value head: when tp > the number of these
#   etp          each rank saw its own features of the experts: always, when expert-tensor-parallel > 1
#   tied_stages  the copies of a tied embedding on the first and on the last pipeline stage
PartialAxis = Literal["tp", "sequence", "kv_replicas", "etp", "tied_stages"]

_PLAIN_MLP = ("gate_proj", "up_proj", "down_proj")

# normal: N(0, std); scaled_normal: N(0, std / sqrt(2 x layers)), for what writes into the residual stream;
# uniform: U(-1, 1) / sqrt(in), of an adapter; row_norms: the lengths of the rows of the weight beside it.
Init = Literal["normal", "scaled_normal", "ones", "zeros", "uniform", "row_norms"]


class DecoderShape(Protocol):
    """What the table needs to know of a model; `tessel.model.config.ModelConfig` is one."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def attention_output_bias(self) -> bool: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def adapters(self) -> AdapterSpec | None: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def shared_expert_intermediate_size(self) -> int: ...
    def has_experts(self, layer: int) -> bool: ...


@dataclass(frozen=True)
class ParamRule:
    """One row of the table.

    `blocks`: along the cut dim, the number of equal pieces that stay whole (heads, features, or
    vocabulary rows); 1 where nothing is cut. `copies_when_short`: more ranks than blocks is allowed,
    and neighbouring ranks then hold the same block. `is_expert`: dim 0 is the expert, which expert
    parallelism cuts, and the other cut is expert-tensor-parallel.
    """

    shape: tuple[int, ...]
    split: Split
    init: Init
    dim: int | None = None
    blocks: int = 1
    copies_when_short: bool = False
    partial_axes: tuple[PartialAxis, ...] = ()
    is_embedding_or_output: bool = False
    is_expert: bool = False

    @property
    def weight_decay(self) -> bool:
        """Megatron's groups: matrices decay; biases and norms (one dimension) do not."""
        return len(self.shape) > 1


def _replicated(shape: tuple[int, ...], init: Init, *partial_axes: PartialAxis) -> ParamRule:
    return ParamRule(shape, "replicated", init, partial_axes=partial_axes)


def _column(shape: tuple[int, ...], blocks: int, init: Init, kv: bool = False) -> ParamRule:
    return ParamRule(shape, "column", init, 0, blocks, kv, ("kv_replicas",) if kv else ())


def _row(shape: tuple[int, int], blocks: int) -> ParamRule:
    return ParamRule(shape, "row", "scaled_normal", 1, blocks)


def _vocab(config: DecoderShape, *partial_axes: PartialAxis) -> ParamRule:
    shape = (config.vocab_size, config.hidden_size)
    return ParamRule(shape, "vocab", "normal", 0, shape[0], False, partial_axes, is_embedding_or_output=True)


def _expert(config: DecoderShape, split: Literal["column", "row"]) -> ParamRule:
    """One matrix of every expert, stacked: ep cuts dim 0, etp the features inside the experts."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if split == "column":
        return ParamRule((config.num_experts, inner, hidden), "column", "normal", 1, inner, is_expert=True)
    return ParamRule((config.num_experts, hidden, inner), "row", "scaled_normal", 2, inner, is_expert=True)


def _mixture(config: DecoderShape, mlp: str) -> dict[str, ParamRule]:
    """The rows of a layer with experts. Its router and gates see each rank's own tokens alone."""
    hidden, shared = config.hidden_size, config.shared_expert_intermediate_size
    table = {
        mlp + "gate.weight": _replicated((config.num_experts, hidden), "normal", "sequence"),
        mlp + "experts.gate_proj": _expert(config, "column"),
        mlp + "experts.up_proj": _expert(config, "column"),
        mlp + "experts.down_proj": _expert(config, "row"),
    }
    if shared:
        table[mlp + "shared_expert.gate_proj.weight"] = _column((shared, hidden), shared, "normal")
        table[mlp + "shared_expert.up_proj.weight"] = _column((shared, hidden), shared, "normal")
        table[mlp + "shared_expert.down_proj.weight"] = _row((hidden, shared), shared)
        table[mlp + "shared_expert_gate.weight"] = _replicated((1, hidden), "normal", "sequence")
    return table


def _adapters(table: dict[str, ParamRule], spec: AdapterSpec) -> dict[str, ParamRule]:
    """The rows of low-rank adapters: what touches the cut dim of a weight is cut as it is; the rest sees a part."""
    rows: dict[str, ParamRule] = {}
    for pattern, rule in table.items():
        module, _, leaf = pattern.rpartition(".")
        projection = module.rpartition(".")[2]
        if rule.is_expert and spec.experts and spec.owner(leaf) is not None:
            rows |= _expert_adapter(f"{module}.lora.{leaf}", rule, spec.rank, spec.owner(leaf) == leaf)
        if leaf != "weight" or rule.split not in ("column", "row") or spec.owner(projection) is None:
            continue
        out, inner = rule.shape[-2:]
        is_column = rule.split == "column"
        if spec.owner(projection) == projection:
            a = ParamRule((spec.rank, inner), rule.split, "uniform", rule.dim, rule.blocks)
            rows[module + ".lora.A"] = _replicated((spec.rank, inner), "uniform", "tp") if is_column else a
        if spec.dora:
            lengths = replace(rule, shape=(out,), init="row_norms")
            rows[module + ".lora.magnitude"] = lengths if is_column else _replicated((out,), "row_norms", "tp")
        b = replace(rule, shape=(out, spec.rank), init="zeros")
        rows[module + ".lora.B"] = b if is_column else _replicated((out, spec.rank), "zeros", "tp")
    return rows


def _expert_adapter(name: str, rule: ParamRule, rank: int, owns_a: bool) -> dict[str, ParamRule]:
    """The rows of every expert's adapter beside one matrix: what touches the cut features is cut as they are."""
    experts, out, inner = rule.shape
    whole = ParamRule((), "replicated", "zeros", partial_axes=("etp",), is_expert=True)
    is_column = rule.split == "column"
    a = replace(whole if is_column else rule, shape=(experts, rank, inner), init="uniform")
    b = replace(rule if is_column else whole, shape=(experts, out, rank), init="zeros")
    return {name + ".A": a, name + ".B": b} if owns_a else {name + ".B": b}


def rules(config: DecoderShape) -> dict[str, ParamRule]:
    """The table of a model: name pattern -> rule. A layer has the rows of a plain MLP, or those of a mixture."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = "model.layers.*."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    tied = config.tie_word_embeddings
    with_experts = [config.has_experts(number) for number in range(config.num_hidden_layers)]

    table = {
        "model.embed_tokens.weight": _vocab(config, "tied_stages") if tied else _vocab(config),
        layer + "input_layernorm.weight": _replicated((hidden,), "ones", "sequence"),
        attention + "q_proj.weight": _column((heads * head, hidden), heads, "normal"),
        attention + "k_proj.weight": _column((kv_heads * head, hidden), kv_heads, "normal", kv=True),
        attention + "v_proj.weight": _column((kv_heads * head, hidden), kv_heads, "normal", kv=True),
        attention + "o_proj.weight": _row((hidden, heads * head), heads),
        layer + "post_attention_layernorm.weight": _replicated((hidden,), "ones", "sequence"),
        "model.norm.weight": _replicated((hidden,), "ones", "sequence"),
    }
    if not all(with_experts):
        table[mlp + "gate_proj.weight"] = _column((inner, hidden), inner, "normal")
        table[mlp + "up_proj.weight"] = _column((inner, hidden), inner, "normal")
        table[mlp + "down_proj.weight"] = _row((hidden, inner), inner)
    if any(with_experts):
        table |= _mixture(config, mlp)
    if not tied:
        table["lm_head.weight"] = _vocab(config)
    if config.attention_bias:
        table[attention + "q_proj.bias"] = _column((heads * head,), heads, "zeros")
        table[attention + "k_proj.bias"] = _column((kv_heads * head,), kv_heads, "zeros", kv=True)
        table[attention + "v_proj.bias"] = _column((kv_heads * head,), kv_heads, "zeros", kv=True)
    if config.attention_output_bias:
        # Added once, after the ranks' products are summed.
        table[attention + "o_proj.bias"] = _replicated((hidden,), "zeros", "sequence")
    if config.qk_norm:
        table[attention + "q_norm.weight"] = _replicated((head,), "ones", "tp")
        table[attention + "k_norm.weight"] = _replicated((head,), "ones", "tp")
    if config.mlp_bias:
        table[mlp + "gate_proj.bias"] = _column((inner,), inner, "zeros")
        table[mlp + "up_proj.bias"] = _column((inner,), inner, "zeros")
        table[mlp + "down_proj.bias"] = _replicated((hidden,), "zeros", "sequence")
    return table if config.adapters is None else table | _adapters(table, config.adapters)


def pattern_of(name: str) -> str:
    """The table's pattern for a parameter's name: layer numbers become `*`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _is_in_layer(pattern: str, config: DecoderShape, layer: int) -> bool:
    """Whether a layer has this row: a plain MLP has none of a mixture, and the other way round."""
    if ".mlp." not in pattern:
        return True
    return (pattern.split(".mlp.")[1].split(".")[0] not in _PLAIN_MLP) == config.has_experts(layer)


def parameters(config: DecoderShape) -> dict[str, ParamRule]:
    """Every parameter of the model by its full name, layer by layer, with its rule."""
    expanded: dict[str, ParamRule] = {}
    table = rules(config)
    for number in range(config.num_hidden_layers):
        for pattern, rule in table.items():
            if "*" in pattern and _is_in_layer(pattern, config, number):
                expanded[pattern.replace("*", str(number))] = rule
    return {**{pattern: rule for pattern, rule in table.items() if "*" not in pattern}, **expanded}


def rule_of(name: str, config: DecoderShape) -> ParamRule:
    """The rule of one parameter.

    Raises:
        TesselError: the model has no such parameter.
    """
    table = rules(config)
    rule = table.get(pattern_of(name))
    layers = [int(part) for part in name.split(".") if part.isdigit()]
    if rule is None or any(
        layer >= config.num_hidden_layers or not _is_in_layer(pattern_of(name), config, layer) for layer in layers
    ):
        raise TesselError(
            f"{name}: the sharding table has no such parameter; a model of {config.num_hidden_layers} layers of this "
            f"family has {', '.join(table)}."
        )
    return rule
