"""Adapters beside the experts of a mixture: each expert's own, on any layout, saved, read again and merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.checkpoint.adapters import open_adapter
from tessel.cli import main
from tessel.generate.engine import load_model
from tessel.model.config import ModelConfig
from tests.train.test_lora import adapter_of, data, flags, train, train_together

MakeFolder = Callable[..., Path]
__all__ = ["data"]
TARGETS = ["--lora-target-modules", "linear_qkv", "linear_fc1", "down_proj"]


@pytest.fixture
def mixture(tiny_hf_folder: MakeFolder) -> Path:
    return tiny_hf_folder("qwen3_moe", num_experts=4)


def test_each_expert_has_its_own(mixture: Path, data: Path, tmp_path: Path) -> None:
    losses = train(mixture, data, tmp_path / "run", *TARGETS)
    saved = adapter_of(tmp_path / "run")
    name = "base_model.model.model.layers.0.mlp.experts.{}.{}_proj.lora_{}.weight".format
    config = ModelConfig.from_folder(mixture)
    assert saved[name(0, "up", "A")].shape == (4, config.hidden_size)
    assert torch.equal(saved[name(1, "up", "A")], saved[name(1, "gate", "A")]), "shared, as in linear_fc1"
    assert not torch.equal(saved[name(0, "down", "B")], saved[name(1, "down", "B")])
    again = open_adapter(tmp_path / "run", config)
    assert again.tensors["model.layers.0.mlp.experts.lora.down_proj.A"].shape[0] == config.num_experts
    without = train(mixture, data, tmp_path / "attention", "--lora-target-modules", "linear_qkv")
    assert losses[0] == without[0] and losses[1:] != without[1:]


def test_peft_opens_it(mixture: Path, data: Path, tmp_path: Path) -> None:
    """Whose experts are stacked, too, with gate and up in one matrix."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train(mixture, data, tmp_path / "run", *TARGETS)
    adapter = tmp_path / "run" / "adapter"
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32), adapter)
    ours, _ = load_model(mixture, adapter=adapter)
    tokens = torch.arange(12)[None] * 7
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=5e-6)


def test_by_hand(mixture: Path, data: Path, tmp_path: Path) -> None:
    """What is computed with adapters is what the merged model computes, in which each expert is W + scale B A."""
    train(mixture, data, tmp_path / "run", *TARGETS)
    adapter = tmp_path / "run" / "adapter"
    assert main(["merge", "--lora-load", str(tmp_path / "run"), "--save", str(tmp_path / "merged")]) == 0
    plain, _ = load_model(mixture)
    unmerged, _ = load_model(mixture, adapter=adapter)
    merged, config = load_model(tmp_path / "merged")
    tokens = torch.arange(12)[None] * 7
    with torch.no_grad():
        torch.testing.assert_close(unmerged(tokens), merged(tokens), rtol=0, atol=2e-5)
        assert (plain(tokens) - merged(tokens)).abs().max() > 1e-3
    stored = open_adapter(adapter, config)
    prefix = "model.layers.1.mlp.experts."
    a, b = (stored.tensors[f"{prefix}lora.down_proj.{which}"] for which in "AB")
    for expert in range(config.num_experts):
        expected = plain.get_parameter(prefix + "down_proj")[expert] + 2.0 * b[expert] @ a[expert]
        torch.testing.assert_close(merged.get_parameter(prefix + "down_proj")[expert], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "layout",
    [
        "--nproc-per-node 2 --expert-model-parallel-size 2",
        "--nproc-per-node 4 --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2",
    ],
)
def test_every_layout_trains_the_same(layout: str, mixture: Path, data: Path, tmp_path: Path) -> None:
    alone = train(mixture, data, tmp_path / "one", *TARGETS)
    many = train_together(mixture, data, tmp_path / "many", *TARGETS, *layout.split())
    assert many == pytest.approx(alone, rel=1e-5)
    whole = adapter_of(tmp_path / "one")
    for name, tensor in adapter_of(tmp_path / "many").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=2e-5)


def test_a_resumed_run_is_the_unbroken_one(mixture: Path, data: Path, tmp_path: Path) -> None:
    more = [*TARGETS, "--save-interval", "2"]
    unbroken = train(mixture, data, tmp_path / "one", *more)
    train(mixture, data, tmp_path / "two", *more, "--exit-interval", "2")
    assert train(mixture, data, tmp_path / "two", *more)[-4:] == unbroken


def test_an_adapter_without_experts_is_read(mixture: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    train(mixture, data, tmp_path / "run", "--lora-target-modules", "q_proj")
    assert not open_adapter(tmp_path / "run", ModelConfig.from_folder(mixture)).spec.experts
    assert main(flags(mixture, data, tmp_path / "dora", "--use-dora")) == 2
    assert "--use-dora is not for experts" in capsys.readouterr().err
