"""megatron-core's own GPTModel, given our weights and tokens, has our loss."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.transformer import Transformer
from tests.parallel.processes import run

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

RAW: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 1000000.0,
}


class _NoStates:
    """Megatron forks the random state of an accelerator around dropout, which is off here."""

    def fork(self, *_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True


def build_megatron(config: ModelConfig) -> torch.nn.Module:
    """A GPTModel of the same shape, on the CPU."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random as streams
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel()
    streams.initialize_rng_tracker()
    streams._CUDA_RNG_STATE_TRACKER = _NoStates()
    shape = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        ffn_hidden_size=config.intermediate_size,
        layernorm_epsilon=config.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        shape,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(config.rope_theta),
    )


def fused(weights: dict[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under Megatron's names: queries, keys and values interleaved by group, gate above up."""
    yield "embedding.word_embeddings.weight", weights["model.embed_tokens.weight"]
    yield "decoder.final_layernorm.weight", weights["model.norm.weight"]
    yield "output_layer.weight", weights["lm_head.weight"]
    for number in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{number}.", f"decoder.layers.{number}."
        yield theirs + "input_layernorm.weight", weights[ours + "input_layernorm.weight"]
        yield theirs + "pre_mlp_layernorm.weight", weights[ours + "post_attention_layernorm.weight"]
        yield theirs + "self_attention.linear_proj.weight", weights[ours + "self_attn.o_proj.weight"]
        yield theirs + "mlp.linear_fc2.weight", weights[ours + "mlp.down_proj.weight"]
        gate, up = (weights[f"{ours}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        yield theirs + "mlp.linear_fc1.weight", torch.cat([gate, up])
        for kind in ("weight", "bias"):
            parts = [weights[f"{ours}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            groups = [part.unflatten(0, (config.num_key_value_heads, -1)) for part in parts]
            yield theirs + f"self_attention.linear_qkv.{kind}", torch.cat(groups, dim=1).flatten(0, 1)


def both_losses() -> tuple[Tensor, Tensor]:
    """The loss of each token: ours, and Megatron's."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]  # asked for by its constructors
    config = ModelConfig.from_hf(RAW)
    ours = Transformer(config)
    initialize_(ours, config, std=0.2, seed=1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs = build_megatron(config)
    weights = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    missing, surplus = theirs.load_state_dict(dict(fused(weights, config)), strict=False)
    assert not surplus and all("extra_state" in name for name in missing), (missing, surplus)
    tokens_BS = torch.randint(0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(2))
    inputs_BS, labels_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
    hidden_from_future = torch.ones(1, 1, 32, 32).tril() < 0.5
    with torch.no_grad():
        expected_BS = theirs(inputs_BS, torch.arange(32).expand(2, 32), hidden_from_future, labels=labels_BS)
        return ours(inputs_BS, labels_BS=labels_BS), expected_BS


def test_megatron_core_has_the_same_loss() -> None:
    ours_BS, theirs_BS = run(1, both_losses)[0]
    torch.testing.assert_close(ours_BS, theirs_BS, rtol=1e-5, atol=1e-6)
    assert theirs_BS.std() > 0.1, "tokens of one loss would compare nothing"
