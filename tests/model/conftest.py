"""Pairs of the same tiny random model: transformers' and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from tessel.model.config import ModelConfig
from tessel.model.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "sdpa",
}


class Pair(NamedTuple):
    """The same weights twice; a tied model's `theirs` has the head under the embedding's name alone."""

    theirs: nn.Module
    ours: Transformer
    config: ModelConfig


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture
def pair() -> Callable[..., Pair]:
    """`pair(prefix, seed=0, ours={...}, **config)`: prefix is Qwen2, Qwen3, Llama or Mistral."""

    def make(prefix: str, seed: int = 0, ours: dict[str, Any] | None = None, **overrides: Any) -> Pair:
        defaults: dict[str, Any] = {"sliding_window": None} if prefix == "Mistral" else {}
        if prefix == "Qwen3":
            defaults = {"head_dim": 16}
        hf_config = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **defaults, **overrides})
        theirs = getattr(transformers, f"{prefix}ForCausalLM")(hf_config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                centre = 1.0 if "norm" in name else 0.0
                parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))
        config = ModelConfig.from_hf(hf_config.to_dict())
        model = Transformer(config, **(ours or {}))
        model.load_state_dict(_state(theirs), strict=True)
        return Pair(theirs.train(), model.train(), config)

    return make


@pytest.fixture
def tokens_BS() -> Tensor:
    """Three sequences of 37 random tokens."""
    return torch.randint(0, 307, (3, 37), generator=torch.Generator().manual_seed(5))
