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


def evaluator_of(
    valid: dict[str, RecordingLoader], test: RecordingLoader | None, sinks: list[Any], **data: Any
) -> Evaluator:
    """An evaluator of one global batch of four samples, over a tiny model."""
    model = Transformer(CONFIG)
    initialize_(model, CONFIG, std=0.1, seed=0)
    cfg = RunConfig(
        batch=Batch(micro_batch_size=2, global_batch_size=4),
        data=Data(**data),
        evaluation=Evaluation(eval_iters=1),
    )
    learner = cast(Any, SimpleNamespace(parts=(model,), runner=PlainRunner(model), peers=Peers()))
    return Evaluator(cfg, learner, cast(dict[str, Loader], valid), cast(Loader, test), sinks, torch.device("cpu"))


@pytest.mark.parametrize(("dataloader_type", "third_start"), [("single", 0), ("cyclic", 8)])
def test_evaluations_go_on_where_the_last_one_ended(dataloader_type: str, third_start: int) -> None:
    """The cyclic order has no end, and shuffles anew: only the single one begins again where it runs out."""
    loader = RecordingLoader()
    evaluator = evaluator_of({"": loader}, None, [], dataloader_type=dataloader_type)
    for iteration in range(3):
        evaluator.validate(iteration, 0)
    assert loader.fetched == [(0, 4), (4, 4), (third_start, 4)]


class RecordingSink:
    """Keeps the names of the figures of every row."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, list[str]]] = []

    def log(self, values: dict[str, float], iteration: int, consumed_samples: int, kind: str) -> None:
        self.rows.append((kind, list(values)))


def test_several_validation_sets_have_a_loss_each(capsys: pytest.CaptureFixture[str]) -> None:
    valid, sink = {"-wiki": RecordingLoader(), "-1": RecordingLoader()}, RecordingSink()
    evaluator = evaluator_of(valid, RecordingLoader(), [sink])
    evaluator.resume(1)
    evaluator.validate(3, 12)
    assert [loader.fetched for loader in valid.values()] == [[(4, 4)], [(4, 4)]]
    figures = [name for suffix in valid for name in (f"lm loss validation{suffix}", f"lm loss validation{suffix} ppl")]
    assert sink.rows == [("validation", figures)]
    evaluator.final(5, 20)
    assert [kind for kind, _ in sink.rows[1:]] == ["final_validation", "test"]
    assert sink.rows[2][1] == ["lm loss test", "lm loss test ppl"]
    lines = [line.split(" lm loss")[0] for line in capsys.readouterr().out.splitlines() if " loss at " in line]
    assert lines == [
        " validation-wiki loss at iteration 3 |",
        " validation-1 loss at iteration 3 |",
        " validation-wiki loss at iteration 5 on validation set |",
        " validation-1 loss at iteration 5 on validation set |",
        " validation loss at iteration 5 on test set |",
    ]
