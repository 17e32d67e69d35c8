"""Parameter groups, the optimizer, its state, and what is done to gradients, against megatron-core and torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tessel.checkpoint.tiles import local_of
from tessel.config.memory import Memory
from tessel.config.run import Optimizer
from tessel.layout import sharding
from tessel.model.config import ModelConfig
from tessel.train.optimizer import (
    NORM_ROW_ELEMENTS,
    NORM_WHOLE_ELEMENTS,
    build_optimizer,
    clip_,
    learning_rates,
    norm_of,
    num_zeros,
    parameter_groups,
    state_by_name,
)
from tessel.train.schedule import LearningRateSchedule, Scheduler, WeightDecaySchedule
from tests.train.tiny import load_state


def _config(**changes: Any) -> Any:
    """A model with every kind of parameter: biases, q/k norms, grouped queries."""
    values: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
        "tie_word_embeddings": False,
    }
    return ModelConfig(family="qwen3", **values | changes)


class _Chunk:
    """A list of named parameters, as Megatron asks for them."""

    def __init__(self, config: Any) -> None:
        self.ddp_config = SimpleNamespace(use_custom_fsdp=False)
        self.parameters = {
            name: nn.Parameter(torch.randn(rule.shape) * 0.1) for name, rule in sharding.parameters(config).items()
        }
        for name, rule in sharding.parameters(config).items():
            if rule.is_embedding_or_output:
                self.parameters[name].is_embedding_or_output_parameter = True  # type: ignore[attr-defined]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.parameters.items())


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one, which megatron-core's grouping talks through."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "decoupled",
    [{}, {"decoupled_lr": 1e-4}, {"decoupled_lr": 1e-4, "decoupled_min_lr": 1e-5}],
    ids=["coupled", "decoupled", "decoupled_min"],
)
def test_groups_are_megatrons(one_process: None, tied: bool, decoupled: dict[str, float]) -> None:
    megatron = pytest.importorskip("megatron.core.optimizer", reason="megatron-core is not installed")
    config = _config(tie_word_embeddings=tied)
    chunk = _Chunk(config)
    flags: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1} | decoupled
    theirs = megatron._get_param_groups([chunk], megatron.OptimizerConfig(min_lr=1e-6, **flags), None)
    names = {id(parameter): name for name, parameter in chunk.named_parameters()}
    expected = {
        names[id(parameter)]: (group["wd_mult"], group["max_lr"], group["min_lr"])
        for group in theirs
        for parameter in group["params"]
    }
    ours = parameter_groups(chunk.named_parameters(), config, Optimizer(**flags))
    found = {
        name: (group["wd_mult"], group.get("max_lr", 1e-3), group.get("min_lr", 1e-6))
        for group in ours
        for name in group["names"]
    }
    assert found == expected
    assert len(ours) == len(theirs)
    assert all(chunk.parameters[n] is p for g in ours for n, p in zip(g["names"], g["params"], strict=True))


def test_frozen_parameters_are_in_no_group() -> None:
    chunk = _Chunk(_config())
    chunk.parameters["lm_head.weight"].requires_grad_(False)
    groups = parameter_groups(chunk.named_parameters(), _config(), Optimizer())
    names = [name for group in groups for name in group["names"]]
    assert "lm_head.weight" not in names
    assert len(names) == len(chunk.parameters) - 1


def _set_gradients(chunk: _Chunk, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in chunk.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _steps(chunk: _Chunk, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    schedule = LearningRateSchedule(0.0, 1e-2, 1e-3, 2, 20, "cosine")
    scheduler = Scheduler(schedule, WeightDecaySchedule(0.1, 0.1, 20))
    for step in range(first, first + count):
        scheduler.num_steps = step
        scheduler.apply(optimizer.param_groups)
        _set_gradients(chunk, step)
        optimizer.step()


def _copy_of(chunk: _Chunk) -> _Chunk:
    other = _Chunk(_config())
    for name, parameter in other.parameters.items():
        parameter.data.copy_(chunk.parameters[name].data)
    return other


def _optimizer(chunk: _Chunk, **flags: Any) -> torch.optim.Optimizer:
    config = Optimizer(**{"lr": 1e-2, "weight_decay": 0.1, "adam_beta2": 0.95} | flags)
    return build_optimizer(parameter_groups(chunk.named_parameters(), _config(), config), config)


def _adamw_by_hand(chunk: _Chunk, count: int) -> None:
    """AdamW as its paper has it (arXiv 1711.05101), in fp64."""
    schedule = LearningRateSchedule(0.0, 1e-2, 1e-3, 2, 20, "cosine")
    weights = {name: parameter.detach().double() for name, parameter in chunk.parameters.items()}
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(count):
        _set_gradients(chunk, step)
        lr = schedule.lr(step)
        for name, parameter in chunk.parameters.items():
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            first_hat, second_hat = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            decay = 0.1 if parameter.dim() > 1 else 0.0
            weights[name] = weights[name] * (1 - lr * decay) - lr * first_hat / (second_hat.sqrt() + 1e-8)
    for name, parameter in chunk.parameters.items():
        parameter.data.copy_(weights[name])


def test_adam_is_adamw() -> None:
    chunk = _Chunk(_config())
    expected = _copy_of(chunk)
    optimizer = _optimizer(chunk)
    assert isinstance(optimizer, torch.optim.AdamW)
    _steps(chunk, optimizer, 0, 10)
    _adamw_by_hand(expected, 10)
    for name, parameter in chunk.parameters.items():
        torch.testing.assert_close(parameter, expected.parameters[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_has_megatrons_momentum_and_coupled_weight_decay(momentum: float) -> None:
    chunk = _Chunk(_config())
    expected = {name: parameter.detach().clone() for name, parameter in chunk.parameters.items()}
    velocity = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    optimizer = _optimizer(chunk, optimizer="sgd", sgd_momentum=momentum)
    _steps(chunk, optimizer, 0, 5)
    schedule = LearningRateSchedule(0.0, 1e-2, 1e-3, 2, 20, "cosine")
    for step in range(5):
        _set_gradients(chunk, step)
        for name, weight in expected.items():
            gradient = chunk.parameters[name].grad
            assert gradient is not None
            decay = 0.1 if weight.dim() > 1 else 0.0
            velocity[name] = momentum * velocity[name] + gradient + decay * weight
            weight -= schedule.lr(step) * velocity[name]
    for name, weight in expected.items():
        torch.testing.assert_close(chunk.parameters[name].data, weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("flags", [{}, {"optimizer": "sgd"}], ids=["adam", "sgd"])
def test_the_state_goes_round_exactly(flags: dict[str, Any]) -> None:
    chunk = _Chunk(_config())
    optimizer = _optimizer(chunk, **flags)
    _steps(chunk, optimizer, 0, 3)
    saved = {name: tensor.clone() for name, tensor in state_by_name(optimizer).items()}

    resumed = _copy_of(chunk)
    resumed_optimizer = _optimizer(resumed, **flags)
    assert state_by_name(resumed_optimizer).keys() == saved.keys()
    load_state(resumed_optimizer, saved)
    _steps(chunk, optimizer, 3, 3)
    _steps(resumed, resumed_optimizer, 3, 3)
    for name, parameter in chunk.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])
    for name, tensor in state_by_name(optimizer).items():
        assert torch.equal(tensor, state_by_name(resumed_optimizer)[name])
        assert not torch.equal(tensor, saved[name])


def test_the_state_is_named_by_parameter_and_there_from_the_start() -> None:
    chunk = _Chunk(_config())
    state = state_by_name(_optimizer(chunk))
    expected = {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in chunk.parameters}
    assert state.keys() == expected
    assert state["exp_avg.lm_head.weight"].shape == chunk.parameters["lm_head.weight"].shape
    sgd = _optimizer(_Chunk(_config()), optimizer="sgd")
    assert state_by_name(sgd).keys() == {f"momentum_buffer.{name}" for name in chunk.parameters}


def test_logged_learning_rates() -> None:
    chunk = _Chunk(_config())
    scheduler = Scheduler(LearningRateSchedule(0.0, 1e-2, 0.0, 0, 20, "linear"), WeightDecaySchedule(0.1, 0.1, 20))
    scheduler.advance(10)
    plain = _optimizer(chunk)
    scheduler.apply(plain.param_groups)
    assert learning_rates(plain) == (float(np.float32(5e-3)), None)
    decoupled = _optimizer(chunk, decoupled_lr=4e-4, decoupled_min_lr=2e-4)
    scheduler.apply(decoupled.param_groups)
    assert learning_rates(decoupled) == (float(np.float32(5e-3)), pytest.approx(3e-4))
    embedding = {"model.embed_tokens.weight": chunk.parameters["model.embed_tokens.weight"]}
    flags = Optimizer(lr=1e-3, decoupled_lr=4e-4, decoupled_min_lr=2e-4)
    first_stage = build_optimizer(parameter_groups(embedding.items(), _config(), flags), flags)
    scheduler.apply(first_stage.param_groups)
    assert learning_rates(first_stage) == learning_rates(decoupled)


@pytest.mark.parametrize("memory", [None, Memory(optimizer_cpu_offload=True)], ids=["plain", "offloaded"])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_stage_without_parameters_has_an_optimizer(kind: str, memory: Memory | None) -> None:
    flags = Optimizer(optimizer=kind, lr=1e-3)
    optimizer = build_optimizer(parameter_groups((), _config(), flags), flags, memory)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert state_by_name(optimizer) == {}


def _gradients() -> list[Tensor]:
    shapes = [(3,), (7, 5), (NORM_ROW_ELEMENTS,), (NORM_WHOLE_ELEMENTS + NORM_ROW_ELEMENTS + 1,), (40, 1000)]
    return [torch.randn(shape) * scale for shape, scale in zip(shapes, (1.0, 0.1, 1e-2, 1e-6, 1e-2), strict=True)]


def test_the_norm_is_over_all_elements() -> None:
    gradients = _gradients()
    expected = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients))
    norm = norm_of(gradients)
    assert norm.dtype is torch.float32
    assert norm.shape == ()
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    assert float(norm_of([])) == 0.0


def test_the_norm_of_an_embedding_keeps_its_digits() -> None:
    gradient = torch.randn(2**24) * 1e-3
    exact = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    assert float(norm_of([gradient])) == pytest.approx(exact, rel=1e-6)


def test_the_norm_of_what_megatron_runs_on_cpu_is_torchs_own() -> None:
    gradient = torch.randn(NORM_WHOLE_ELEMENTS) * 1e-3
    assert float(norm_of([gradient])) == float(gradient.norm())


def test_the_norm_takes_gradients_in_any_memory_order() -> None:
    gradient = torch.randn(300, 400)
    assert float(norm_of([gradient.t()])) == pytest.approx(float(gradient.norm()), rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 4])
def test_the_norm_shows_what_is_not_finite(bad: float, where: int) -> None:
    gradients = _gradients()
    gradients[where].view(-1)[-1] = bad
    assert not math.isfinite(float(norm_of(gradients)))


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_megatrons(monkeypatch: pytest.MonkeyPatch, max_norm: float) -> None:
    clip_grads = pytest.importorskip("megatron.core.optimizer.clip_grads", reason="megatron-core is not installed")
    gradients = _gradients()
    theirs = [nn.Parameter(torch.zeros_like(grad)) for grad in gradients]
    for parameter, grad in zip(theirs, gradients, strict=True):
        parameter.grad = grad.clone()
    norm = norm_of(gradients)
    # Its flag lives on a GPU; the arithmetic is the same here.
    zeros = torch.zeros
    monkeypatch.setattr(clip_grads.torch, "zeros", lambda size, dtype, device: zeros(size, dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "type", lambda self: "torch.cuda.FloatTensor")
    clip_grads.clip_grad_by_total_norm_fp32(theirs, max_norm, float(norm))
    monkeypatch.undo()
    before = [grad.clone() for grad in gradients]
    clip_(gradients, max_norm, norm)
    for ours, parameter, old in zip(gradients, theirs, before, strict=True):
        assert torch.equal(ours, parameter.grad)
        assert torch.equal(ours, old) is (max_norm > 1e3)


def test_zeros_are_counted_over_all_gradients() -> None:
    gradients = [torch.tensor([0.0, 1.0, -0.0]), torch.zeros(4, 5), torch.ones(3)]
    count = num_zeros(gradients)
    assert count == 22.0
    assert isinstance(count, float)


def test_shards_are_seen_through(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    whole = torch.randn(6, 5)
    parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(whole * 2, mesh, [Shard(0)])
    assert torch.equal(local_of(parameter), whole)
    gradients = [local_of(parameter.grad)]
    clip_(gradients, 1.0, norm_of(gradients))
    clipped = local_of(parameter.grad)
    assert float(clipped.norm()) == pytest.approx(1.0, rel=1e-5)
    group = {"params": [parameter], "names": ["w"], "wd_mult": 1.0, "is_decoupled_lr": False}
    optimizer = build_optimizer([dict(group)], Optimizer(lr=0.1, weight_decay=0.0))
    optimizer.step()
    # Adam's first update is lr in the direction against the gradient.
    torch.testing.assert_close(local_of(parameter).detach(), whole - 0.1 * whole.sign(), rtol=1e-5, atol=1e-4)
    assert state_by_name(optimizer).keys() == {"step.w", "exp_avg.w", "exp_avg_sq.w"}
    before, gradient = local_of(parameter).detach().clone(), local_of(parameter.grad)
    sgd = build_optimizer([dict(group)], Optimizer(optimizer="sgd", lr=0.1, weight_decay=0.0))
    sgd.step()
    torch.testing.assert_close(local_of(parameter).detach(), before - 0.1 * gradient)
