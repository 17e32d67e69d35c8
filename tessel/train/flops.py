"""Floating-point operations of training, per token: the denominators of throughput and MFU."""

from __future__ import annotations

from dataclasses import dataclass

from tessel.model.config import ModelConfig


@dataclass(frozen=True)
class FlopCount:
    """Training FLOPs per token (forward and backward, no recomputation) by two conventions in use.

    With N parameters that multiply a token (all block matrices and the output head, tied or not; not the
    embedding lookup, norms, biases or routers; of a mixture, the experts that a token goes to), L layers,
    d_q = heads x head_dim and S the sequence length:
    `causal` = 6 N + 6 L d_q S counts the attention that is computed; it is Megatron's formula too
    (num_floating_point_operations, core_v0.12.1; appendix of arXiv 2104.04473, with causal attention halved).
    `palm` = 6 N + 12 L d_q S counts the whole square (PaLM, arXiv 2204.02311, appendix B).
    A sliding window shorter than S is not discounted, in either.
    """

    causal: float
    palm: float


def num_matmul_parameters(model_config: ModelConfig) -> int:
    """Parameters that multiply a token: N in `FlopCount`. Of the experts, those that it goes to; no routers."""
    c = model_config
    q_width = c.num_attention_heads * c.head_dim
    kv_width = c.num_key_value_heads * c.head_dim
    attention = c.hidden_size * (2 * q_width + 2 * kv_width)
    with_experts = sum(c.has_experts(layer) for layer in range(c.num_hidden_layers))
    dense = (c.num_hidden_layers - with_experts) * c.intermediate_size
    seen = c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size
    mlps = 3 * c.hidden_size * (dense + with_experts * seen)
    return c.num_hidden_layers * attention + mlps + c.vocab_size * c.hidden_size


def flops_per_token(model_config: ModelConfig, seq_length: int) -> FlopCount:
    """Training FLOPs per token at a sequence length in tokens."""
    c = model_config
    matmuls = 6.0 * num_matmul_parameters(c)
    attention = 6.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_length
    return FlopCount(causal=matmuls + attention, palm=matmuls + 2 * attention)
