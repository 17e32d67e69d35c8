"""`tessel verify`: what is equal, what is not, and by how much."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessel.convert.work import MANIFEST

MakeFolder = Callable[..., Path]
Run = Callable[..., Any]
NAME = "model.layers.1.self_attn.k_proj.weight"


def changed(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def add(tensors: dict[str, torch.Tensor], amount: float) -> None:
    tensors[NAME][3, 5] += amount


def test_one_value_is_found_in_another_format(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("qwen2")
    other = changed(folder, tmp_path / "other", lambda tensors: add(tensors, 0.5))
    for source in (folder, other):
        degrees = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
        assert tessel("convert", "--load", source, "--save", tmp_path / f"mg_{source.name}", *degrees).status == 0
    assert tessel("verify", tmp_path / f"mg_{folder.name}", folder).status == 0
    said = tessel("verify", tmp_path / "mg_other", folder)
    assert said.status == 1
    assert f"  {NAME} differs in 1 of 512 values, by 0.5 at most, first at [3, 5]\n" in said.out
    assert "different: 1 of 27 tensors differ" in said.out


def test_a_tolerance(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("llama")
    other = changed(folder, tmp_path / "other", lambda tensors: add(tensors, 1e-3))
    assert tessel("verify", folder, other).status == 1
    assert tessel("verify", folder, other, "--tolerance", 1e-4).status == 1
    assert tessel("verify", folder, other, "--tolerance", 2e-3).status == 0
    assert tessel("verify", folder, other, "--tolerance", -1).status == 2


def test_dtypes_shapes_and_names(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("llama")

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME] = tensors[NAME].bfloat16()

    half = changed(folder, tmp_path / "half", halve)
    said = tessel("verify", folder, half, "--json")
    found = json.loads(said.out)
    assert said.status == 1 and found["equal"] is False
    assert found["differences"] == {NAME: "is float32 in the first and bfloat16 in the second"}
    assert tessel("verify", folder, half, "--tolerance", 0.01).status == 0
    deeper = tiny_hf_folder("llama", num_hidden_layers=3, vocab_size=308)
    differences = json.loads(tessel("verify", folder, deeper, "--json").out)["differences"]
    assert differences["model.layers.2.input_layernorm.weight"] == "is in the second alone"
    assert differences["lm_head.weight"] == "is [307, 32] in the first and [308, 32] in the second"


def test_not_a_number_equals_itself(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("llama")
    spoilt = changed(folder, tmp_path / "nan", lambda tensors: add(tensors, float("nan")))
    assert tessel("verify", spoilt, changed(spoilt, tmp_path / "copy", lambda tensors: None)).status == 0
    assert tessel("verify", spoilt, folder, "--tolerance", 1e9).status == 1


def test_a_folder_against_its_manifest(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tmp_path / "mg"
    assert tessel("convert", "--load", tiny_hf_folder("qwen2"), "--save", folder).status == 0
    said = tessel("verify", folder)
    assert said.status == 0 and "5 of 5 files are as MANIFEST.json says" in said.out
    manifest = json.loads((folder / MANIFEST).read_text())
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    assert set(manifest["files"]) == written
    assert len(manifest["tensors"]) == 27 and manifest["format"] == "torch"
    weights = folder / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    content = bytearray(weights.read_bytes())
    content[5000] ^= 1
    weights.write_bytes(content)
    said = tessel("verify", folder)
    assert said.status == 1 and "model_optim_rng.pt has another sha256" in said.out
    weights.write_bytes(content[:-1])
    assert "bytes instead of" in tessel("verify", folder).out
    weights.unlink()
    assert "model_optim_rng.pt is missing" in tessel("verify", folder).out


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"files": {"a": {"bytes": 1}}}', '{"files": {"../x": {"bytes": 1, "sha256": ""}}}']
)
def test_a_damaged_manifest(content: str, tmp_path: Path, tessel: Run) -> None:
    (tmp_path / MANIFEST).write_text(content)
    said = tessel("verify", tmp_path)
    assert said.status == 1 and said.err.startswith("tessel: error: ") and MANIFEST in said.err


def test_how_many_folders(tiny_hf_folder: MakeFolder, tessel: Run) -> None:
    folder = tiny_hf_folder("llama")
    assert tessel("verify", folder, folder, folder).status == 2
    said = tessel("verify", folder)
    assert said.status == 1 and "has no MANIFEST.json" in said.err


def test_copies_that_disagree_inside_a_checkpoint(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("qwen2")
    degrees = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
    assert tessel("convert", "--load", folder, "--save", tmp_path / "mg", *degrees).status == 0
    path = tmp_path / "mg" / "iter_0000001" / "mp_rank_01_001" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.final_layernorm.weight"][3] += 0.25
    torch.save(content, path)
    said = tessel("verify", folder, tmp_path / "mg")
    assert said.status == 1
    what = "should be a copy of what mp_rank_00_001 has, and differs in 1 of 32 values, by 0.25 at most, first at [3]"
    assert f"  {tmp_path}/mg/mp_rank_01_001: decoder.final_layernorm.weight {what}\n" in said.out
    assert "different: 0 of 27 tensors differ; 1 copies of tensors differ from one another" in said.out
    assert tessel("verify", folder, tmp_path / "mg", "--tolerance", 0.3).status == 0
    found = json.loads(tessel("verify", tmp_path / "mg", tmp_path / "mg", "--json").out)
    assert found["equal"] is False and len(found["differences"]) == 1
