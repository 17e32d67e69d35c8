"""Optimizer states of Megatron's torch format: back under parameters' names, from files made here and by Megatron."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.checkpoint.mcore import open_torch
from tessel.checkpoint.mcore_optimizer_write import KINDS, MOMENTS
from tessel.checkpoint.mcore_write import write_torch
from tessel.checkpoint.stored import StoredModel, Target
from tessel.checkpoint.torch_file import LoadedTensor
from tessel.convert.copies import differing_copies
from tessel.errors import TesselError
from tests.checkpoint.megatron import hf_model, manifest_of

# Each state is a function of its weight here, so that a state of another weight, or of another place in it, shows.
STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp_avg": lambda weight: weight.float() * 3 - 1,
    "exp_avg_sq": lambda weight: weight.float() ** 2 + 2,
    "param": lambda weight: weight.float(),
}
ONE_RANK = Target()
SCHEDULE = {"max_lr": 1e-3, "lr_warmup_steps": 4, "num_steps": 24, "lr_decay_style": "cosine"}


def is_decayed(key: str, weight: Tensor) -> bool:
    return weight.dim() > 1 and not key.endswith(".bias")


def is_expert(key: str) -> bool:
    return ".mlp.experts." in key


def weights_of(content: dict[str, Any]) -> list[list[tuple[str, Tensor]]]:
    """The tensors of each chunk in the order of named_parameters()."""
    chunks = [content[key] for key in sorted(content) if key.startswith("model")]
    return [[(key, value) for key, value in chunk.items() if isinstance(value, Tensor)] for chunk in chunks]


def group(wd_mult: float, experts: bool, **more: Any) -> dict[str, Any]:
    return {"wd_mult": wd_mult, "betas": (0.9, 0.95), "lr": 1e-3, "is_expert_parallel": experts, **more}


def plain_adam(weights: list[tuple[str, Tensor]], experts: bool, first: bool) -> dict[str, Any]:
    """Megatron's state dictionary of plain Adam; `first`: whether the group that decays comes first."""
    state: dict[int, Any] = {}
    groups, masters = [], []
    for decays in (first, not first):
        members = [weight for key, weight in weights if is_decayed(key, weight) == decays]
        numbers = list(range(len(state), len(state) + len(members)))
        for number, weight in zip(numbers, members, strict=True):
            moments = {kind: STATES[kind](weight) for kind in ("exp_avg", "exp_avg_sq")}
            state[number] = {"step": torch.tensor(6.0), **moments}
        groups.append(group(float(decays), experts, params=numbers))
        masters.append([STATES["param"](weight) for weight in members if weight.dtype != torch.float32])
    inner = {"state": state, "param_groups": groups}
    if not any(masters):
        return inner  # as Megatron has it in fp32
    return {"optimizer": inner, "fp32_from_fp16_params": masters}


def flat_buffer(weights: list[tuple[str, Tensor]], shared: str | None = None) -> dict[str, Any]:
    """A buffer of the distributed optimizer: parameters in reverse order, from multiples of 64 on."""
    pieces: dict[str, list[Tensor]] = {kind: [] for kind in STATES}
    position = 0
    for _, weight in reversed(weights):
        gap = -position % 64
        for kind, function in STATES.items():
            pieces[kind] += [torch.full((gap,), math.nan), function(weight).flatten()]
        position += gap + weight.numel()
    return {**{kind: torch.cat(parts) for kind, parts in pieces.items()}, "numel_unpadded": position}


def distributed(chunks: list[list[tuple[str, Tensor]]]) -> dict[Any, Any]:
    buffers: dict[Any, Any] = {"buckets_coalesced": True}
    for number, chunk in enumerate(chunk for chunk in chunks if chunk):
        buffers[number] = {(chunk[0][1].dtype, torch.float32): flat_buffer(chunk)}
    return buffers


def train(folder: Path, target: Target, kind: str) -> None:
    """Put an optimizer's state into every rank's file, as Megatron would."""
    for path in sorted(folder.glob("iter_*/mp_rank_*/model_optim_rng.pt")):
        content = torch.load(path, weights_only=False)
        chunks = weights_of(content)
        parts = [chunks]
        if target.ep > 1:
            parts = [
                [[(key, weight) for key, weight in chunk if is_expert(key) == wanted] for chunk in chunks]
                for wanted in (False, True)
            ]
        if kind == "plain":
            made: list[Any] = [
                plain_adam([item for chunk in part for item in chunk], number == 1, first=path.parent.name[9] == "0")
                for number, part in enumerate(parts)
            ]
        else:
            groups = [group(1.0, False, step=6.0), group(0.0, False, step=6.0)]
            made = [{"optimizer": {"param_groups": groups}} for _ in parts]
            saved: list[Any] = [distributed(part) for part in parts]
            if target.ep > 1 and not path.parent.name.endswith("_000"):
                saved[0] = None  # gathered by the first expert-parallel rank
            torch.save(saved[0] if len(saved) == 1 else saved, path.parent / "distrib_optim.pt")
        content["optimizer"] = made[0] if len(made) == 1 else made
        content["opt_param_scheduler"] = SCHEDULE
        content["rng_state"] = [{"torch_rng_state": torch.zeros(8, dtype=torch.uint8)}]
        content["args"].consumed_train_samples = 24
        torch.save(content, path)


def check(found: StoredModel, source: StoredModel, kinds: tuple[str, ...] = tuple(STATES)) -> None:
    assert found.optimizer.keys() == {f"{kind}.{name}" for kind in kinds for name in source.tensors}
    for name, tensor in source.tensors.items():
        for kind in kinds:
            state = found.optimizer[f"{kind}.{name}"]
            assert state.shape == tensor.shape
            assert state.dtype == torch.float32
            assert torch.equal(state.read(), STATES[kind](tensor.read().to(found.tensors[name].dtype))), (kind, name)


@pytest.mark.parametrize("kind", ["plain", "distributed"])
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("qwen2", Target(dtype=torch.bfloat16)),
        ("qwen3", Target(tp=2, pp=2, num_chunks=2, dtype=torch.bfloat16)),
        ("llama", Target(tp=2, pp=2, layer_list=(1, 3), dtype=torch.bfloat16)),
        ("qwen3_moe", Target(tp=2, dtype=torch.bfloat16, grouped_gemm=True)),
        ("qwen2_moe", Target(ep=2, dtype=torch.bfloat16)),
        ("mixtral", Target(tp=2, pp=2, ep=2, dtype=torch.bfloat16, grouped_gemm=True, transformer_engine=True)),
    ],
)
def test_states_come_back(
    tiny_hf_folder: Callable[..., Path], tmp_path: Path, family: str, target: Target, kind: str
) -> None:
    experts = {"num_experts": 4} if family in ("qwen2_moe", "qwen3_moe") else {}
    tied = {"tie_word_embeddings": family in ("qwen3", "qwen3_moe")}
    source = hf_model(tiny_hf_folder(family, num_hidden_layers=4, **experts, **tied))
    write_torch(source, tmp_path / "mg", target)
    train(tmp_path / "mg", target, kind)
    found = open_torch(tmp_path / "mg")
    check(found, source)
    assert found.state["step"] == 6
    assert found.state["consumed_train_samples"] == 24
    assert found.state["opt_param_scheduler"] == SCHEDULE
    assert [group["wd_mult"] for group in found.state["param_groups"]][:2] in ([1.0, 0.0], [0.0, 1.0])
    assert found.left_out == ("The random state of Megatron's generators, which are not tessel's.",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_of_sgd_comes_back(tiny_hf_folder: Callable[..., Path], tmp_path: Path, dtype: torch.dtype) -> None:
    source = hf_model(tiny_hf_folder("qwen2"))
    write_torch(source, tmp_path, Target(tp=2, dtype=dtype))
    train(tmp_path, Target(tp=2), "plain")
    for path in tmp_path.glob("iter_*/mp_rank_*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        inner = content["optimizer"].get("optimizer", content["optimizer"])
        for number, state in inner["state"].items():
            inner["state"][number] = {"momentum_buffer": state["exp_avg"]}
        torch.save(content, path)
    found = open_torch(tmp_path)
    momentum = "momentum_buffer."
    assert {name for name in found.optimizer if not name.startswith("param.")} == {momentum + n for n in source.tensors}
    renamed = {name.replace(momentum, "exp_avg."): state for name, state in found.optimizer.items()}
    kinds = ("exp_avg",) if dtype == torch.float32 else ("exp_avg", "param")
    check(replace(found, optimizer=renamed), source, kinds)


GROUPS = [
    {"wd_mult": decays, "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1 * decays}
    for decays in (1.0, 0.0)
]


def with_states(source: StoredModel) -> StoredModel:
    """A source as a run of our own leaves it: weights in fp32, and moments."""
    states = {
        f"{kind}.{name}": LoadedTensor(name, Path(), STATES[kind](tensor.read()))
        for kind in ("exp_avg", "exp_avg_sq")
        for name, tensor in source.tensors.items()
    }
    state = {"step": 6, "consumed_train_samples": 24, "opt_param_scheduler": SCHEDULE, "param_groups": GROUPS}
    return replace(source, optimizer=states, state=state)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("qwen2", Target(iteration=6)),
        ("qwen3", Target(tp=2, pp=2, num_chunks=2, dtype=torch.bfloat16, iteration=6)),
        ("qwen3_moe", Target(tp=2, dtype=torch.float16, grouped_gemm=True, iteration=6)),
        ("qwen2_moe", Target(ep=2, dtype=torch.bfloat16, iteration=6)),
        ("llama", Target(pp=2, transformer_engine=True, dtype=torch.bfloat16, iteration=6)),
        (
            "mixtral",
            Target(tp=2, pp=2, ep=2, dtype=torch.bfloat16, grouped_gemm=True, transformer_engine=True, iteration=6),
        ),
    ],
)
def test_states_are_written(tiny_hf_folder: Callable[..., Path], tmp_path: Path, family: str, target: Target) -> None:
    experts = {"num_experts": 4} if family in ("qwen2_moe", "qwen3_moe") else {}
    source = with_states(hf_model(tiny_hf_folder(family, num_hidden_layers=4, vocab_size=300, **experts)))
    write_torch(source, tmp_path / "mg", target, with_optimizer=True)
    found = open_torch(tmp_path / "mg")
    kinds = MOMENTS if target.dtype is None else KINDS
    assert found.optimizer.keys() == {f"{kind}.{name}" for kind in kinds for name in source.tensors}
    for name, tensor in source.tensors.items():
        for kind in kinds:  # of the weights in fp32, not of those in the file
            assert torch.equal(found.optimizer[f"{kind}.{name}"].read(), STATES[kind](tensor.read())), (kind, name)
    assert (found.iteration, found.state["step"], found.state["consumed_train_samples"]) == (6, 6, 24)
    assert found.state["opt_param_scheduler"] == SCHEDULE and found.left_out == ()
    assert differing_copies(found) == []
    num_copies = 0 if target.tp == target.ep == 1 else len(found.copies)
    assert (num_copies > 0) == (target.tp * target.ep > 1)


def test_groups_are_megatrons(tiny_hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    """As it makes them: in the order in which a rank's parameters meet them, which on later stages is norms first."""
    source = with_states(hf_model(tiny_hf_folder("qwen2")))
    write_torch(source, tmp_path, Target(pp=2, dtype=torch.float16), with_optimizer=True)
    for stage, decayed_first in ((0, True), (1, False)):
        content = torch.load(tmp_path / f"iter_0000001/mp_rank_00_{stage:03d}/model_optim_rng.pt", weights_only=False)
        weights = [(key, value) for key, value in content["model"].items() if isinstance(value, Tensor)]
        inner, masters = content["optimizer"]["optimizer"], content["optimizer"]["fp32_from_fp16_params"]
        first, second = inner["param_groups"]
        assert (first["wd_mult"], second["wd_mult"]) == ((1.0, 0.0) if decayed_first else (0.0, 1.0))
        numbers = [*first["params"], *second["params"]]
        assert numbers == list(range(len(weights))) == list(inner["state"])
        expected = [
            [value for key, value in weights if is_decayed(key, value) == bool(group["wd_mult"])]
            for group in (first, second)
        ]
        assert [[value.shape for value in group] for group in masters] == [[v.shape for v in g] for g in expected]
        assert all(state["step"] == 6 for state in inner["state"].values())
        own = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "max_lr": 1e-3, "lr_mult": 1.0, "step": 6,
               "is_expert_parallel": False, "is_decoupled_lr": False}  # fmt: skip
        assert first.items() >= own.items() and second.items() >= own.items()
        assert "grad_scaler" not in content["optimizer"], "the source had none"


def test_a_scaler_and_decoupled_rates(tiny_hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = with_states(hf_model(tiny_hf_folder("qwen2")))
    scaler = {"scale": 1024.0, "growth_tracker": 3, "hysteresis_tracker": 2}
    decoupled = {**GROUPS[0], "is_decoupled_lr": True, "max_lr": 5e-3}
    state = {**source.state, "grad_scaler": scaler, "param_groups": [*GROUPS, decoupled]}
    write_torch(replace(source, state=state), tmp_path, Target(dtype=torch.float16), with_optimizer=True)
    found = open_torch(tmp_path)
    assert float(found.state["grad_scaler"]["scale"]) == 1024.0 and found.state["grad_scaler"]["growth_tracker"] == 3
    assert [(group["is_decoupled_lr"], group["max_lr"]) for group in found.state["param_groups"]] == [
        (True, 5e-3), (False, 1e-3), (False, 1e-3),
    ]  # fmt: skip
    assert len(found.optimizer) == 3 * len(found.tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"opt_param_scheduler": None}, "has no schedule"),
        ({"param_groups": []}, "has no numbers of the optimizer's groups"),
    ],
)
def test_a_state_that_megatron_could_not_go_on_from(
    tiny_hf_folder: Callable[..., Path], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    source = with_states(hf_model(tiny_hf_folder("qwen2")))
    state = {key: value for key, value in {**source.state, **change}.items() if value is not None}
    with pytest.raises(TesselError, match=f"{said}.*Leave the optimizer out"):
        write_torch(replace(source, state=state), tmp_path, Target(), with_optimizer=True)
    moments = {key: value for key, value in source.optimizer.items() if not key.endswith("model.norm.weight")}
    with pytest.raises(TesselError, match="another optimizer than Adam"):
        write_torch(replace(source, optimizer=moments), tmp_path, Target(), with_optimizer=True)


@pytest.fixture
def trained(tiny_hf_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, StoredModel]]:
    def make(kind: str, target: Target = ONE_RANK) -> tuple[Path, StoredModel]:
        source = hf_model(tiny_hf_folder("llama"))
        write_torch(source, tmp_path / "mg", target)
        train(tmp_path / "mg", target, kind)
        return tmp_path / "mg", source

    return make


def test_fp32_has_no_master_weights(trained: Callable[..., tuple[Path, StoredModel]]) -> None:
    folder, source = trained("plain")
    check(open_torch(folder), source, ("exp_avg", "exp_avg_sq"))


def test_a_box_of_a_state(trained: Callable[..., tuple[Path, StoredModel]]) -> None:
    folder, source = trained("distributed", Target(tp=2, dtype=torch.bfloat16))
    name = "model.layers.1.mlp.gate_proj.weight"
    box = (slice(20, 40), slice(3, 7))
    weight = source.tensors[name].read(box).bfloat16()
    assert torch.equal(open_torch(folder).optimizer[f"exp_avg.{name}"].read(box), STATES["exp_avg"](weight))


def test_a_release_has_no_state(trained: Callable[..., tuple[Path, StoredModel]]) -> None:
    folder, _ = trained("plain")
    (folder / "iter_0000001").rename(folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    found = open_torch(folder)
    assert (found.optimizer, found.state, found.left_out) == ({}, {}, ())


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["optimizer"]["state"][3].pop("exp_avg"), "exp_avg in mp_rank_00 of .* is None and should be"),
        (lambda c: c["optimizer"]["state"][3].update(exp_avg_sq=torch.zeros(2)), r"is \(2,\) and should be"),
        (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(), "has other parameters than the model"),
        (lambda c: c["optimizer"].update(state={}), "should have it in distrib_optim.pt, which is missing"),
    ],
)
def test_what_cannot_be_carried_over_is_said(
    trained: Callable[..., tuple[Path, StoredModel]], change: Callable[[Any], Any], words: str
) -> None:
    folder, source = trained("plain")
    edit(folder / "iter_0000001/mp_rank_00/model_optim_rng.pt", change)
    found = open_torch(folder)
    assert found.optimizer == {}
    assert found.tensors.keys() == source.tensors.keys()
    _, reason = found.left_out
    with pytest.raises(AssertionError, match=f"The optimizer's state: .*{words}"):
        raise AssertionError(reason)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("buckets_coalesced"), "before Megatron joined the buckets"),
        (lambda c: c.update({1: c[0]}), "has 2 buffers, and the model 1"),
        (lambda c: next(iter(c[0].values())).pop("exp_avg"), "none of Adam's"),
        (lambda c: [s.update({k: s[k][:-64] for k in STATES}) for s in c[0].values()], "do not fill in any order"),
    ],
)
def test_buffers_that_do_not_fit_are_said(
    trained: Callable[..., tuple[Path, StoredModel]], change: Callable[[Any], Any], words: str
) -> None:
    folder, _ = trained("distributed", Target(dtype=torch.bfloat16))
    edit(folder / "iter_0000001/mp_rank_00/distrib_optim.pt", change)
    found = open_torch(folder)
    assert found.optimizer == {}
    assert words in found.left_out[1]


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name",
    ["mp_qwen2tiedmini_pp2_distopt", "mp_qwen3mini_dp2_distopt", "mp_qwen3mini_optim", "mp_qwen3moe_ep2_distopt"],
)
def test_states_that_megatron_wrote(shared: Path, name: str) -> None:
    """The bf16 rounding of each master weight is the weight of the same checkpoint; both moments are there."""
    case = shared / "oracle/checkpoints/cases" / name
    found = open_torch(case / "checkpoint", hf_dir=case.parent.parent / "hf" / manifest_of(case)["model"])
    assert found.optimizer.keys() == {f"{kind}.{key}" for kind in STATES for key in found.tensors}
    for key, tensor in found.tensors.items():
        assert torch.equal(found.optimizer[f"param.{key}"].read().bfloat16(), tensor.read()), key
        assert bool((found.optimizer[f"exp_avg_sq.{key}"].read() >= 0).all()), key
    moved = [key for key in found.tensors if found.optimizer[f"exp_avg.{key}"].read().abs().max() > 1e-6]
    assert len(moved) == len(found.tensors)
    assert found.state["step"] == (1 if "moe" in name else 2)
    assert found.state["consumed_train_samples"] == found.state["opt_param_scheduler"]["num_steps"]
    assert found.iteration == 5


@pytest.mark.oracle
def test_plain_and_flat_states_are_of_the_same_weights(shared: Path) -> None:
    """The two runs began with the same model, and Adam's first steps move weights by the rate whatever the gradient."""
    cases = shared / "oracle/checkpoints"
    hf = cases / "hf/qwen3_mini_bf16"
    start = hf_model(hf).tensors
    for name in ("mp_qwen3mini_optim", "mp_qwen3mini_dp2_distopt"):
        found = open_torch(cases / "cases" / name / "checkpoint", hf_dir=hf)
        for key, tensor in start.items():
            moved = (found.optimizer[f"param.{key}"].read() - tensor.read().float()).abs().max()
            assert 1e-4 < float(moved) < 5e-3, (name, key)
