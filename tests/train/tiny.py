"""A tiny model for tests of a step."""

from __future__ import annotations

from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.transformer import Transformer

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
