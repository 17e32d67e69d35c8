"""DoRA: as peft trains it, on any layout, beside weights in four bits, merged and switched off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.cli import main
from tessel.generate.engine import load_model
from tessel.layout.adapters import AdapterSpec, groups_of
from tessel.layout.sharding import parameters
from tessel.model.config import ModelConfig
from tests.train.test_lora import adapter_of, data, flags, samples_of, train, train_together

MakeFolder = Callable[..., Path]
__all__ = ["data"]
DORA = ["--use-dora"]


def test_trains_as_peft_does(tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path, capsys: Any) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny_hf_folder("qwen2")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True))
    model.save_pretrained(tmp_path / "start")
    ours = train(folder, data, tmp_path / "run", "--lora-load", str(tmp_path / "start"), *DORA)

    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, 1e-2, betas=(0.9, 0.999), eps=1e-8)
    theirs = []
    for tokens in samples_of(folder, data, tmp_path, capsys):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=1e-5)
    for name, tensor in adapter_of(tmp_path / "run").items():
        expected = trained[name.replace("magnitude_vector", "magnitude_vector.weight")].detach()
        torch.testing.assert_close(tensor, expected, rtol=0, atol=3e-5)

    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(again, tmp_path / "run" / "adapter")
    tokens = torch.arange(12)[None] * 7
    unmerged, _ = load_model(folder, adapter=tmp_path / "run" / "adapter")
    assert main(["merge", "--lora-load", str(tmp_path / "run"), "--save", str(tmp_path / "merged")]) == 0
    merged, _ = load_model(tmp_path / "merged")
    with torch.no_grad():
        expected = reloaded(tokens).logits
        torch.testing.assert_close(unmerged(tokens), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(merged(tokens), expected, rtol=0, atol=1e-5)


def test_it_starts_as_the_model_itself(tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path) -> None:
    """The lengths are those of the weights: the first loss is the one without adapters."""
    folder = tiny_hf_folder("llama")
    with_lengths = train(folder, data, tmp_path / "dora", *DORA)
    without = train(folder, data, tmp_path / "lora")
    assert with_lengths[0] == pytest.approx(without[0], rel=1e-6)
    assert with_lengths[1:] != without[1:]


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel", []),
        (
            "--tensor-model-parallel-size 2 --data-parallel-sharding-strategy optim_grads_params",
            ["--qlora", "--qlora-double-quant"],
        ),
    ],
)
def test_every_layout_trains_the_same(
    layout: str, more: list[str], tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path
) -> None:
    folder = tiny_hf_folder("qwen2")
    alone = train(folder, data, tmp_path / "one", *DORA, *more)
    many = train_together(folder, data, tmp_path / "many", *DORA, *more, "--nproc-per-node", "4", *layout.split())
    assert many == pytest.approx(alone, rel=1e-5)
    whole = adapter_of(tmp_path / "one")
    for name, tensor in adapter_of(tmp_path / "many").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=2e-5)


def test_a_resumed_run_is_the_unbroken_one(tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path) -> None:
    folder = tiny_hf_folder("qwen2")
    more = [*DORA, "--lora-dropout", "0.1", "--save-interval", "2"]
    unbroken = train(folder, data, tmp_path / "one", *more)
    train(folder, data, tmp_path / "two", *more, "--exit-interval", "2")
    assert train(folder, data, tmp_path / "two", *more)[-4:] == unbroken


def test_lora_does_not_go_on_as_dora(tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tiny_hf_folder("qwen2")
    train(folder, data, tmp_path / "run")
    assert main(flags(folder, data, tmp_path / "run", *DORA)) == 1
    assert "model: adapters was" in capsys.readouterr().err
    again = flags(folder, data, tmp_path / "other", "--lora-load", str(tmp_path / "run"), *DORA)
    assert main(again) == 2
    assert "--use-dora" in capsys.readouterr().err


def test_lengths_are_cut_as_the_rows_are(tiny_hf_folder: MakeFolder) -> None:
    from dataclasses import replace

    config = ModelConfig.from_folder(tiny_hf_folder("qwen2"))
    spec = AdapterSpec(4, 8.0, groups_of(["q_proj", "down_proj"]), dora=True)
    rules = parameters(replace(config, adapters=spec))
    column = rules["model.layers.0.self_attn.q_proj.lora.magnitude"]
    row = rules["model.layers.0.mlp.down_proj.lora.magnitude"]
    assert (column.split, column.dim, column.partial_axes) == ("column", 0, ())
    assert (row.split, row.partial_axes) == ("replicated", ("tp",))
    assert not column.weight_decay
