"""Which samples evaluations read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tessel.config.run import Batch, Data, Evaluation, RunConfig
from tessel.data.loader import Loader, MicroBatch
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.transformer import Transformer
from tessel.parallel.peers import Peers
from tessel.parallel.runner import PlainRunner
from tessel.train.evaluation import Evaluator

SHAPE = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = ModelConfig.from_hf({"model_type": "qwen2", "num_key_value_heads": 2, "max_position_embeddings": 8, **SHAPE})


class RecordingLoader:
    """Ten samples; keeps the first sample and the number of samples of every fetch."""

    def __init__(self) -> None:
        self.fetched: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return 10

    def fetch(self, consumed_samples: int, num_samples: int, micro_batch_size: int) -> list[MicroBatch]:
        self.fetched.append((consumed_samples, num_samples))
        tokens_BS = torch.zeros((micro_batch_size, 4), dtype=torch.int64)
        return [MicroBatch(tokens_BS, tokens_BS, torch.ones(tokens_BS.shape), tokens_BS, None)]


@pytest.mark.parametrize(("dataloader_type", "third_start"), [("single", 0), ("cyclic", 8)])
def test_evaluations_go_on_where_the_last_one_ended(dataloader_type: str, third_start: int) -> None:
    """The cyclic order has no end, and shuffles anew: only the single one begins again where it runs out."""
    model = Transformer(CONFIG)
    initialize_(model, CONFIG, std=0.1, seed=0)
    cfg = RunConfig(
        batch=Batch(micro_batch_size=2, global_batch_size=4),
        data=Data(dataloader_type=dataloader_type),
        evaluation=Evaluation(eval_iters=1),
    )
    loader = RecordingLoader()
    learner = cast(Any, SimpleNamespace(parts=(model,), runner=PlainRunner(model), peers=Peers()))
    evaluator = Evaluator(cfg, learner, cast(Loader, loader), None, [], torch.device("cpu"))
    for iteration in range(3):
        evaluator.validate(iteration, 0)
    assert loader.fetched == [(0, 4), (4, 4), (third_start, 4)]
