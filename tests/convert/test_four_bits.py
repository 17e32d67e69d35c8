"""Megatron checkpoints in four bits: as bitsandbytes describes them, read in any verb, and written by convert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.checkpoint import torch_file
from tessel.checkpoint.detect import open_model
from tessel.cli import main
from tessel.model.quantized import quantize_nf4

MakeFolder = Callable[..., Path]
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


def converted(folder: Path, save: Path, *more: str) -> Path:
    assert main(["convert", "--load", str(folder), "--save", str(save), "--to", "torch", *more]) == 0
    return save


def rank_file(save: Path) -> Path:
    return sorted(save.glob("iter_*/mp_rank_*/model_optim_rng.pt"))[0]


def test_rank_by_rank_as_bitsandbytes(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    """What stands in the files is what bitsandbytes saves of the same rank's weight."""
    functional = pytest.importorskip("bitsandbytes.functional")
    folder = tiny_hf_folder("qwen2")
    tp2 = ["--tensor-model-parallel-size", "2"]
    plain = torch_file.load(rank_file(converted(folder, tmp_path / "plain", *tp2)))["model"]
    packed = torch_file.load(rank_file(converted(folder, tmp_path / "nf4", *tp2, "--qlora-nf4")))["model"]
    codes, state = functional.quantize_4bit(
        plain[QKV].contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(packed[QKV], codes)
    for name, tensor in state.as_dict(packed=True).items():
        stored = packed[f"{QKV}.{name}"]
        if "bitsandbytes" in name:
            unpack = functional.QuantState.from_dict(
                {"absmax": state.absmax}
                | {name: stored}
                | {key: packed[f"{QKV}.{key}"] for key in ("quant_map", "nested_absmax", "nested_quant_map")},
                device=torch.device("cpu"),
            )
            assert tuple(unpack.shape) == tuple(state.shape) and unpack.dtype == state.dtype
            assert float(unpack.offset) == pytest.approx(float(state.offset), rel=0, abs=0)
        else:
            assert torch.equal(stored, tensor), name
    assert torch.equal(packed["embedding.word_embeddings.weight"], plain["embedding.word_embeddings.weight"])


def test_read_back_and_made_plain(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    folder = tiny_hf_folder("qwen2")
    packed = converted(folder, tmp_path / "nf4", "--qlora-nf4")
    assert main(["convert", "--load", str(packed), "--save", str(tmp_path / "hf"), "--hf-dir", str(folder)]) == 0
    before, after = open_model(folder), open_model(tmp_path / "hf")
    o_proj = "model.layers.0.self_attn.o_proj.weight"
    expected = quantize_nf4(before.tensors[o_proj].read(), double=True).dequantize()
    assert torch.equal(after.tensors[o_proj].read(), expected)
    for name, tensor in after.tensors.items():
        error = (tensor.read() - before.tensors[name].read()).abs().max()
        assert (error == 0) != name.endswith("_proj.weight"), name


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("quant_map", "of another kind than NF4"),
        ("absmax", "is damaged"),
        ("quant_state.bitsandbytes__nf4", "is damaged"),
    ],
)
def test_damaged_states_are_refused(
    change: str, match: str, tiny_hf_folder: MakeFolder, tmp_path: Path, capsys: Any
) -> None:
    packed = converted(tiny_hf_folder("qwen2"), tmp_path / "nf4", "--qlora-nf4")
    path = rank_file(packed)
    content = torch.load(path, weights_only=False)
    if change == "absmax":
        del content["model"][f"{QKV}.absmax"]
    else:
        content["model"][f"{QKV}.{change}"][0] = 3
    torch.save(content, path)
    assert main(["convert", "--load", str(packed), "--save", str(tmp_path / "hf")]) == 1
    assert match in capsys.readouterr().err


def test_only_where_it_can_be_written(tiny_hf_folder: MakeFolder, tmp_path: Path, capsys: Any) -> None:
    command = ["convert", "--load", str(tiny_hf_folder("qwen2")), "--save", str(tmp_path / "x")]
    assert main([*command, "--to", "torch_dist", "--qlora-nf4"]) == 2
    assert "--qlora-nf4 is for weights alone, in the torch format" in capsys.readouterr().err
