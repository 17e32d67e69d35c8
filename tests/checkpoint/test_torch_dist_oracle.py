"""Megatron's torch_dist checkpoints as the real tools wrote them: read, and written again key for key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.checkpoint import torch_file
from tessel.checkpoint.dcp_files import read_folder
from tessel.checkpoint.stored import StoredModel, Target
from tessel.checkpoint.torch_dist import open_torch_dist
from tessel.checkpoint.torch_dist_write import write_torch_dist
from tests.checkpoint.megatron import digest, hf_model

pytestmark = pytest.mark.oracle

WEIGHTS = ("td_qwen2", "td_qwen2_tp2", "td_qwen2tied_pp2", "td_qwen3_release", "td_qwen3moe")
PAI = ("pai_qwen2", "pai_qwen2tied_pp2", "pai_qwen3")
TRAINED = ("td_qwen3mini_optim", "td_qwen3mini_fullyresh", "td_qwen3mini_dp2_distopt")
KINDS = ("param", "exp_avg", "exp_avg_sq")


def case(shared: Path, name: str) -> tuple[Path, dict[str, Any], Path]:
    """The checkpoint of a case, its manifest, and the Hugging Face folder that it was made from."""
    checkpoints = shared / "oracle" / "checkpoints"
    manifest = json.loads((checkpoints / "cases" / name / "manifest.json").read_text())
    return checkpoints / "cases" / name / "checkpoint", manifest, checkpoints / "hf" / manifest["model"]


@pytest.mark.parametrize("name", WEIGHTS + PAI)
def test_weights_are_those_of_the_model(shared: Path, name: str) -> None:
    checkpoint, _, hf = case(shared, name)
    model = open_torch_dist(checkpoint, hf_dir=hf)
    expected = hf_model(hf).tensors
    assert model.tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(model.tensors[key].read(), tensor.read()), key
    assert not model.optimizer
    assert not model.guessed


@pytest.mark.parametrize("name", WEIGHTS + PAI)
def test_config_follows_from_the_args(shared: Path, name: str) -> None:
    checkpoint, _, hf = case(shared, name)
    known, derived = open_torch_dist(checkpoint, hf_dir=hf).config, open_torch_dist(checkpoint)
    for field in ("family", "hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rms_norm_eps",
                  "tie_word_embeddings", "attention_bias", "qk_norm", "num_experts", "norm_topk_prob"):  # fmt: skip
        assert getattr(derived.config, field) == getattr(known, field), field
    # Megatron's NullTokenizer counts one entry more than its flag, whether or not the model was made for it.
    said = "the rows of the embedding" if name in PAI else "the end of documents that Megatron's NullTokenizer adds"
    assert derived.config.vocab_size == (125 if name in PAI else 126)
    assert sum(said in line for line in derived.guessed) == 1
    assert sum("vocabulary" in line for line in derived.guessed) == 1


def test_degrees_and_iteration(shared: Path) -> None:
    sharded = open_torch_dist(case(shared, "td_qwen2_tp2")[0])
    assert (sharded.degrees, sharded.iteration) == ({"tp": 2}, 5)
    assert any("256 rows" in note for note in sharded.notes)
    assert open_torch_dist(case(shared, "td_qwen2tied_pp2")[0]).degrees == {"pp": 2}
    assert open_torch_dist(case(shared, "td_qwen3_release")[0]).iteration is None


def trained(shared: Path, name: str) -> StoredModel:
    checkpoint, _, hf = case(shared, name)
    model = open_torch_dist(checkpoint, hf_dir=hf)
    assert model.optimizer.keys() == {f"{kind}.{key}" for kind in KINDS for key in model.tensors}
    return model


@pytest.mark.parametrize("name", TRAINED)
def test_master_weights_round_to_the_weights(shared: Path, name: str) -> None:
    model = trained(shared, name)
    for key, tensor in model.tensors.items():
        master = model.optimizer[f"param.{key}"].read()
        assert master.dtype == torch.float32
        assert torch.equal(master.to(torch.bfloat16), tensor.read()), key


@pytest.mark.parametrize("name", TRAINED)
def test_where_the_run_stood(shared: Path, name: str) -> None:
    state = trained(shared, name).state
    assert (state["step"], state["iteration"]) == (2, 5)
    assert state["opt_param_scheduler"]["num_steps"] == 8
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.0]


def test_plain_and_distributed_optimizer_agree(shared: Path) -> None:
    plain, distributed = trained(shared, "td_qwen3mini_optim"), trained(shared, "td_qwen3mini_fullyresh")
    for key, tensor in plain.optimizer.items():
        torch.testing.assert_close(distributed.optimizer[key].read(), tensor.read(), rtol=1e-6, atol=1e-8)


def test_moments_out_of_buckets_lie_where_they_belong(shared: Path) -> None:
    """Two ranks' gradients were averaged: about the size of one rank's, and of each parameter's own shape."""
    model = trained(shared, "td_qwen3mini_dp2_distopt")
    for key, tensor in model.tensors.items():
        first, second = (model.optimizer[f"{kind}.{key}"].read() for kind in ("exp_avg", "exp_avg_sq"))
        assert first.shape == second.shape == tensor.shape
        assert first.std() > 0 and second.min() >= 0, key


def test_a_run_in_the_middle_opens_with_its_moments(shared: Path) -> None:
    folder = shared / "oracle" / "continue" / "bf16_torch_dist"
    model = open_torch_dist(folder / "checkpoint", hf_dir=folder / "hf")
    assert model.optimizer.keys() == {f"{kind}.{key}" for kind in KINDS for key in model.tensors}
    assert (model.iteration, model.state["step"], model.state["consumed_train_samples"]) == (8, 8, 64)
    for key, tensor in model.tensors.items():
        assert torch.equal(model.optimizer[f"param.{key}"].read().to(torch.bfloat16), tensor.read()), key


def described(folder: Path) -> dict[str, list[Any]]:
    """Key -> dtype, whole shape and hash of every tensor, as a manifest has them."""
    return {
        key: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest(tensor.read())]
        for key, tensor in read_folder(folder).tensors.items()
    }


def chunks(folder: Path) -> dict[str, list[Any]]:
    return {
        key: sorted((piece.start, piece.size) for piece in tensor.chunks)
        for key, tensor in read_folder(folder).tensors.items()
    }


@pytest.mark.parametrize("name", WEIGHTS + PAI)
def test_written_as_the_tool_wrote_it(shared: Path, tmp_path: Path, name: str) -> None:
    checkpoint, manifest, hf = case(shared, name)
    theirs = next(entry for entry in checkpoint.iterdir() if entry.is_dir())
    iteration = None if theirs.name == "release" else 5
    degrees = manifest["degrees"]
    flavour: Any = "pai" if name.startswith("pai") else "mcore"
    target = Target(tp=degrees.get("tp", 1), pp=degrees.get("pp", 1), flavour=flavour, iteration=iteration)
    write_torch_dist(hf_model(hf), tmp_path, target)
    ours = tmp_path / theirs.name
    assert described(ours) == manifest["tensors"]
    assert chunks(ours) == chunks(theirs)
    others = {key for key in manifest["bytes_entries"] if not key.startswith("rng_state/")}
    assert read_folder(ours).others.keys() == others
    for file in ("latest_checkpointed_iteration.txt", f"{theirs.name}/metadata.json"):
        assert (tmp_path / file).read_bytes() == (checkpoint / file).read_bytes()
    written, expected = (torch_file.load(folder / "common.pt") for folder in (ours, theirs))
    assert written.keys() == expected.keys()
    for field in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
                  "ffn_hidden_size", "padded_vocab_size", "tensor_model_parallel_size", "params_dtype",
                  "pipeline_model_parallel_size", "untie_embeddings_and_output_weights"):  # fmt: skip
        assert getattr(written["args"], field) == getattr(expected["args"], field), field


def test_optimizer_written_as_the_tool_wrote_it(shared: Path, tmp_path: Path) -> None:
    checkpoint, manifest, hf = case(shared, "td_qwen3mini_fullyresh")
    write_torch_dist(trained(shared, "td_qwen3mini_fullyresh"), tmp_path, Target(iteration=5), with_optimizer=True)
    ours, theirs = tmp_path / "iter_0000005", checkpoint / "iter_0000005"
    plain = {key: boxes for key, boxes in chunks(ours).items() if key.startswith("optimizer.state.fp32_param.")}
    assert len(plain) == 11, "the master weights once more, under the plain optimizer's name"
    assert {key: boxes for key, boxes in chunks(ours).items() if key not in plain} == chunks(theirs)
    written = described(ours)
    vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")  # its padding was trained
    for key, expected in manifest["tensors"].items():
        assert written[key][:2] == expected[:2]
        assert key.endswith(vocabulary) or written[key] == expected, key
    old, new = (torch_file.load(folder / "common.pt") for folder in (theirs, ours))
    assert new["content_metadata"] == old["content_metadata"]
    assert new["optimizer"]["param_state_sharding_type"] == old["optimizer"]["param_state_sharding_type"]
    groups = zip(*(content["optimizer"]["optimizer"]["param_groups"] for content in (new, old)), strict=True)
    assert all(ours.items() >= theirs.items() for ours, theirs in groups)
    assert new["opt_param_scheduler"] == old["opt_param_scheduler"]
