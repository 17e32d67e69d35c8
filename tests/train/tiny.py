"""A tiny model for tests of a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.transformer import Transformer
from tessel.train.optimizer import keep_state, state_by_name

VOCAB_SIZE = 50
CONFIG = ModelConfig.from_hf(
    {
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
)


def build_model() -> Transformer:
    model = Transformer(CONFIG)
    initialize_(model, CONFIG, std=0.2, seed=1)
    return model


@torch.no_grad()
def load_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Put what `state_by_name` gave into an optimizer over the same parameters, as a checkpoint does."""
    own = state_by_name(optimizer)
    assert own.keys() == saved.keys()
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    keep_state(optimizer, own)
