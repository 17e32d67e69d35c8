"""Adapters beside weights in four bits: as peft and bitsandbytes train them, and the same on every layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessel.checkpoint.huggingface import open_folder
from tessel.cli import main
from tessel.model.quantized import quantize_nf4
from tests.train.test_lora import adapter_of, data, flags, losses, samples_of, train, train_together

MakeFolder = Callable[..., Path]
__all__ = ["data"]
QLORA = ["--qlora"]


@pytest.fixture(scope="module")
def quantizes(request: pytest.FixtureRequest) -> Any:
    """transformers, peft and bitsandbytes, where all are installed."""
    pytest.importorskip("bitsandbytes")
    return pytest.importorskip("peft")


def test_trains_as_peft_beside_bitsandbytes(
    quantizes: Any, tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path, capsys: Any
) -> None:
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    # bitsandbytes 0.50 dequantises wrongly on the CPU where rows are shorter than a block.
    folder = tiny_hf_folder("qwen2", hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        for block, names in ((layer.self_attn, ("q", "k", "v", "o")), (layer.mlp, ("gate", "up", "down"))):
            for name in names:
                linear = getattr(block, f"{name}_proj")
                codes, state = bnb.functional.quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")
                with torch.compiler.set_stance("force_eager"):
                    linear.weight.data = bnb.functional.dequantize_4bit(codes, state)
    model = quantizes.get_peft_model(model, quantizes.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "start")
    ours = train(folder, data, tmp_path / "run", "--lora-load", str(tmp_path / "start"), *QLORA)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    theirs = []
    for tokens in samples_of(folder, data, tmp_path, capsys):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=1e-5)


LAYOUTS = {
    "TP2 PP2": "--nproc-per-node 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    "FSDP2": "--nproc-per-node 2 --data-parallel-sharding-strategy optim_grads_params",
    "TP2 bf16": "--nproc-per-node 2 --tensor-model-parallel-size 2 --sequence-parallel --bf16",
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_trains_the_same(layout: str, tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path) -> None:
    folder = tiny_hf_folder("qwen2")
    in_bf16 = ["--bf16"] if "bf16" in layout else []
    double = [*QLORA, "--qlora-double-quant"]
    alone = train(folder, data, tmp_path / "one", *double, *in_bf16)
    many = train_together(folder, data, tmp_path / "many", *double, *LAYOUTS[layout].split())
    assert many == pytest.approx(alone, rel=2e-3 if in_bf16 else 1e-5)
    assert alone != train(folder, data, tmp_path / "plain", *in_bf16)


@pytest.fixture
def mixture(tiny_hf_folder: MakeFolder) -> Path:
    return tiny_hf_folder("qwen3_moe", num_experts=4)


@pytest.mark.parametrize("double", [False, True])
def test_experts_are_quantised_one_by_one(double: bool, mixture: Path, data: Path, tmp_path: Path) -> None:
    """The losses beside a model whose projections, each expert's among them, went through NF4 before."""
    rounded = tmp_path / "rounded"
    shutil.copytree(mixture, rounded)
    weights = load_file(rounded / "model.safetensors")
    projections = [name for name in weights if name.endswith("_proj.weight")]
    assert sum(".experts." in name for name in projections) == 2 * 4 * 3
    for name in projections:
        weights[name] = quantize_nf4(weights[name], double).dequantize()
    save_file(weights, rounded / "model.safetensors", {"format": "pt"})
    more = [*QLORA, "--qlora-double-quant"] if double else QLORA
    assert train(mixture, data, tmp_path / "four", *more) == pytest.approx(
        train(rounded, data, tmp_path / "plain"), rel=1e-6
    )


@pytest.mark.parametrize(
    "layout",
    [
        "--nproc-per-node 2 --expert-model-parallel-size 2",
        "--nproc-per-node 4 --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2 "
        "--data-parallel-sharding-strategy optim_grads_params",
    ],
)
def test_every_layout_trains_a_mixture_the_same(layout: str, mixture: Path, data: Path, tmp_path: Path) -> None:
    double = [*QLORA, "--qlora-double-quant"]
    alone = train(mixture, data, tmp_path / "one", *double)
    many = train_together(mixture, data, tmp_path / "many", *double, *layout.split())
    assert many == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_a_resumed_run_is_the_unbroken_one(
    precision: list[str], tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path
) -> None:
    folder = tiny_hf_folder("qwen2")
    more = [*QLORA, "--save-interval", "2", *precision]
    unbroken = train(folder, data, tmp_path / "one", *more)
    train(folder, data, tmp_path / "two", *more, "--exit-interval", "2")
    assert train(folder, data, tmp_path / "two", *more)[-4:] == unbroken
    first, second = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_weights_are_another_run(tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tiny_hf_folder("qwen2")
    train(folder, data, tmp_path / "run", *QLORA)
    assert main(flags(folder, data, tmp_path / "run")) == 1
    assert "model: adapters was" in capsys.readouterr().err


def test_beside_the_checkpoint_of_a_run(tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path) -> None:
    """The same weights from a run's own checkpoint and from its Hugging Face folder."""
    folder = tiny_hf_folder("qwen2")
    arguments = flags(folder, data, tmp_path / "full")
    at = arguments.index("--lora-r")
    assert main(arguments[:at] + arguments[at + 2 :]) == 0
    from_run = train(tmp_path / "full", data, tmp_path / "a", "--finetune", *QLORA)
    from_hf = train(tmp_path / "full" / "hf", data, tmp_path / "b", *QLORA)
    assert from_run == from_hf
    assert open_folder(tmp_path / "full" / "hf").tensors and losses(tmp_path / "a") == from_run


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--qlora"], "--qlora is for adapters"),
        (["--use-rslora"], "--use-rslora is for adapters"),
        (["--lora-r", "4", "--qlora-double-quant"], "--qlora-double-quant is for --qlora"),
    ],
)
def test_flags_without_what_they_are_for(
    more: list[str], match: str, tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = flags(tiny_hf_folder("qwen2"), data, tmp_path / "run")
    at = arguments.index("--lora-r")
    assert main(arguments[:at] + arguments[at + 2 :] + more) == 2
    assert match in capsys.readouterr().err


def test_a_random_model_is_not_quantised(data: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = flags(tmp_path, data, tmp_path / "run", *QLORA)
    at = arguments.index("--load")
    shape = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 32 --swiglu
        --normalization RMSNorm --position-embedding-type rope --disable-bias-linear"""
    assert main(arguments[:at] + arguments[at + 2 :] + shape.split()) == 2
    assert "--qlora needs --load" in capsys.readouterr().err
