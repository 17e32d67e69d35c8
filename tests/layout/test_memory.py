"""Predicted bytes against those that the tensors of a real step take."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from tessel.config.run import Optimizer
from tessel.data.loader import MicroBatch
from tessel.layout.activations import ON_CPU, ON_DEVICE
from tessel.layout.choice import Choice, RecomputeChoice, chunks_in_flight
from tessel.layout.memory import MemoryModel
from tessel.layout.search import spread
from tessel.layout.sharding import parameters
from tessel.layout.tiles import tile_of
from tessel.layout.topology import Topology
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.recompute import Recompute
from tessel.model.transformer import Transformer
from tessel.parallel.apply import Sharding, shard
from tessel.parallel.runner import PlainRunner
from tessel.runtime.process import mesh_of_one
from tessel.train.optimizer import build_optimizer, parameter_groups
from tests.layout.accounting import Measured, measure

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
    "qwen3": {
        "vocab_size": 2000, "hidden_size": 384, "intermediate_size": 640, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 256, "norm_topk_prob": True,
    },
}  # fmt: skip
SEQ_LENGTH, NUM_MICRO_BATCHES = 256, 2
RECOMPUTE: dict[str, Recompute | None] = {
    "none": None,
    "selective": Recompute("selective"),
    "mlp": Recompute("selective", modules=frozenset({"mlp", "moe"})),
    "full": Recompute("full", "uniform", 1),
}


def config_of(family: str) -> ModelConfig:
    return ModelConfig.from_hf({"model_type": family, "max_position_embeddings": 4096, **MODELS[family]})


def choice_of(config: ModelConfig, recompute: RecomputeChoice = "none", compute_bytes: int = 4) -> Choice:
    return Choice(
        Topology(), (config.num_hidden_layers,), SEQ_LENGTH, 1, NUM_MICRO_BATCHES,
        recompute=recompute, compute_bytes=compute_bytes,
    )  # fmt: skip


def measured(config: ModelConfig, recompute: str, bf16: bool) -> Measured:
    """A step on this process, as `tessel pretrain` takes it."""
    model = Transformer(config, recompute=RECOMPUTE[recompute])
    initialize_(model, config, std=0.02, seed=1)
    tokens_BS = torch.randint(0, config.vocab_size, (1, SEQ_LENGTH))
    batch = MicroBatch(tokens_BS, tokens_BS, torch.ones(1, SEQ_LENGTH), torch.arange(SEQ_LENGTH)[None], None)
    with contextlib.ExitStack() as stack:
        if bf16:
            mesh = stack.enter_context(mesh_of_one(torch.device("cpu")))
            shard(model, Sharding(mesh, mesh, torch.bfloat16))
        groups = parameter_groups(model.named_parameters(), config, Optimizer(lr=1e-3))
        optimizer = build_optimizer(groups, Optimizer(lr=1e-3))
        runner = PlainRunner(model)

        def train(number: int) -> None:
            runner.train([batch] * number, [batch.loss_mask_BS] * number)

        return measure([model], optimizer, train, NUM_MICRO_BATCHES)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("family", MODELS)
def test_prediction_and_tensors_agree(family: str, recompute: RecomputeChoice, bf16: bool) -> None:
    config = config_of(family)
    found = measured(config, recompute, bf16)
    predicted = MemoryModel(config, ON_CPU).of_rank(choice_of(config, recompute, 2 if bf16 else 4))
    assert (predicted.parameters, predicted.gradients) == (found.parameters, found.gradients)
    assert predicted.optimizer == found.optimizer - 4 * len(parameters(config))  # a step counter for each
    assert predicted.activations == pytest.approx(found.activations, rel=0.02)
    assert predicted.peak == pytest.approx(found.peak, rel=0.1)
    # Beyond what is there anyway, where errors cannot hide behind weights and moments.
    held = predicted.parameters + predicted.optimizer
    assert predicted.peak - held == pytest.approx(found.peak - held, rel=0.15)


@pytest.mark.parametrize(
    "topology",
    [
        Topology(),
        Topology(4, tp=4),
        Topology(8, tp=2, pp=2, cp=2),
        Topology(8, tp=2, ep=4),
        Topology(8, tp=2, pp=2, ep=2, etp=2),
    ],
    ids=Topology.describe,
)
@pytest.mark.parametrize("family", MODELS)
def test_elements_of_all_stages_are_those_of_the_table(family: str, topology: Topology) -> None:
    config = config_of(family)
    if not config.num_experts:
        topology = replace(topology, ep=1, etp=1)
    model = MemoryModel(config)
    layers = spread(config.num_hidden_layers, topology.pp)
    choice = replace(choice_of(config), topology=topology, layers=layers, sequence_parallel=topology.tp > 1)
    predicted = sum(model.of_rank(choice, rank).parameters for rank in range(topology.pp))
    counted = 0
    for name, rule in parameters(config).items():
        tile = tile_of(rule, topology, topology.place(0))
        copies = 2 if topology.pp > 1 and config.tie_word_embeddings and name == "model.embed_tokens.weight" else 1
        counted += copies * torch.Size(tile.local_shape).numel()
    assert predicted == 4 * counted


def test_every_axis_takes_its_part_off() -> None:
    config = replace(config_of("qwen2"), num_hidden_layers=8)
    model = MemoryModel(config)
    base = replace(choice_of(config, compute_bytes=2), global_batch_size=16, topology=Topology(4), seq_length=1024)
    one = model.of_rank(base)
    sharded = model.of_rank(replace(base, sharding_strategy="optim_grads_params"))
    assert sharded.parameters * 4 == one.parameters and sharded.gradients * 4 == one.gradients
    assert sharded.gathered < one.gathered and sharded.activations == one.activations
    # Once a step is summed over replicas, gradients are whole until then.
    assert model.of_rank(replace(base, sharding_strategy="optim")).gradients == one.gradients
    split = model.of_rank(replace(base, topology=Topology(4, tp=2), sequence_parallel=True))
    assert one.activations / 2.2 < split.activations < one.activations / 1.6
    assert model.of_rank(replace(base, topology=Topology(4, cp=4))).activations * 4 == one.activations
    by_recompute = [model.of_rank(replace(base, recompute=r)).activations for r in ("none", "selective", "mlp", "full")]
    assert by_recompute == sorted(by_recompute, reverse=True) and len(set(by_recompute)) == 4
    copies = replace(base, sharding_strategy="optim", copies=2)
    assert model.of_rank(copies).parameters * 2 == one.parameters


def test_kernels_that_fuse_norms_keep_less() -> None:
    config = config_of("qwen3")
    choice = choice_of(config, compute_bytes=2)
    assert (
        MemoryModel(config, ON_DEVICE).of_rank(choice).activations
        < MemoryModel(config, ON_CPU).of_rank(choice).activations
    )


@pytest.mark.parametrize(
    ("pp", "chunks", "num_micro_batches"), [(2, 1, 8), (4, 1, 8), (4, 1, 2), (2, 2, 4), (4, 2, 8), (4, 3, 8), (2, 2, 2)]
)
def test_micro_batches_in_flight_are_those_of_torchs_schedules(pp: int, chunks: int, num_micro_batches: int) -> None:
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    config = replace(config_of("qwen2"), num_hidden_layers=pp * chunks)
    choice = replace(
        choice_of(config), topology=Topology(pp, pp=pp), layers=(chunks,) * pp, num_chunks=chunks,
        global_batch_size=num_micro_batches,
    )  # fmt: skip
    if chunks == 1 and num_micro_batches < pp:
        expected = [min(pp - rank, num_micro_batches) for rank in range(pp)]  # torch's own has no such schedule
    else:
        name = "1F1B" if chunks == 1 else "Interleaved1F1B"
        orders = get_schedule_ops(name, pp, num_micro_batches, chunks, add_spacing=False)
        expected = [_most_in_flight(order) for order in orders]
    assert [chunks_in_flight(choice, rank) for rank in range(pp)] == expected


def _most_in_flight(order: list[Any]) -> int:
    alive = most = 0
    for action in order:
        name = action.computation_type.name if action is not None else ""
        alive += {"FORWARD": 1, "FULL_BACKWARD": -1}.get(name, 0)
        most = max(most, alive)
    return most


def test_the_fullest_rank_is_found() -> None:
    config = replace(config_of("qwen2"), num_hidden_layers=10)
    model = MemoryModel(config)
    choice = replace(
        choice_of(config, compute_bytes=2), topology=Topology(4, pp=4), layers=spread(10, 4), global_batch_size=16
    )
    assert choice.layers == (2, 3, 3, 2)
    peaks = [model.of_rank(choice, rank).peak for rank in range(4)]
    assert model.worst(choice)[0] == peaks.index(max(peaks))
