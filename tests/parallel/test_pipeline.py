"""Pipelines: the numbers of one process by every schedule, the published orders, memory and bytes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from tessel.config.layout import Layout
from tessel.data.loader import MicroBatch
from tessel.errors import UsageError
from tessel.layout.asked import stages_asked
from tessel.layout.stages import Stages
from tessel.layout.topology import Topology
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.stage import keep_stage
from tessel.model.transformer import Recompute, Transformer
from tessel.parallel.apply import Sharding, release_gathered, shard
from tessel.parallel.groups import Groups, build_groups
from tessel.parallel.pipeline import PipelineRunner
from tessel.parallel.runner import PlainRunner
from tests.parallel.processes import run

SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LOOPED = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {"pipeline_model_parallel_size": 2},
    "interleaved": LOOPED,
    "interleaved-zero-bubble": {**LOOPED, "pipeline_schedule": "interleaved-zero-bubble"},
    "zbv": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"},
}
# (micro-batches of a replica, sequence length) of one step after another.
STEPS = ((4, 16), (2, 8), (6, 16), (4, 16))


class Case(NamedTuple):
    """A layout and a model; `sharding` is a strategy of data parallelism, None for plain modules."""

    layout: dict[str, Any]
    num_layers: int = 4
    tied: bool = False
    steps: Sequence[tuple[int, int]] = STEPS
    recompute: Recompute | None = None
    sharding: str | None = None
    dtype: torch.dtype = torch.float32
    segments: bool = False
    z_loss: float = 0.0
    tolerance: float = 1e-6


def build(case: Case) -> Transformer:
    config = ModelConfig.from_hf({**SHAPE, "num_hidden_layers": case.num_layers, "tie_word_embeddings": case.tied})
    model = Transformer(config, recompute=case.recompute)
    initialize_(model, config, std=0.2, seed=1)
    return model


def micro_batches(number: int, length: int, segments: bool, seed: int) -> tuple[list[MicroBatch], list[Tensor]]:
    """Micro-batches of 2 sequences with uneven weights; the segments carry the micro-batch's number."""
    generator = torch.Generator().manual_seed(seed)
    batches, weights = [], []
    for index in range(number):
        tokens = torch.randint(0, 64, (2, length + 1), generator=generator)
        positions = torch.arange(length).expand(2, -1).clone()
        numbers = torch.full((2, length), 2 * index, dtype=torch.int32)
        numbers[:, length // 2 :] += 1
        mask = (torch.rand(2, length, generator=generator) > 0.3).float()
        batches.append(MicroBatch(tokens[:, :-1], tokens[:, 1:], mask, positions, numbers if segments else None))
        weights.append(mask / (number * length))
    return batches, weights


def parts_of(case: Case, groups: Groups, stages: Stages) -> list[Transformer]:
    """This rank's chunks, wrapped as the case asks."""
    parts = [keep_stage(build(case), stage) for stage in stages.of_rank(groups.place.pp)]
    for part in parts:
        wrap(part, case, groups)
    return parts


def wrap(model: Transformer, case: Case, groups: Groups) -> None:
    if case.sharding is not None:
        reshard = case.sharding == "optim_grads_params"
        shard(model, Sharding(groups.replicas, groups.replicas, case.dtype, reshard_after_forward=reshard))


def groups_of(case: Case) -> tuple[Groups, Stages]:
    layout = Layout(**case.layout)
    topology = Topology(distributed.get_world_size(), pp=layout.pipeline_model_parallel_size)
    num_shards = 1 if case.sharding in (None, "no_shard") else topology.dp
    groups = build_groups(topology, torch.device("cpu"), num_shards, num_shards, 2)
    return groups, stages_asked(layout, case.num_layers)


def gradients(parts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Whole gradients by name; none may be missing. They are cleared."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            assert name not in found
            found[name] = gradient.clone()
            parameter.grad = None
    return found


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def compare(case: Case) -> int:
    """Train and evaluate in a pipeline and alone; returns how many reductions over replicas each step made."""
    groups, stages = groups_of(case)
    parts = parts_of(case, groups, stages)
    runner = PipelineRunner(parts, stages, groups, Layout(**case.layout), compute_dtype=case.dtype)
    alone = build(case)
    if case.dtype != torch.float32:
        wrap(alone, case, groups)
    reference = PlainRunner(alone, reduce_each=False)
    replica, num_replicas = groups.place.dp, groups.topology.dp
    reductions: set[int] = set()
    for step, (number, length) in enumerate(case.steps):
        batches, weights = micro_batches(number * num_replicas, length, case.segments, seed=step)
        own = batches[replica::num_replicas], weights[replica::num_replicas]
        expected = reference.train(batches, weights, case.z_loss)
        with counted(("reduce_scatter_tensor",)) as calls:
            losses = runner.train(*own, case.z_loss)
        reductions.add(calls["reduce_scatter_tensor"])
        check_losses(losses, expected[replica::num_replicas], groups, case.tolerance)
        found, whole = gradients(parts), gradients([alone])
        if case.tied and groups.tied is not None:
            distributed.all_reduce(found["model.embed_tokens.weight"], group=groups.tied)
        for name, gradient in found.items():
            if case.sharding in (None,) and num_replicas > 1:
                raise AssertionError("replicas without FSDP2 are not summed")
            assert difference(gradient, whole[name]) <= case.tolerance, (name, step)
        masks = [batch.loss_mask_BS for batch in batches]
        expected = reference.evaluate(batches, masks)
        release_gathered(alone)
        evaluated = runner.evaluate(own[0], masks[replica::num_replicas])
        check_losses(evaluated, expected[replica::num_replicas], groups, case.tolerance)
    (count,) = reductions
    return count


def check_losses(losses: Tensor, expected: Tensor, groups: Groups, tolerance: float) -> None:
    assert losses.shape == expected.shape and losses.dtype == torch.float32 and not losses.requires_grad
    distributed.all_reduce(losses, group=groups.pp)  # zeros but on the last stage
    assert difference(losses, expected) <= tolerance


def compare_all(cases: Sequence[Case]) -> list[int]:
    return [compare(case) for case in cases]


@contextmanager
def counted(names: Sequence[str]) -> Iterator[Counter[str]]:
    """How often functions of torch.distributed are called, and with how many bytes in `NAME bytes`."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(distributed, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            tensor = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            calls[f"{name} bytes"] += tensor.numel() * tensor.element_size()
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(distributed, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


@pytest.mark.parametrize("tied", [False, True])
def test_two_stages(tied: bool) -> None:
    """Every schedule, with other numbers and lengths from step to step, and evaluation in between."""
    layouts = [layout for name, layout in SCHEDULES.items() if not (tied and name == "zbv")]
    run(2, compare_all, [Case(layout, tied=tied) for layout in layouts])
