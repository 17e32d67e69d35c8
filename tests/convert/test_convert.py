"""Conversions of tiny models: there and back, stopped and continued, and refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessel.checkpoint.detect import open_model
from tessel.convert import work
from tessel.convert.work import MANIFEST, Work

MakeFolder = Callable[..., Path]
Run = Callable[..., Any]
PP2 = ("--pipeline-model-parallel-size", 2)
TP2_PP2 = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)


def weights_of(folder: Path) -> dict[str, bytes]:
    """Every file that has weights or says where they are, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("qwen2", ("--to", "torch", *TP2_PP2)),
        ("qwen3", ("--to", "torch", *TP2_PP2, "--transformer-impl", "transformer_engine")),
        ("llama", ("--to", "legacy", *TP2_PP2)),
        ("llama", ("--to", "torch", "--make-vocab-size-divisible-by", 1, "--release")),
        ("mistral", ("--to", "torch", "--pipeline-model-parallel-size", 2, "--num-layer-list", "0,2")),
        ("mixtral", ("--to", "torch", "--expert-model-parallel-size", 2, "--moe-grouped-gemm")),
        ("qwen3_moe", ("--to", "torch", "--expert-model-parallel-size", 5)),
        ("qwen2_moe", ("--to", "torch", "--tensor-model-parallel-size", 2)),
        ("qwen2", ("--to", "hf")),
        ("qwen2", ("--to", "torch_dist", *TP2_PP2)),
        ("qwen3_moe", ("--to", "torch_dist", "--expert-model-parallel-size", 5, "--release")),
        ("mixtral", ("--to", "torch_dcp")),
        ("qwen2_moe", ("--to", "torch_dcp")),
    ],
)
def test_a_round_trip_gives_the_same_files(
    family: str, way: tuple[Any, ...], tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run
) -> None:
    folder = tiny_hf_folder(family)
    there, back = tmp_path / "there", tmp_path / "back"
    assert tessel("convert", "--load", folder, "--save", there, *way).status == 0
    assert tessel("convert", "--load", there, "--save", back, "--to", "hf").status == 0
    assert weights_of(back) == weights_of(folder)
    assert (back / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_chain_of_every_format_ends_with_the_same_files(
    tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run
) -> None:
    folder = tiny_hf_folder("llama", num_hidden_layers=4)
    ways: list[tuple[Any, ...]] = [
        ("torch", *TP2_PP2, "--num-layers-per-virtual-pipeline-stage", 1),
        ("torch_dist",),
        ("legacy", "--tensor-model-parallel-size", 2),
        ("torch_dcp",),
        ("hf",),
    ]
    source = folder
    for to, *flags in ways:
        assert tessel("convert", "--load", source, "--save", tmp_path / to, "--to", to, *flags).status == 0
        assert open_model(tmp_path / to).format == to
        source = tmp_path / to
    assert weights_of(source) == weights_of(folder)


def test_shards_and_the_tokenizer_come_back(
    tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path, tmp_path: Path, tessel: Run
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder)
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    assert len(weights_of(folder)) > 2
    assert tessel("convert", "--load", folder, "--save", tmp_path / "mg", *TP2_PP2).status == 0
    assert tessel("convert", "--load", tmp_path / "mg", "--save", tmp_path / "back").status == 0
    for path in folder.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_dry_run_shows_the_plan_and_writes_nothing(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("qwen2")
    said = tessel("convert", "--load", folder, "--save", tmp_path / "mg", *TP2_PP2, "--dry-run")
    assert said.status == 0
    lines = said.out.splitlines()
    assert lines[0].startswith(f"from {folder}: hf, qwen2, ")
    assert lines[1] == f"to {tmp_path / 'mg'}: torch, TP2 PP2, 4 files of tensors, 200.4 kB"
    assert "iter_0000001/mp_rank_01_001/model_optim_rng.pt" in said.out
    assert (
        "model:decoder.layers.0.mlp.linear_fc1.weight [56, 32] float32 <- model.layers.1.mlp.gate_proj.weight[28:56, :]"
        " + model.layers.1.mlp.up_proj.weight[28:56, :]  (model.safetensors)"
    ) in said.out
    assert "model.embed_tokens.weight[256:307, :] and 205 copies of the last row" in said.out
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_an_existing_destination(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("qwen2")
    save = tmp_path / "mg"
    save.mkdir()
    assert tessel("convert", "--load", folder, "--save", save).status == 0  # an empty folder is none
    before = (save / MANIFEST).read_bytes()
    said = tessel("convert", "--load", folder, "--save", save)
    assert said.status == 1 and "exists" in said.err and "--force" in said.err
    assert (save / MANIFEST).read_bytes() == before
    assert tessel("convert", "--load", folder, "--save", save, *TP2_PP2, "--force").status == 0
    assert open_model(save).degrees == {"tp": 2, "pp": 2}
    other = tmp_path / "notes"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    said = tessel("convert", "--load", folder, "--save", other, "--force")
    assert said.status == 1 and "holds no checkpoint" in said.err and (other / "mine.txt").read_text() == "x"
    said = tessel("convert", "--load", folder, "--save", folder / "inside")
    assert said.status == 2 and "lie one in the other" in said.err


KILLED = """
import os, signal, sys
from tessel.cli import main
from tessel.convert.work import Work
note, count = Work._note, [0]
def noting(self, file, digest):
    note(self, file, digest)
    count[0] += 1
    if count[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Work._note = noting
main(sys.argv[1:])
"""


@pytest.mark.parametrize("to", ["torch_dist", "torch_dcp", "legacy", "hf"])
def test_every_format_goes_on_where_it_was_stopped(
    to: str, tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_hf_folder("llama")

    def stop(self: Work, manifest: dict[str, Any], save: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "publish", stop)
        assert tessel("convert", "--load", folder, "--save", tmp_path / "to", "--to", to).status == 130
    said = tessel("convert", "--load", folder, "--save", tmp_path / "to", "--to", to)
    assert said.status == 0 and "went on from a conversion that was stopped" in said.out


def test_a_killed_conversion_leaves_nothing_and_goes_on(
    tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_hf_folder("qwen2")
    save, unfinished = tmp_path / "mg", tmp_path / ".mg.converting"
    command = ["convert", "--load", str(folder), "--save", str(save), *map(str, TP2_PP2)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], timeout=60, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not save.exists() and unfinished.is_dir()
    files = sorted(unfinished.rglob("*.pt"))
    with open(files[0], "r+b") as file:  # what was finished is looked at before it is kept
        file.seek(3000)
        file.write(b"\xff\xfe\xfd")
    written: list[str] = []
    write = Work._write

    def counting(self: Work, file: Any) -> str:
        written.append(file.name)
        return write(self, file)

    monkeypatch.setattr(Work, "_write", counting)
    said = tessel(*command)
    assert said.status == 0, said.err
    assert "went on from a conversion that was stopped: 1 of 4 files were whole" in said.out
    assert len(written) == 3 and not unfinished.exists()
    assert tessel("verify", folder, save).status == 0
    names = {"iter_0000001", "huggingface", "latest_checkpointed_iteration.txt", MANIFEST}
    assert {path.name for path in save.iterdir()} == names


def test_another_conversion_does_not_go_on_from_the_files_of_the_first(
    tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_hf_folder("qwen2")

    def stop(self: Work, manifest: dict[str, Any], save: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "publish", stop)
        assert tessel("convert", "--load", folder, "--save", tmp_path / "mg", *TP2_PP2).status == 130
    assert (tmp_path / ".mg.converting").is_dir()
    said = tessel("convert", "--load", folder, "--save", tmp_path / "mg", *TP2_PP2, "--params-dtype", "bf16")
    assert said.status == 0 and "went on" not in said.out
    assert open_model(tmp_path / "mg").dtypes == (torch.bfloat16,)


def test_a_full_disk_is_cleaned_up(
    tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_hf_folder("qwen2")
    write = Work._write

    def full(self: Work, file: Any) -> str:
        digest = write(self, file)
        if "01_001" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return digest

    monkeypatch.setattr(Work, "_write", full)
    said = tessel("convert", "--load", folder, "--save", tmp_path / "mg", *TP2_PP2, "--workers", 2)
    assert said.status == 1 and "The disk is full" in said.err
    assert list(tmp_path.iterdir()) == [folder]
    monkeypatch.setattr("tessel.runtime.files.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 9))
    said = tessel("convert", "--load", folder, "--save", tmp_path / "mg")
    assert said.status == 1 and "are free" in said.err


def test_a_result_that_is_not_the_source_is_not_put_in_place(
    tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_hf_folder("qwen2")
    write = Work._write

    def flipping(self: Work, file: Any) -> str:
        digest = write(self, file)
        path = self.folder / file.name
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
        return digest

    monkeypatch.setattr(Work, "_write", flipping)
    said = tessel("convert", "--load", folder, "--save", tmp_path / "copy", "--to", "hf")
    assert said.status == 1 and "The result is not the source" in said.err
    assert "differs in 1 of" in said.err and not (tmp_path / "copy").exists()
    assert (
        tessel("convert", "--load", folder, "--save", tmp_path / "copy", "--to", "hf", "--verify", "none").status == 0
    )


def test_a_copy_on_another_rank_is_proved_too(
    tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_hf_folder("llama")
    norm = load_file(folder / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    found = norm.numpy().tobytes()
    write = Work._write

    def flipping(self: Work, file: Any) -> str:
        digest = write(self, file)
        path = self.folder / file.name
        content = path.read_bytes()
        if "mp_rank_01" in file.name:
            assert content.count(found) == 1
            path.write_bytes(content.replace(found, found[:-1] + bytes([found[-1] ^ 1])))
        return digest

    monkeypatch.setattr(Work, "_write", flipping)
    for to in ("torch", "legacy"):
        flags = ("--to", to, "--tensor-model-parallel-size", 2)
        said = tessel("convert", "--load", folder, "--save", tmp_path / to, *flags)
        assert said.status == 1 and "mp_rank_01: " in said.err
        assert "should be a copy of what mp_rank_00 has, and differs in 1 of 32 values" in said.err
    monkeypatch.undo()
    said = tessel("convert", "--load", folder, "--save", tmp_path / "mg", "--tensor-model-parallel-size", 2)
    assert said.status == 0 and "21 tensors read back and equal by sha256, and 5 copies of them on other" in said.out


def test_casts_are_said(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("qwen2")
    said = tessel("convert", "--load", folder, "--save", tmp_path / "half", "--to", "hf", "--params-dtype", "bf16")
    assert said.status == 0 and "DOWN-CAST: 27 tensors are stored as float32 and become bfloat16" in said.out
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    said = tessel("convert", "--load", tmp_path / "half", "--save", tmp_path / "up", "--params-dtype", "fp32")
    assert said.status == 0 and "become float32, which holds them all" in said.out and "DOWN-CAST" not in said.out
    said = tessel("convert", "--load", folder, "--save", tmp_path / "plain", "--to", "hf")
    assert "become" not in said.out


def test_values_that_fp16_cannot_hold(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("qwen2")

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][0, :3] = 1e5

    edited(folder, enlarge)
    said = tessel("convert", "--load", folder, "--save", tmp_path / "mg", "--params-dtype", "fp16")
    assert said.status == 1 and "model.layers.1.mlp.down_proj.weight (3 values)" in said.err
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tensor-model-parallel-size", 3), "3"),
        (("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 3), "multiple of it"),
        (("--num-layers-per-virtual-pipeline-stage", 1), "--pipeline-model-parallel-size"),
        (("--expert-model-parallel-size", 2), "no experts"),
        (("--num-layer-list", "1,x"), "commas between"),
        ((*PP2, "--num-layer-list", "1,1", "--decoder-last-pipeline-num-layers", 1), "of every stage"),
        (("--tensor-model-parallel-size", 0), "at least 1"),
        (("--workers", 0), "--workers"),
        (("--to", "gguf"), "--to"),
        (("--load-checkpoint-loosely",), "a tensor that is missing is an error"),
    ],
)
def test_wrong_command_lines(
    flags: tuple[Any, ...], words: str, tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run
) -> None:
    folder = tiny_hf_folder("qwen2")
    said = tessel("convert", "--load", folder, "--save", tmp_path / "mg", *flags)
    assert said.status == 2 and words in said.err
    assert list(tmp_path.iterdir()) == [folder]


def test_other_suites_flags_are_taken(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("qwen2")
    said = tessel(
        "convert", "--model-type", "GPT", "--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", folder,
        "--save-dir", tmp_path / "mg", "--target-tensor-parallel-size", 2, "--model-type-hf", "llama2",
        "--add-qkv-bias", "--use-mcore-models",
    )  # fmt: skip
    assert said.status == 0 and "accepted without effect" in said.err
    assert open_model(tmp_path / "mg").degrees == {"tp": 2}


def test_a_source_that_is_nothing(tmp_path: Path, tessel: Run) -> None:
    (tmp_path / "source").mkdir()
    said = tessel("convert", "--load", tmp_path / "source", "--save", tmp_path / "mg")
    assert said.status == 1 and "holds no checkpoint: looked for" in said.err
    said = tessel("convert", "--load", tmp_path / "nowhere", "--save", tmp_path / "mg")
    assert said.status == 1 and "does not exist" in said.err
    said = tessel("convert", "--load", "/dev/null", "--save", tmp_path / "mg")
    assert said.status == 1 and "/dev/null is a file" in said.err


def test_two_conversions_to_one_place(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    folder = tiny_hf_folder("qwen2")
    with work.begin(tmp_path / "mg", "other"):
        said = tessel("convert", "--load", folder, "--save", tmp_path / "mg")
    assert said.status == 1 and "Another process is converting" in said.err


def test_logits_are_compared_when_asked(tiny_hf_folder: MakeFolder, tmp_path: Path, tessel: Run) -> None:
    said = tessel("convert", "--load", tiny_hf_folder("qwen3"), "--save", tmp_path / "mg", "--verify", "logits")
    assert said.status == 0 and "logits of a fixed prompt differ by 0 at most" in said.out
    assert os.listdir(tmp_path / "mg")
