"""Which mixture of experts Megatron's flags describe, and how a run's router options change a model."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from tessel.config.experts import PRE_SOFTMAX, Experts
from tessel.config.run import ModelShape
from tessel.errors import UsageError
from tessel.model.families import Mixture

_MAX_LAYERS = 10_000


def family_of(shape: ModelShape) -> str:
    """The family of a model from shape flags.

    Raises:
        UsageError: flags that no supported family can express together.
    """
    if shape.num_experts is None:
        return "qwen2" if shape.add_qkv_bias else "qwen3" if shape.qk_layernorm else "llama"
    if shape.moe_shared_expert_intermediate_size is not None:
        if shape.qk_layernorm:
            raise UsageError(
                "--moe-shared-expert-intermediate-size and --qk-layernorm together fit no supported family; leave one "
                "of them out."
            )
        if not shape.moe_shared_expert_gate:
            raise UsageError(
                "--moe-shared-expert-intermediate-size needs --moe-shared-expert-gate: the shared expert of every "
                "supported family has a gate."
            )
        return "qwen2_moe"
    if shape.qk_layernorm:
        return "qwen3_moe"
    if shape.add_qkv_bias:
        raise UsageError(
            "--num-experts with --add-qkv-bias fits Qwen2-MoE alone, which has a shared expert; give "
            "--moe-shared-expert-intermediate-size and --moe-shared-expert-gate, or leave --add-qkv-bias out."
        )
    return "mixtral"


def experts_from_shape(shape: ModelShape, family: str, num_layers: int, inner: int) -> dict[str, Any]:
    """The fields of a ModelConfig that are about experts. `inner` is the width of a dense layer's MLP.

    Raises:
        UsageError: numbers that do not fit each other, or layers that the family cannot mix.
    """
    if shape.num_experts is None:
        return {}
    chosen = 2 if shape.moe_router_topk is None else shape.moe_router_topk
    if chosen > shape.num_experts:
        raise UsageError(f"--moe-router-topk {chosen} is more than --num-experts {shape.num_experts}; lower it.")
    dense = dense_layers(shape, num_layers)
    width = shape.moe_ffn_hidden_size or inner
    if family == "mixtral" and (dense or width != inner):
        raise UsageError(
            "Dense layers beside layers with experts, or --moe-ffn-hidden-size other than --ffn-hidden-size, need "
            "--qk-layernorm (Qwen3-MoE) or --moe-shared-expert-intermediate-size (Qwen2-MoE)."
        )
    return {
        "num_experts": shape.num_experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size or 0,
        "dense_layers": dense,
    }


def dense_layers(shape: ModelShape, num_layers: int) -> tuple[int, ...]:
    """The layers that `--moe-layer-freq` and `--first-k-dense-replace` leave without experts.

    Raises:
        UsageError: the pattern is none, or has another number of layers.
    """
    text = "1" if shape.moe_layer_freq is None else shape.moe_layer_freq
    pattern = _pattern(text)
    if isinstance(pattern, int):
        # MindSpeed's -1: every layer after the first dense ones.
        step = max(pattern, 1)
        pattern = [int(layer % step == 0) for layer in range(num_layers)]
    if len(pattern) != num_layers:
        raise UsageError(
            f"--moe-layer-freq {text} is about {len(pattern)} layers, and the model has {num_layers}; give one entry "
            "for each layer."
        )
    first = max(shape.first_k_dense_replace or 0, 0)
    return tuple(layer for layer, has_experts in enumerate(pattern) if layer < first or not has_experts)


def _pattern(text: str) -> int | list[int]:
    """A number, or a list of 0 and 1 written with brackets, + and *, as Megatron takes it."""
    wrong = UsageError(
        f"--moe-layer-freq is {text!r}: it must be a whole number, or a list of 0 and 1 such as [0]*1+[1]*23."
    )
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise wrong from error
    if isinstance(value, list) and set(value) <= {0, 1}:
        return value
    if isinstance(value, int) and (value == -1 or value >= 1):
        return value
    raise wrong


def _value(node: ast.expr) -> Any:
    """The value of an expression of whole numbers, lists, + and *; nothing else is evaluated."""
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < _MAX_LAYERS:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _value(node.left) + _value(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _value(node.left), _value(node.right)
        if _extent(left) * _extent(right) > _MAX_LAYERS:
            raise ValueError("too long")
        return left * right
    raise ValueError("not a list of numbers")


def _extent(value: int | list[int]) -> int:
    return len(value) if isinstance(value, list) else abs(value)


def flags_of_experts(config: Mixture) -> dict[str, Any]:
    """What the shape flags about experts would have to say to describe the model, but for `--moe-layer-freq`."""
    if not config.num_experts:
        return {"num_experts": None}
    return {
        "num_experts": config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size or None,
        "norm_topk_prob": config.norm_topk_prob,
    }


def router_changes(config: Mixture, experts: Experts, given: frozenset[str] | set[str]) -> dict[str, Any]:
    """The fields of a ModelConfig that a run's options change; see `ModelConfig.with_router_options`.

    Raises:
        UsageError: options that do not go together, or that are about experts which the model lacks.
    """
    asked = sorted(given & {field.name for field in dataclasses.fields(Experts)})
    if not config.num_experts:
        idle = {"moe_token_dispatcher_type", "moe_router_load_balancing_type"}
        wrong = ["--" + name.replace("_", "-") for name in asked if name not in idle and getattr(experts, name)]
        if wrong:
            raise UsageError(f"{' '.join(wrong)}: the model has no experts; leave that out.")
        return {}
    changes: dict[str, Any] = {}
    if experts.moe_router_score_function is not None:
        changes["scoring_func"] = experts.moe_router_score_function
    if experts.moe_router_topk_scaling_factor is not None:
        changes["routed_scaling_factor"] = experts.moe_router_topk_scaling_factor
    # A model from flags has no config.json that could know better than MindSpeed's names.
    by_name = experts.moe_router_load_balancing_type in PRE_SOFTMAX and not config.raw
    scoring = changes.get("scoring_func", config.scoring_func)
    # A sigmoid's scores are always divided by their sum, as in Megatron.
    if (experts.moe_router_pre_softmax or by_name) and "norm_topk_prob" not in given and scoring == "softmax":
        changes["norm_topk_prob"] = False
    if experts.moe_router_enable_expert_bias and scoring != "sigmoid":
        raise UsageError(
            "--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid: add it, as Megatron asks, too."
        )
    return changes


def beyond_the_family(config: Mixture) -> list[str]:
    """How a model's tokens are routed otherwise than transformers routes those of its family."""
    ways = []
    if config.scoring_func != "softmax":
        ways.append("sigmoid scores")
    if config.routed_scaling_factor != 1.0:
        ways.append("a factor on the experts' weights")
    if config.expert_bias is not None:
        ways.append("a bias of the choice")
    if config.family == "mixtral" and not config.norm_topk_prob:
        ways.append("weights that do not add up to 1")
    return ways
