"""State in host memory changes no bit; state in fewer bits changes little, and takes what it says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessel.cli import main
from tessel.config.memory import Memory
from tessel.config.run import Optimizer
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.transformer import Transformer
from tessel.train import frugal, state
from tessel.train.frugal import FrugalOptimizer
from tessel.train.optimizer import build_optimizer, parameter_groups, state_by_name
from tessel.train.state import BLOCK
from tests.train import runs
from tests.train.tiny import load_state

# Large enough that matrices are held in 8 bits.
CONFIG = ModelConfig.from_hf(
    {
        "model_type": "qwen2",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
)
BF16 = Memory(use_precision_aware_optimizer=True, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")
EIGHT_BITS = Memory(use_precision_aware_optimizer=True, exp_avg_dtype="8bit", exp_avg_sq_dtype="8bit")
MIXED = Memory(use_precision_aware_optimizer=True, exp_avg_dtype="bf16", exp_avg_sq_dtype="8bit", swap_optimizer=True)
MOVED = {
    "offloaded": Memory(optimizer_cpu_offload=True),
    "half offloaded, overlapped": Memory(
        optimizer_cpu_offload=True, optimizer_offload_fraction=0.5, overlap_cpu_optimizer_d2h_h2d=True
    ),
    "swapped": Memory(swap_optimizer=True),
}


class Run:
    """A model that learns to count, and its optimizer."""

    def __init__(self, memory: Memory | None, **flags: Any) -> None:
        self.model = Transformer(CONFIG)
        initialize_(self.model, CONFIG, std=0.05, seed=1)
        options = Optimizer(**{"lr": 3e-3, "weight_decay": 0.1, "adam_beta2": 0.99} | flags)
        groups = parameter_groups(self.model.named_parameters(), CONFIG, options)
        self.optimizer = build_optimizer(groups, options, memory)

    def steps(self, first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            generator = torch.Generator().manual_seed(step)
            starts = torch.randint(0, 90, (8, 1), generator=generator)
            tokens = (starts + torch.arange(17)) % 90
            loss = self.model(tokens[:, :-1], labels_BS=tokens[:, 1:], weights_BS=torch.full((8, 16), 1 / 128))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        return losses

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("flags", [{}, {"optimizer": "sgd"}, {"optimizer": "sgd", "sgd_momentum": 0.0}], ids=str)
def test_where_state_lies_changes_no_bit(name: str, flags: dict[str, Any]) -> None:
    plain, moved = Run(None, **flags), Run(MOVED[name], **flags)
    assert isinstance(moved.optimizer, FrugalOptimizer)
    assert not isinstance(plain.optimizer, FrugalOptimizer)
    assert plain.steps(0, 4) == moved.steps(0, 4)
    assert same(plain.weights(), moved.weights())
    assert same(state_by_name(plain.optimizer), state_by_name(moved.optimizer))


class Apart:
    """Copies to a host that really is elsewhere: what is on the "device" has other memory."""

    pin = False

    def __init__(self, device: torch.device, pin: bool = True) -> None:
        self.num_down = self.num_up = 0

    def down(self, source: Tensor) -> frugal.Copy:
        self.num_down += 1
        return frugal.Copy(source.clone())

    def up(self, source: Tensor) -> frugal.Copy:
        self.num_up += 1
        return frugal.Copy(source.clone())

    def into(self, target: Tensor, source: Tensor) -> frugal.Copy:
        assert target.data_ptr() != source.data_ptr()
        target.copy_(source)
        return frugal.Copy(target)

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("name", MOVED)
def test_copies_go_where_they_should(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of an accelerator, with a "device" that is the CPU under other addresses."""
    monkeypatch.setattr(frugal, "HostCopies", Apart)
    monkeypatch.setattr(
        FrugalOptimizer,
        "_brought_down",
        lambda self, job: (self._weights.down(job.weight), self._gradients.down(job.gradient)),
    )
    plain, moved = Run(None), Run(MOVED[name])
    assert plain.steps(0, 3) == moved.steps(0, 3)
    assert same(plain.weights(), moved.weights())
    assert same(state_by_name(plain.optimizer), state_by_name(moved.optimizer))
    num_parameters = len(plain.weights())
    copies: Any = moved.optimizer._weights  # type: ignore[attr-defined]
    if name == "swapped":
        assert (copies.num_down, copies.num_up) == (0, 3 * 2 * num_parameters)
    else:
        hosted = list(moved.optimizer._places.values()).count("host")  # type: ignore[attr-defined]
        assert copies.num_down == 3 * hosted
        assert (hosted == num_parameters) is (name == "offloaded")


def test_the_fraction_is_of_elements() -> None:
    for fraction in (0.0, 0.3, 0.7, 1.0):
        run = Run(Memory(optimizer_cpu_offload=True, optimizer_offload_fraction=fraction))
        places = run.optimizer._places  # type: ignore[attr-defined]
        total = sum(parameter.numel() for parameter in places)
        hosted = sum(parameter.numel() for parameter, place in places.items() if place == "host")
        assert hosted <= fraction * total
        # No parameter on the device would have fitted in what is left.
        left = fraction * total - hosted
        assert all(parameter.numel() > left for parameter, place in places.items() if place == "device")


@pytest.mark.parametrize(
    ("memory", "largest"), [(BF16, 0.0005), (EIGHT_BITS, 0.004), (MIXED, 0.004)], ids=["bf16", "8bit", "mixed"]
)
def test_fewer_bits_change_the_curve_little(memory: Memory, largest: float) -> None:
    """By so many nats at no step, of a loss that falls from 4.6 to 0.05."""
    exact, rounded = Run(None).steps(0, 60), Run(memory).steps(0, 60)
    assert exact[-1] < 0.05 < 4.5 < exact[0]
    assert exact != rounded
    assert max(abs(a - b) for a, b in zip(exact, rounded, strict=True)) < largest


@pytest.mark.parametrize(("memory", "per_number"), [(BF16, 2.0), (EIGHT_BITS, 1 + 4 / BLOCK)], ids=["bf16", "8bit"])
def test_bytes_of_state(memory: Memory, per_number: float) -> None:
    run = Run(memory)
    assert isinstance(run.optimizer, FrugalOptimizer)
    small = [p for p in run.weights().values() if p.numel() < frugal.SMALLEST_IN_8BIT]
    num_small = sum(p.numel() for p in small)
    num_large = sum(p.numel() for p in run.weights().values()) - num_small
    expected = 2 * (num_large * per_number + num_small * (4 if memory is EIGHT_BITS else 2))
    on_device, in_host_memory = run.optimizer.state_bytes()
    assert expected <= on_device <= expected * 1.001
    assert in_host_memory == 0


@pytest.mark.parametrize("memory", [BF16, EIGHT_BITS, MIXED, *MOVED.values()], ids=["bf16", "8bit", "mixed", *MOVED])
def test_going_on_is_bitwise(memory: Memory) -> None:
    run = Run(memory)
    run.steps(0, 3)
    saved = {name: tensor.clone() for name, tensor in state_by_name(run.optimizer).items()}
    weights = {name: weight.clone() for name, weight in run.weights().items()}
    expected = run.steps(3, 4)

    again = Run(memory)
    again.model.load_state_dict(weights)
    load_state(again.optimizer, saved)
    assert same(state_by_name(again.optimizer), saved)
    assert again.steps(3, 4) == expected
    assert same(again.weights(), run.weights())
    assert same(state_by_name(again.optimizer), state_by_name(run.optimizer))


@pytest.mark.parametrize("memory", [BF16, EIGHT_BITS], ids=["bf16", "8bit"])
def test_a_tied_embedding_stays_the_same_on_both_of_its_stages(memory: Memory) -> None:
    """Rounding at random is alike for what has one name, whatever stands beside it."""
    flags = Optimizer(lr=3e-3)
    copies = [nn.Parameter(torch.ones(96, 64)) for _ in range(2)]
    other = nn.Parameter(torch.ones(64, 64))
    name, before = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
    stages = ([(name, copies[0])], [(before, other), (name, copies[1])])
    optimizers = [build_optimizer(parameter_groups(stage, CONFIG, flags), flags, memory) for stage in stages]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(96, 64, generator=generator)
        other.grad = torch.ones_like(other)
        for parameter, optimizer in zip(copies, optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(*copies)


def test_names_and_shapes_are_the_same_whatever_the_state_is() -> None:
    plain = state_by_name(Run(None).optimizer)
    for memory in (BF16, EIGHT_BITS, *MOVED.values()):
        other = state_by_name(Run(memory).optimizer)
        assert {name: tensor.shape for name, tensor in other.items()} == {n: t.shape for n, t in plain.items()}
    shown = state_by_name(Run(EIGHT_BITS).optimizer)
    assert {tensor.dtype for tensor in shown.values()} == {torch.float32}


def test_state_of_one_kind_goes_into_another() -> None:
    plain = Run(None)
    plain.steps(0, 5)
    exact = state_by_name(plain.optimizer)
    for memory, largest in ((BF16, 0.004), (EIGHT_BITS, 0.01), (MOVED["offloaded"], 0.0)):
        other = Run(memory)
        load_state(other.optimizer, exact)
        for name, tensor in state_by_name(other.optimizer).items():
            bound = largest * exact[name].abs().max()
            assert (tensor.float() - exact[name]).abs().max() <= bound, name


def test_a_large_parameter_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(EIGHT_BITS)
    expected = whole.steps(0, 1)
    # The first moment is rounded to the nearest, so it is the same in one part and in several.
    monkeypatch.setattr(state, "_PART", BLOCK * 3)
    parts = Run(EIGHT_BITS)
    assert parts.steps(0, 1) == expected
    for name, tensor in state_by_name(whole.optimizer).items():
        if name.startswith("exp_avg."):
            assert torch.equal(tensor, state_by_name(parts.optimizer)[name]), name
    assert same(whole.weights(), parts.weights())


# Shards.


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("memory", [BF16, EIGHT_BITS, *MOVED.values()], ids=["bf16", "8bit", *MOVED])
def test_shards_are_updated_where_they_are(one_process: None, memory: Memory) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    whole = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(96, 64, generator=torch.Generator().manual_seed(2))

    def updated(parameter: nn.Parameter, given: Tensor) -> torch.optim.Optimizer:
        group = {"params": [parameter], "names": ["w"], "wd_mult": 1.0, "is_decoupled_lr": False}
        optimizer = build_optimizer([group], Optimizer(lr=0.1, weight_decay=0.0), memory)
        for _ in range(2):
            parameter.grad = given.clone()
            optimizer.step()
        return optimizer

    plain = nn.Parameter(whole.clone())
    expected = state_by_name(updated(plain, gradient))
    shard = nn.Parameter(distribute_tensor(whole.clone(), mesh, [Shard(0)]))
    found = state_by_name(updated(shard, distribute_tensor(gradient, mesh, [Shard(0)])))
    assert torch.equal(shard.to_local(), plain)  # type: ignore[attr-defined]
    for name in ("exp_avg.w", "exp_avg_sq.w"):
        tensor = found[name]
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.to_local(), expected[name])


# Whole runs.

WIDE = "--hidden-size 64 --ffn-hidden-size 112 --eval-interval 100 --num-workers 0".split()
PRECISE = "--use-precision-aware-optimizer"
OPTIONS = {
    "offload": "--bf16 --optimizer-cpu-offload --optimizer-offload-fraction 0.5 --overlap-cpu-optimizer-d2h-h2d",
    "swap": "--swap-optimizer --swap-attention --recompute-granularity selective --recompute-modules mlp layernorm",
    "bf16": f"--bf16 {PRECISE} --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
    "8bit": f"{PRECISE} --exp-avg-dtype 8bit --exp-avg-sq-dtype 8bit --cpu-offloading-num-layers 1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_pattern(tmp_path_factory.mktemp("data") / "text")


def _train(data: Path, save: Path, halt: bool, *more: str) -> list[float]:
    """Four iterations, or the first two of them."""
    assert main(runs.flags(data, save, 4, *WIDE, *(["--exit-interval", "2"] if halt else []), *more)) == 0
    return runs.losses(save)


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Runs without any option, by whether they compute in bf16."""
    saves = {in_bf16: tmp_path_factory.mktemp("plain") for in_bf16 in (False, True)}
    for in_bf16, save in saves.items():
        _train(data, save, False, *(["--bf16"] if in_bf16 else []))
    return saves


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_with_the_option_goes_on_bitwise(
    name: str, data: Path, plain: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = OPTIONS[name].split()
    straight = _train(data, tmp_path / "straight", False, *option)
    told = capsys.readouterr().out
    _train(data, tmp_path / "halted", True, *option)
    # Where the state only lies elsewhere, the run may go on without.
    is_moved = name in ("offload", "swap")
    rest = [flag for flag in option if flag == "--bf16"] if is_moved else option
    assert _train(data, tmp_path / "halted", False, *rest) == straight
    assert runs.weight_bytes(tmp_path / "halted") == runs.weight_bytes(tmp_path / "straight")
    assert "optimizer state: " in told
    unmoved = plain["--bf16" in option]
    if is_moved:
        assert straight == runs.losses(unmoved)
        assert runs.weight_bytes(tmp_path / "straight") == runs.weight_bytes(unmoved)
        assert "on the CPU everything is in host memory already" in told
    else:
        assert straight == pytest.approx(runs.losses(unmoved), abs=0.002)
        assert straight != runs.losses(unmoved)


def test_another_precision_converts_and_says_so(
    data: Path, plain: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _train(data, tmp_path, True)
    went_on = _train(data, tmp_path, False, *OPTIONS["8bit"].split())
    assert went_on == pytest.approx(runs.losses(plain[False]), abs=0.002)
    told = capsys.readouterr().out
    for moment in ("exp_avg", "exp_avg_sq"):
        assert f"{moment}: saved by a run that kept it in fp32, and kept in 8bit from here on" in told


def test_conversions_are_told_once_each() -> None:
    assert frugal.conversions({}, Memory()) == []
    assert frugal.conversions({"exp_avg_dtype": "8bit", "exp_avg_sq_dtype": "fp32"}, Memory()) == [
        "exp_avg: saved by a run that kept it in 8bit, and kept in fp32 from here on"
    ]


def test_zero_gradients_and_untouched_parameters() -> None:
    run = Run(EIGHT_BITS)
    before = {name: weight.clone() for name, weight in run.weights().items()}
    run.optimizer.step()
    assert same(before, run.weights())
    assert all(math.isfinite(float(tensor.sum())) for tensor in state_by_name(run.optimizer).values())
