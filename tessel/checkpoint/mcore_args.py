"""Megatron's saved `args`: which model they describe, and what a written checkpoint says of its own.

MindSpeed's second converter stores the keys of config.json among them, Megatron and MindSpeed's first
converter the flags of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from tessel.checkpoint.stored import StoredModel, Target, name_of
from tessel.config.experts import Experts
from tessel.config.run import ModelShape
from tessel.errors import TesselError
from tessel.model.config import ModelConfig
from tessel.model.families import FAMILIES, require_sizes

# What of a config.json may be found among the args of MindSpeed's second converter.
_HF_KEYS = (
    "architectures attention_bias attention_dropout bos_token_id decoder_sparse_step dtype eos_token_id head_dim "
    "hidden_act hidden_size initializer_range intermediate_size layer_types max_position_embeddings max_window_layers "
    "mlp_bias mlp_only_layers model_type moe_intermediate_size norm_topk_prob num_attention_heads num_experts "
    "num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts pad_token_id qkv_bias rms_norm_eps "
    "rope_scaling rope_theta router_aux_loss_coef shared_expert_intermediate_size sliding_window tie_word_embeddings "
    "torch_dtype use_cache use_sliding_window vocab_size"
).split()
# How a sentence on the vocabulary begins.
OF_VOCABULARY = "The vocabulary is taken"
_POSITIVE = ("hidden_size", "kv_channels", "num_attention_heads", "num_layers", "num_query_groups")
_ROUTER = ("moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor")


def config_of(args: Mapping[str, Any], where: object) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model that `args` describe, and what had to be guessed, in sentences. `where` names them in messages.

    Raises:
        TesselError: they describe none that is known.
    """
    if args.get("model_type") in FAMILIES:
        raw = {key: args[key] for key in _HF_KEYS if key in args}
        try:
            return ModelConfig.from_hf(raw), ()
        except TesselError as error:
            raise TesselError(f"The args in {where}: {error} Give --hf-dir.") from error
    try:
        config = ModelConfig.from_shape(_shape(args))
        router = {name: args[name] for name in _ROUTER if config.num_experts and args.get(name) is not None}
        config = config.with_router_options(Experts(**router), set(router))
    except TesselError as error:
        raise TesselError(
            f"The args in {where} describe no model that can be read: {error} Give its config.json by --hf-dir."
        ) from error
    return config, _guesses(args, config)


def _shape(args: Mapping[str, Any]) -> ModelShape:
    names = {field.name for field in fields(ModelShape)}
    given = {name: args[name] for name in names & args.keys() if args[name] is not None}
    _require_kinds(given | {"layernorm_epsilon": args.get("layernorm_epsilon")})
    given["disable_bias_linear"] = not args.get("add_bias_linear", True)
    if given.get("use_rotary_position_embeddings"):
        given["position_embedding_type"] = "rope"
    if "norm_epsilon" not in given and args.get("layernorm_epsilon") is not None:
        given["norm_epsilon"] = args["layernorm_epsilon"]
    if not given.get("group_query_attention"):
        given.pop("num_query_groups", None)
    if not given.get("use_rope_scaling") and not given.get("rope_scaling_type"):
        given.pop("rope_scaling_factor", None)
    if isinstance(given.get("moe_layer_freq"), int | list):
        given["moe_layer_freq"] = str(given["moe_layer_freq"])
    if args.get("shared_expert_gate"):
        given["moe_shared_expert_gate"] = True
    given.pop("init_from_config", None)
    if "num_layers" in given:
        given["num_layers"] -= len(noop_layers_of(args))  # they are counted in it
    size = args.get("vocab_size")
    if size is not None:
        # A NullTokenizer has one id more than its flag says.
        given["padded_vocab_size"] = size + (args.get("tokenizer_type") == "NullTokenizer")
    given.pop("vocab_size", None)
    return ModelShape(**given)


def _require_kinds(given: Mapping[str, Any]) -> None:
    """Numbers are numbers, and truth values are such.

    Raises:
        TesselError: names the first that is not.
    """
    kinds = {field.name: str(field.type).partition(" |")[0] for field in fields(ModelShape)}
    kinds |= {"layernorm_epsilon": "float", "moe_layer_freq": "str"}
    allowed = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    for name, value in given.items():
        kind = kinds[name]
        is_list = name == "moe_layer_freq" and type(value) in (int, list)
        if value is not None and type(value) not in allowed[kind] and not is_list:
            raise TesselError(f"{name} is {str(value)[:100]!r}, and must be of the kind {kind}.")
        if type(value) is int and value < (name in _POSITIVE) and name != "first_k_dense_replace":
            raise TesselError(f"{name} is {value}, which no model has.")
    require_sizes(given.get("num_layers", 0), given.get("num_experts") or 0)


def noop_layers_of(args: Mapping[str, Any]) -> tuple[int, ...]:
    """MindSpeed's places without a layer, written as text or as a set.

    Raises:
        TesselError: it is something else.
    """
    value = args.get("noop_layers") or ()
    numbers = value.split(",") if isinstance(value, str) else value
    if not isinstance(numbers, list | tuple | set) or not all(str(number).strip().isdecimal() for number in numbers):
        raise TesselError(f"args.noop_layers is {str(value)[:100]!r}: it must be numbers of layers.")
    return tuple(sorted(int(number) for number in numbers))


def _guesses(args: Mapping[str, Any], config: ModelConfig) -> tuple[str, ...]:
    said = [f"The family is taken to be {config.family}, by the args' flags."]
    if "model_type_hf" in args or args.get("rotary_base") is None:
        said.append(
            f"rope_theta is taken to be {config.rope_theta:g}: the tool that wrote the args does not store the model's "
            "own."
        )
    if args.get("vocab_size") is None:
        said.append(f"{OF_VOCABULARY} to have {config.vocab_size} entries, its padding included.")
    elif args.get("tokenizer_type") == "NullTokenizer":
        said.append(
            f"{OF_VOCABULARY} to have {config.vocab_size} entries: args.vocab_size, and the end of documents that "
            "Megatron's NullTokenizer adds; the rest of the rows is padding."
        )
    return tuple(said)


def args_of(config: ModelConfig, target: Target, source: StoredModel, padded_rows: int) -> dict[str, Any]:
    """What is written as `args`: the fields that Megatron's and MindSpeed's readers look at, by each one's names."""
    dtype = target.dtype or source.dtypes[0]
    flags = config.shape_flags() | {"padded_vocab_size": padded_rows, "vocab_size": config.vocab_size}
    flags.pop("disable_bias_linear")
    num_places = config.num_hidden_layers + len(target.noop_layers)
    per_stage = num_places // (target.pp * target.num_chunks) if target.num_chunks > 1 else None
    parallel = {
        "tensor_model_parallel_size": target.tp,
        "pipeline_model_parallel_size": target.pp,
        "expert_model_parallel_size": target.ep,
        "expert_tensor_parallel_size": target.tp if target.etp is None else target.etp,
        "context_parallel_size": 1,
        "data_parallel_size": 1,
        "world_size": target.tp * target.pp,
        "virtual_pipeline_model_parallel_size": target.num_chunks if target.num_chunks > 1 else None,
        "num_layers_per_virtual_pipeline_stage": per_stage,
        "vpp_size": target.num_chunks if target.num_chunks > 1 else None,
        "num_layer_list": _listed(target.layer_list),
        "decoder_first_pipeline_num_layers": target.first,
        "decoder_last_pipeline_num_layers": target.last,
        "noop_layers": _listed(target.noop_layers) if target.noop_layers else None,
        "schedules_method": "dualpipev" if target.placement == "v" else None,
    }
    return {
        **flags,
        **_other_names(config, dtype),
        **parallel,
        "num_layers": num_places,
        "make_vocab_size_divisible_by": divisor_of(target),
        "add_bias_linear": config.attention_output_bias or config.mlp_bias,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "moe_grouped_gemm": target.grouped_gemm,
        "moe_router_pre_softmax": config.num_experts > 0 and not config.norm_topk_prob,
        "moe_router_score_function": config.scoring_func,
        "moe_router_topk_scaling_factor": None if config.routed_scaling_factor == 1.0 else config.routed_scaling_factor,
        "moe_router_enable_expert_bias": config.expert_bias is not None,
        "moe_shared_expert_gate": config.shared_expert_intermediate_size > 0,
        "moe_layer_freq": [int(config.has_experts(layer)) for layer in range(config.num_hidden_layers)]
        if config.dense_layers
        else 1,
        "seq_length": config.max_position_embeddings,
        "init_method_std": config.initializer_range,
        "transformer_impl": "transformer_engine" if target.transformer_engine else "local",
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "iteration": target.iteration or 0,
        "consumed_train_samples": int(source.state.get("consumed_train_samples", 0)),
        "consumed_valid_samples": int(source.state.get("consumed_valid_samples", 0)),
        "ckpt_format": "torch",
    }


def _other_names(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The names that newer Megatrons and MindSpeed's second converter have for the same."""
    names: dict[str, Any] = {
        "layernorm_epsilon": config.rms_norm_eps,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tie_word_embeddings,
        "model_type_hf": config.family,
        "torch_dtype": name_of(dtype),
    }
    if config.num_experts:
        names["moe_intermediate_size"] = config.moe_intermediate_size
        names["num_experts_per_tok"] = config.num_experts_per_tok
    return names


def divisor_of(target: Target) -> int:
    """What the padded vocabulary is a multiple of, per tensor-parallel rank."""
    return target.vocab_divisor or {"mcore": 128, "v1": 1, "v2": 1, "pai": 1}[target.flavour]


def _listed(numbers: tuple[int, ...] | None) -> str | None:
    return None if numbers is None else ",".join(map(str, numbers))
