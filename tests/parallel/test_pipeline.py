"""Pipelines: the numbers of one process by every schedule, the published orders, memory and bytes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.pipelining import stage as torch_stage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessel.config.layout import Layout
from tessel.config.layout_rules import SPLIT_BACKWARD
from tessel.data.loader import MicroBatch
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
from tessel.parallel.schedule import Stage
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
STEPS = ((4, 16), (2, 8), (6, 16))


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
    routed: bool = False
    tolerance: float = 1e-6


def build(case: Case) -> Transformer:
    config = ModelConfig.from_hf({**SHAPE, "num_hidden_layers": case.num_layers, "tie_word_embeddings": case.tied})
    model = Transformer(config, recompute=case.recompute)
    initialize_(model, config, std=0.2, seed=1)
    if case.routed:
        for number, layer in model.layers.items():
            layer.mlp = Routed(layer.get_submodule("mlp"), int(number))
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


def compare(case: Case) -> None:
    """Train and evaluate step by step, in a pipeline and alone."""
    groups, stages = groups_of(case)
    parts = parts_of(case, groups, stages)
    runner = PipelineRunner(parts, stages, groups, Layout(**case.layout), compute_dtype=case.dtype)
    alone = build(case)
    if case.dtype != torch.float32:
        wrap(alone, case, groups)
    reference = PlainRunner(alone, reduce_each=False)
    replica, num_replicas = groups.place.dp, groups.topology.dp
    for step, (number, length) in enumerate(case.steps):
        batches, weights = micro_batches(number * num_replicas, length, case.segments, seed=step)
        own = batches[replica::num_replicas], weights[replica::num_replicas]
        expected = reference.train(batches, weights, case.z_loss)
        with Counted() as counted:
            losses = runner.train(*own, case.z_loss)
        if case.sharding is not None and num_replicas > 1:
            check_calls(counted.calls, case.sharding, parts)
        check_losses(losses, expected[replica::num_replicas], groups, case.tolerance, torch.float32)
        found, whole = gradients(parts), gradients([alone])
        if case.tied and groups.tied is not None:
            distributed.all_reduce(found["model.embed_tokens.weight"], group=groups.tied)
        for name, gradient in found.items():
            assert difference(gradient, whole[name]) <= case.tolerance, (name, step)
        masks = [batch.loss_mask_BS for batch in batches]
        expected = reference.evaluate(batches, masks)
        release_gathered(alone)
        evaluated = runner.evaluate(own[0], masks[replica::num_replicas])
        check_losses(evaluated, expected[replica::num_replicas], groups, case.tolerance, torch.float64)


def check_calls(calls: Counter[str], sharding: str, parts: Sequence[nn.Module]) -> None:
    """Each layer, and what is left of each chunk, is reduced once a step, and gathered once unless it is dropped."""
    own_names = [{name.split(".layers.")[-1].split(".")[0] for name, _ in part.named_parameters()} for part in parts]
    num_groups = sum(len({name if name.isdigit() else "rest" for name in names}) for names in own_names)
    reductions = calls["sums" if sharding == "no_shard" else "reductions"]
    assert reductions == num_groups, calls
    if sharding == "optim":
        assert calls["gathers"] == num_groups, calls


def check_losses(losses: Tensor, expected: Tensor, groups: Groups, tolerance: float, dtype: torch.dtype) -> None:
    assert losses.shape == expected.shape and losses.dtype == dtype and not losses.requires_grad
    distributed.all_reduce(losses, group=groups.pp)  # zeros but on the last stage
    assert difference(losses, expected) <= tolerance


def compare_all(cases: Sequence[Case]) -> None:
    for case in cases:
        try:
            compare(case)
        except BaseException as error:
            error.add_note(str(case))
            raise


class Counted(TorchDispatchMode):
    """How often processes talk to each other: calls, and in `NAME bytes` how much each call was given."""

    NAMES = {
        "send": "sends",
        "allreduce_": "sums",
        "_reduce_scatter_base_": "reductions",
        "_allgather_base_": "gathers",
    }

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.most_on_the_way = 0
        self._on_the_way: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "c10d" and name in self.NAMES:
            given = [tensor for tensor in tree_leaves(args[:1]) if isinstance(tensor, Tensor)]
            self.calls[self.NAMES[name]] += 1
            self.calls[f"{self.NAMES[name]} bytes"] += sum(tensor.numel() * tensor.element_size() for tensor in given)
            if name == "send":
                self._on_the_way.update(given)
                self.most_on_the_way = max(self.most_on_the_way, len(self._on_the_way))
        return func(*args, **(kwargs or {}))


def test_two_stages() -> None:
    """Every schedule, with other numbers and lengths from step to step, and evaluation in between."""
    tied = [Case(layout, tied=True, steps=STEPS[:2]) for name, layout in SCHEDULES.items() if name != "zbv"]
    run(2, compare_all, [*(Case(layout) for layout in SCHEDULES.values()), *tied])


def test_four_stages_uneven() -> None:
    """Stages without layers; fewer micro-batches than stages; documents, a z-loss and full recomputation."""
    pp4 = {"pipeline_model_parallel_size": 4}
    cases = [
        Case({**pp4, "num_layer_list": "1,2,1,0"}, steps=((4, 16), (1, 8)), segments=True, z_loss=1e-3),
        Case({**pp4, "num_layer_list": "1,0,2,1"}, steps=((6, 16),), recompute=Recompute("full", "uniform", 1)),
        Case(
            {**pp4, "noop_layers": "1,3", "num_virtual_stages_per_pipeline_rank": 2},
            num_layers=6,
            steps=((4, 8), (2, 16)),
        ),
        Case({**pp4, "noop_layers": "1,3", "pipeline_schedule": "zbv"}, num_layers=6, steps=((4, 8), (2, 16))),
    ]
    run(4, compare_all, cases)


def test_with_replicas() -> None:
    """Every strategy of data parallelism: every parameter has its gradient, summed over replicas once a step."""
    cases = [
        Case(layout, sharding=strategy, steps=STEPS[:2])
        for name, layout in SCHEDULES.items()
        for strategy in ("no_shard", "optim", "optim_grads_params")
        if not (name in SPLIT_BACKWARD and strategy == "optim_grads_params")
    ]
    run(4, compare_all, cases)


def test_with_replicas_and_more() -> None:
    """More chunks than torch keeps gathered, a tied embedding, and layers that are gathered to be recomputed."""
    chunks = {"num_virtual_stages_per_pipeline_rank": 4, "pipeline_schedule": "interleaved-zero-bubble"}
    cases = [
        Case({**LOOPED, **chunks}, num_layers=8, sharding="optim", steps=STEPS[1:2]),
        Case(LOOPED, tied=True, sharding="optim", steps=STEPS[1:2]),
        Case(LOOPED, recompute=Recompute("full", "uniform", 1), sharding="optim_grads_params", steps=STEPS[1:2]),
    ]
    run(4, compare_all, cases)


def test_low_precision() -> None:
    """As one process in bf16: gradients of micro-batches add up in fp32, halves of a backward included."""
    cases = [Case(layout, sharding="no_shard", dtype=torch.bfloat16, steps=STEPS[:2]) for layout in SCHEDULES.values()]
    run(2, compare_all, cases)


def test_split_backward_with_recomputation() -> None:
    recomputes = [Recompute("full", "uniform", 1), Recompute("selective")]
    layouts = [SCHEDULES[name] for name in SPLIT_BACKWARD]
    run(2, compare_all, [Case(layout, recompute=r, steps=STEPS[:1]) for layout in layouts for r in recomputes])


class Attach(torch.autograd.Function):
    """x as it is, with a loss beside it whose gradient is 1, as a mixture of experts adds its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones(())


class Routed(nn.Module):
    """An MLP behind a gate, and the gate's own loss."""

    def __init__(self, mlp: nn.Module, seed: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.gate = nn.Parameter(torch.randn(32, 4, generator=torch.Generator().manual_seed(seed)) * 0.2)

    def save_memory(self, *arguments: Any) -> None:
        self.mlp.save_memory(*arguments)

    def forward(self, x: Tensor) -> Tensor:
        scores = (x @ self.gate).softmax(-1)
        x = Attach.apply(x, 1e-2 * scores.mean((0, 1)).square().sum())
        out: Tensor = self.mlp(x) * scores.amax(-1, keepdim=True)
        return out


def test_split_backward_with_a_loss_inside() -> None:
    run(2, compare_all, [Case(SCHEDULES[name], routed=True, steps=STEPS[:1]) for name in SPLIT_BACKWARD])


class Recorder:
    """What really happens to micro-batches on one chunk: forwards, gradients that arrive, and graphs alive.

    The micro-batch is read off the segments, which every stage is given.
    """

    def __init__(self, chunk: Transformer, stage: int, events: list[tuple[str, int, int]]) -> None:
        self.current = -1
        self.live = 0
        self._boxes: weakref.WeakSet[Box] = weakref.WeakSet()
        self._stage, self._events = stage, events
        chunk.register_forward_pre_hook(self._begin, with_kwargs=True)
        chunk.register_forward_hook(self._end)

    def pack(self, tensor: Tensor) -> Box:
        box = Box(tensor, self.current)
        if self.current >= 0:
            self._boxes.add(box)
        return box

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.current = int(kwargs["segments_BS"][0, 0]) // 2
        self._events.append(("F", self._stage, self.current))

    def _end(self, module: nn.Module, args: Any, output: Tensor) -> None:
        number, self.current = self.current, -1
        self.live = max(self.live, len({box.number for box in self._boxes}))
        output.register_hook(lambda grad: self._events.append(("B", self._stage, number)))


class Box:
    """What autograd keeps of a micro-batch."""

    def __init__(self, tensor: Tensor, number: int) -> None:
        self.tensor, self.number = tensor, number


class Record(NamedTuple):
    """What happened on a rank: see `Recorder`; and the most tensors at one time that were sent, or received into."""

    events: list[tuple[str, int, int]]
    live: int
    calls: Counter[str]
    sent: int
    received: int


def record(case: Case, num_micro_batches: int) -> Record:
    groups, stages = groups_of(case)
    parts = parts_of(case, groups, stages)
    runner = PipelineRunner(parts, stages, groups, Layout(**case.layout), compute_dtype=case.dtype)
    batches, weights = micro_batches(num_micro_batches, 8, True, seed=0)
    buffers = Buffers()
    with buffers:
        runner.train(batches, weights)  # what is sent when a shape is first seen
    events: list[tuple[str, int, int]] = []
    recorders = [
        Recorder(part, stage.index, events) for part, stage in zip(parts, stages.of_rank(groups.place.pp), strict=True)
    ]

    def pack(tensor: Tensor) -> Box:
        return next((r for r in recorders if r.current >= 0), recorders[0]).pack(tensor)

    with saved_tensors_hooks(pack, lambda box: box.tensor), Counted() as counted:
        runner.train(batches, weights)
    live = max(recorder.live for recorder in recorders)
    return Record(events, live, counted.calls, counted.most_on_the_way, buffers.most)


class Buffers:
    """The most tensors that torch.distributed.pipelining and ours held at one time to receive into."""

    def __init__(self) -> None:
        self.most = 0
        self._tensors: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self._allocate, self._make = Stage._allocate, torch_stage._make_tensor_from_meta

    def _add(self, buffer: Tensor | None) -> None:
        if buffer is not None and not buffer.is_meta:
            self._tensors.add(buffer)
        self.most = max(self.most, len(self._tensors))

    def __enter__(self) -> None:
        def allocate(stage: Stage, infos: Sequence[Any]) -> None:
            self._allocate(stage, infos)
            for info in infos:
                self._add(info.buffer)

        def make(*arguments: Any) -> Tensor:
            buffer: Tensor = self._make(*arguments)
            self._add(buffer)
            return buffer

        Stage._allocate = allocate  # type: ignore[method-assign]
        torch_stage._make_tensor_from_meta = make

    def __exit__(self, *error: object) -> None:
        Stage._allocate = self._allocate  # type: ignore[method-assign]
        torch_stage._make_tensor_from_meta = self._make


def events_of(text: str, stage: int) -> list[tuple[str, int, int]]:
    return [(word[0], stage, int(word[1:])) for word in text.split()]


def test_one_forward_one_backward_is_the_published_order() -> None:
    """PP2 and PP4 with 8 micro-batches, written out: warm-up, steady state, cool-down."""
    two = ["F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7", "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7"]
    four = [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]
    for pp, number, orders in ((2, 8, two), (4, 8, four)):
        case = Case({"pipeline_model_parallel_size": pp})
        for rank, (events, live, calls, sent, received) in enumerate(run(pp, record, case, number)):
            assert events == events_of(orders[rank], rank)
            assert live == pp - rank, "micro-batches between forward and backward"
            boundaries = (rank < pp - 1) + (rank > 0)
            assert calls["sends"] == number * boundaries
            assert calls["sends bytes"] == number * boundaries * 2 * 8 * 32 * 4, "B x S x E, forward and backward"
            assert sent <= 2 * boundaries, "a tensor each way"
            assert received <= 1 + 2 * boundaries, "not one each way for every micro-batch"


def megatron_interleaved(pp: int, rank: int, num_chunks: int, number: int) -> list[tuple[str, int, int]]:
    """As Megatron-LM publishes it: a table of (micro-batch, chunk) in groups of PP, forward and, reversed, backward."""
    table = [
        (first + offset, chunk) for first in range(0, number, pp) for chunk in range(num_chunks) for offset in range(pp)
    ]
    forward = [("F", chunk * pp + rank, mb) for mb, chunk in table]
    backward = [("B", (num_chunks - 1 - chunk) * pp + rank, mb) for mb, chunk in table]
    warm_up = min((pp - rank - 1) * 2 + (num_chunks - 1) * pp, len(table))
    steady = [event for pair in zip(forward[warm_up:], backward, strict=False) for event in pair]
    return forward[:warm_up] + steady + backward[len(table) - warm_up :]


def test_interleaved_is_megatrons_order() -> None:
    for pp, number in ((2, 4), (2, 6)):
        case = Case({"pipeline_model_parallel_size": pp, "num_virtual_stages_per_pipeline_rank": 2})
        for rank, (events, _, calls, _, _) in enumerate(run(pp, record, case, number)):
            assert events == megatron_interleaved(pp, rank, 2, number)
            assert calls["sends"] == number * 3, "three boundaries, forward from one side and backward from the other"


def test_schedules_are_bounded() -> None:
    run(2, many_shapes)


def many_shapes() -> None:
    case = Case(SCHEDULES["1f1b"])
    groups, stages = groups_of(case)
    parts = parts_of(case, groups, stages)
    runner = PipelineRunner(parts, stages, groups, Layout(**case.layout), compute_dtype=torch.float32)
    for number in range(1, 12):
        batches, weights = micro_batches(number, 8, False, seed=0)
        assert runner.train(batches, weights).shape == (number, 1)
    assert 1 < len(runner._schedules) < 10
    for schedule in runner._schedules.values():
        for stage in schedule._stages.values():
            assert not stage.fwd_cache and not any(tree_leaves(stage.bwd_cache)) and not stage._sent
            infos = [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]
            assert all(info.buffer is None or info.buffer.is_meta for row in infos for info in row)


def test_numbers_of_micro_batches_that_are_refused() -> None:
    with pytest.raises(AssertionError, match="cannot run 5 micro-batches in equal rounds: .* there are 4 or 6 on"):
        run(2, refuse)


def refuse() -> None:
    case = Case(LOOPED)
    groups, stages = groups_of(case)
    parts = parts_of(case, groups, stages)
    runner = PipelineRunner(parts, stages, groups, Layout(**LOOPED), compute_dtype=torch.float32)
    batches, weights = micro_batches(5, 8, False, seed=0)
    assert runner.evaluate(batches, weights).shape == (5, 1)
    with pytest.raises(ValueError, match="must have one shape"):
        runner.train([*batches[:3], micro_batches(1, 6, False, seed=0)[0][0]], weights[:4])
    runner.train(batches, weights)
