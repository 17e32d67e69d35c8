"""`tessel inspect` of every format of checkpoints, and of two against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessel import commands

MakeFolder = Callable[..., Path]
Verb = Callable[..., str]
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def tessel(capsys: pytest.CaptureFixture[str]) -> Verb:
    """What a verb prints."""

    def run(verb: str, *arguments: Any) -> str:
        capsys.readouterr()
        commands.VERBS[verb]([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("to", ["torch", "torch_dist", "legacy"])
def test_a_megatron_checkpoint(to: str, tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Verb) -> None:
    folder, save = tiny_hf_folder("llama", num_hidden_layers=4), tmp_path / "mg"
    degrees = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
    tessel("convert", "--load", folder, "--save", save, "--to", to, *degrees)
    values = json.loads(tessel("inspect", save, "--json", "--tensors"))
    assert (values["kind"], values["family"], values["iteration"]) == (f"{to} checkpoint", "llama", 1)
    assert values["degrees"] == {"tp": 2, "pp": 2}
    assert (values["layers"], values["dtypes"], values["optimizer"]) == (4, ["float32"], {})
    tensors = load_file(folder / "model.safetensors")
    assert values["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    listed = {entry["name"]: entry for entry in values["tensor_list"]}
    assert {name: entry["shape"] for name, entry in listed.items()} == {n: list(t.shape) for n, t in tensors.items()}
    assert listed[NAME]["norm"] == pytest.approx(float(tensors[NAME].double().norm()), rel=1e-12)
    text = tessel("inspect", save)
    assert f"{save}: a checkpoint in the {to} format" in text and "  degrees     TP2 PP2\n" in text
    assert "padded from 307 to 512 rows" in text
    if to != "torch_dist":
        assert "  stage       mp_rank_00_000: layers 0-1\n  stage       mp_rank_00_001: layers 2-3\n" in text


def test_stages_of_virtual_pipelines_and_experts(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Verb) -> None:
    folder = tiny_hf_folder("mixtral", num_hidden_layers=4)
    degrees = (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --expert-model-parallel-size 2"
    )
    tessel("convert", "--load", folder, "--save", tmp_path / "mg", *degrees.split())
    text = tessel("inspect", tmp_path / "mg")
    assert "PP2 VPP2 EP2" in text and "4, 2 of them see a token" in text
    assert "mp_rank_00_000_000: layers 0, 2\n" in text and "mp_rank_00_001_000: layers 1, 3\n" in text


def test_a_converted_run(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Verb) -> None:
    tessel("convert", "--load", tiny_hf_folder("qwen3"), "--save", tmp_path / "run", "--to", "torch_dcp")
    text = tessel("inspect", tmp_path / "run", "--tensors")
    assert f"{tmp_path / 'run'}: a run of tessel" in text
    assert "in 25 tensors, float32" in text and "optimizer       none" in text
    assert f"    {NAME}  [56, 32]  float32  norm " in text


def test_two_against_each_other(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Verb) -> None:
    folder = tiny_hf_folder("qwen2")
    tessel("convert", "--load", folder, "--save", tmp_path / "mg", "--tensor-model-parallel-size", 2)
    values = json.loads(tessel("inspect", folder, "--diff", tmp_path / "mg", "--json"))
    assert values["settings"] == {"format": ["hf", "torch"], "iteration": [None, 1], "degrees": ["one rank", "TP2"]}
    assert (values["equal_tensors"], values["different_tensors"]) == (27, {})
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME][1, 2] = math.pi
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    text = tessel("inspect", tmp_path / "mg", "--diff", folder)
    assert "rms_norm_eps" in text and "1e-06 in the first, 0.5 in the second" in text
    assert "26 equal, 1 different" in text and f"    {NAME} differs in 1 of 1,792 values" in text


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("mp_qwen3mini_optim", {"exp_avg", "exp_avg_sq", "param"}),
        ("mp_qwen3mini_dp2_distopt", {"exp_avg", "exp_avg_sq", "param"}),
        ("td_qwen3mini_fullyresh", {"exp_avg", "exp_avg_sq", "param"}),
        ("td_qwen3_release", set()),
    ],
)
def test_optimizer_states_of_real_checkpoints(case: str, kinds: set[str], shared: Path, tessel: Verb) -> None:
    folder = shared / "oracle" / "checkpoints" / "cases" / case / "checkpoint"
    values = json.loads(tessel("inspect", folder, "--json"))
    assert set(values["optimizer"]) == kinds
    assert bool(values["guessed"]) and (values["state"].get("step") == 2 if kinds else values["iteration"] is None)
    assert torch.bfloat16 in (getattr(torch, name) for name in values["dtypes"])
