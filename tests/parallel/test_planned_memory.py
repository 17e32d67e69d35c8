"""Memory that `tessel plan` predicts for a rank, against what the rank's tensors take in a step, layout by layout."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from tessel.config.layout_rules import sharding_strategy_of
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.config.validate import validate
from tessel.layout.activations import ON_CPU
from tessel.layout.choice import Choice
from tessel.layout.memory import Memory, MemoryModel
from tessel.layout.search import spread
from tessel.model.config import ModelConfig
from tessel.train.checks import check_layout
from tests.layout.accounting import Measured
from tests.layout.test_memory import SEQ_LENGTH, config_of
from tests.parallel.processes import run

NUM_MICRO_BATCHES = 4


class Case(NamedTuple):
    """Flags, processes, and the model."""

    flags: str
    world_size: int = 2
    family: str = "qwen2"
    num_layers: int = 2


SHARED = "--data-parallel-sharding-strategy optim_grads"
CASES = {
    "DP2 optim": Case("--data-parallel-sharding-strategy optim"),
    "DP2 all": Case("--data-parallel-sharding-strategy optim_grads_params"),
    "TP2 SP": Case("--tensor-model-parallel-size 2 --sequence-parallel", family="qwen3"),
    "PP2": Case("--pipeline-model-parallel-size 2"),
    "PP2 VPP2": Case("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", num_layers=4),
    "CP2": Case(f"--context-parallel-size 2 {SHARED}"),
    "EP2": Case(f"--expert-model-parallel-size 2 {SHARED}", family="qwen3_moe"),
    "TP2 PP2": Case("--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2", 4),
}


def model_of(case: Case) -> ModelConfig:
    return replace(config_of(case.family), num_hidden_layers=case.num_layers)


def config_for(case: Case) -> RunConfig:
    argv = f"--load m --data-path d --lr 1e-3 --train-iters 1 --seq-length {SEQ_LENGTH} --bf16 {case.flags}".split()
    batch = str(NUM_MICRO_BATCHES * case.world_size)
    return validate(parse(RunConfig, [*argv, "--global-batch-size", batch], "tessel pretrain").value)


def on_rank(case: Case) -> tuple[int, Measured]:
    """(pipeline rank, what its tensors take) of the learner that `tessel pretrain` builds."""
    from tessel.data.loader import MicroBatch
    from tessel.train.setup import build_learner, groups_of
    from tessel.train.source import Kind, Source
    from tests.layout.accounting import measure

    cfg, config, device = config_for(case), model_of(case), torch.device("cpu")
    groups = groups_of(cfg, check_layout(cfg, config, case.world_size), config, device)
    assert groups is not None
    tokens_BS = torch.arange(SEQ_LENGTH)[None] % config.vocab_size
    batch = MicroBatch(tokens_BS, tokens_BS, torch.ones(1, SEQ_LENGTH), torch.arange(SEQ_LENGTH)[None], None)
    with contextlib.ExitStack() as stack:
        learner = build_learner(cfg, config, Source(Kind.RANDOM, None, None, None), device, groups, stack)

        def train(count: int) -> None:
            learner.runner.train([batch] * count, [batch.loss_mask_BS] * count)

        return groups.place.pp, measure(learner.parts, learner.optimizer, train, NUM_MICRO_BATCHES)


def planned(case: Case, pp_rank: int) -> Memory:
    cfg, config = config_for(case), model_of(case)
    topology = check_layout(cfg, config, case.world_size)
    choice = Choice(
        topology, spread(config.num_hidden_layers, topology.pp), SEQ_LENGTH, 1, NUM_MICRO_BATCHES * topology.dp,
        sequence_parallel=cfg.layout.sequence_parallel, sharding_strategy=sharding_strategy_of(cfg.layout),
        num_chunks=cfg.layout.num_virtual_stages_per_pipeline_rank or 1,
    )  # fmt: skip
    return MemoryModel(config, ON_CPU).of_rank(choice, pp_rank)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_takes_what_is_planned(name: str) -> None:
    case = CASES[name]
    for pp_rank, measured in run(case.world_size, on_rank, case):
        plan = planned(case, pp_rank)
        assert plan.parameters == pytest.approx(measured.parameters, rel=0.01)
        assert plan.optimizer == pytest.approx(measured.optimizer, rel=0.01)
        assert plan.peak == pytest.approx(measured.peak, rel=0.1)
