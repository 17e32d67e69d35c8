"""Adapters merged on the way to another format, and the exchange with peft: the same numbers, not nearly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tessel.checkpoint.adapters import write_peft
from tessel.checkpoint.fill import fill_adapters
from tessel.checkpoint.huggingface import load_into
from tessel.cli import main
from tessel.generate.engine import load_model
from tessel.layout.adapters import AdapterSpec, groups_of
from tessel.model.config import ModelConfig
from tessel.model.transformer import Transformer
from tests.train.test_lora import adapter_of, data, random_adapter, train

MakeFolder = Callable[..., Path]
__all__ = ["data"]
FUSED = ["--lora-target-modules", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@pytest.fixture
def run(tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a run that trained adapters beside it under the names of Megatron's fused projections."""
    folder = tiny_hf_folder("qwen2")
    train(folder, data, tmp_path / "run", *FUSED)
    return folder, tmp_path / "run"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merged_on_the_way_to_every_format(run: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    """`tessel merge`, and `tessel convert` to Hugging Face, and to Megatron and back: W + scale B A in each."""
    folder, trained = run
    assert main(["merge", "--lora-load", str(trained), "--save", str(tmp_path / "merged")]) == 0
    adapter = ["--lora-load", str(trained), "--lora-r", "4", "--lora-alpha", "8", *FUSED]
    convert = ["convert", "--load", str(folder)]
    assert main([*convert, *adapter, "--to", "hf", "--save", str(tmp_path / "hf")]) == 0
    cut = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    assert main([*convert, *adapter, "--to", "torch", *cut, "--save", str(tmp_path / "megatron")]) == 0
    assert main(["convert", "--load", str(tmp_path / "megatron"), "--to", "hf", "--save", str(tmp_path / "back")]) == 0
    merged, base = weights_of(tmp_path / "merged"), weights_of(folder)
    assert same(weights_of(tmp_path / "hf"), merged) and same(weights_of(tmp_path / "back"), merged)
    tensors = adapter_of(trained)
    name = "model.layers.1.mlp.down_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * b @ a, rtol=0, atol=1e-6)
    for more in (["--lora-r", "8"], ["--lora-alpha", "4"], ["--lora-target-modules", "linear_qkv"]):
        other = ["--lora-load", str(trained), *more, "--to", "hf", "--save", str(tmp_path / "other")]
        capsys.readouterr()
        assert main([*convert, *other]) == 2
        assert re.search(r"holds another adapter than .*stored: ", capsys.readouterr().err)


def test_a_shared_a_computes_as_its_copies_to_the_bit(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    """Of the fused projections: here they share one A; in the folder for peft each has a copy of it."""
    folder = tiny_hf_folder("qwen2")
    spec = AdapterSpec(4, 8.0, groups_of(FUSED[1:]))
    config = replace(ModelConfig.from_folder(folder), adapters=spec)
    tensors = random_adapter(config, spec)
    with torch.device("meta"):
        shared = Transformer(config).eval()
    load_into(shared, folder)
    fill_adapters(shared, tensors)
    write_peft(tmp_path / "adapter", iter(tensors.items()), spec, str(folder))
    copies, other = load_model(folder, adapter=tmp_path / "adapter")
    assert other.adapters is not None and len(spec.groups) == 4 and len(other.adapters.groups) == 7
    tokens = torch.arange(12)[None] * 7
    with torch.no_grad():
        assert torch.equal(shared(tokens), copies(tokens))


def test_peft_computes_what_it_computed_before_the_exchange(
    tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path
) -> None:
    """peft's adapter, taken over and written again without training: peft's logits differ by 0."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny_hf_folder("qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first: Any = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    )
    first.save_pretrained(tmp_path / "theirs")
    train(folder, data, tmp_path / "run", "--lora-load", str(tmp_path / "theirs"), "--lr", "0", "--min-lr", "0")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    second: Any = PeftModel.from_pretrained(again, tmp_path / "run" / "adapter")
    tokens = torch.arange(12)[None] * 7
    with torch.no_grad():
        assert torch.equal(first.eval()(tokens).logits, second(tokens).logits)
