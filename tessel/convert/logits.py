"""Two stored models on the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from tessel.checkpoint.fill import fill_model
from tessel.checkpoint.stored import StoredModel
from tessel.model.transformer import Transformer

_NUM_TOKENS = 32


def largest_difference(first: StoredModel, second: StoredModel) -> float:
    """The largest difference of their logits, in fp32 on the CPU; one model is in memory at a time."""
    return float((logits_of(first) - logits_of(second)).abs().max())


@torch.no_grad()
def logits_of(stored: StoredModel) -> Tensor:
    """Logits of a prompt that is the same for every model of this vocabulary: [1, 32, vocabulary], fp32."""
    with torch.device("meta"):
        model = Transformer(stored.config)
    fill_model(model, stored.tensors)
    generator = torch.Generator().manual_seed(0)
    length = min(_NUM_TOKENS, stored.config.max_position_embeddings)
    tokens_BS = torch.randint(0, stored.config.vocab_size, (1, length), generator=generator)
    logits: Tensor = model.eval()(tokens_BS)
    return logits.float()
