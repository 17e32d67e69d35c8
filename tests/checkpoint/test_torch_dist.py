"""Megatron's torch_dist format: there and back on all degrees, and what is wrong with a folder said in words."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.checkpoint.dcp_files import read_folder
from tessel.checkpoint.dcp_write import Part, plan_folder
from tessel.checkpoint.flat import Unflattened, of_fragments
from tessel.checkpoint.flat_buffers import placed
from tessel.checkpoint.fused import alone
from tessel.checkpoint.mcore_names import Entry
from tessel.checkpoint.stored import StoredModel, StoredTensor, Target
from tessel.checkpoint.torch_dist import open_torch_dist
from tessel.checkpoint.torch_dist_write import plan_torch_dist, write_torch_dist
from tessel.checkpoint.torch_file import LoadedTensor
from tessel.errors import TesselError, UsageError
from tests.checkpoint.megatron import different, hf_model

DENSE = ("qwen2", "qwen3", "llama", "mistral")
MIXED = ("mixtral", "qwen2_moe", "qwen3_moe")
ITERATION = "iter_0000001"


@pytest.fixture
def model(tiny_hf_folder: Callable[..., Path]) -> Callable[..., StoredModel]:
    def make(family: str, **overrides: Any) -> StoredModel:
        experts = {"num_experts": 4} if family in ("qwen2_moe", "qwen3_moe") else {}
        return hf_model(tiny_hf_folder(family, **experts, **overrides))

    return make


def in_memory(name: str, tensor: Tensor) -> StoredTensor:
    return LoadedTensor(name, Path("nowhere"), tensor)


def there_and_back(source: StoredModel, folder: Path, target: Target) -> StoredModel:
    write_torch_dist(source, folder, target)
    found = open_torch_dist(folder)
    assert different(found.tensors, source.tensors) == []
    return found


@pytest.mark.parametrize("family", DENSE + MIXED)
def test_there_and_back(model: Callable[..., StoredModel], tmp_path: Path, family: str) -> None:
    source = model(family)
    for number, target in enumerate((Target(), Target(tp=2, flavour="v1"), Target(tp=2, pp=2, iteration=None))):
        found = there_and_back(source, tmp_path / f"{number}", target)
        assert found.config == source.config, "config.json travels along"
        assert (found.guessed, found.iteration) == ((), target.iteration)


@pytest.mark.parametrize("family", MIXED)
def test_experts_there_and_back(model: Callable[..., StoredModel], tmp_path: Path, family: str) -> None:
    source = model(family)
    targets = (Target(tp=2, ep=2), Target(ep=4, pp=2), Target(tp=2, ep=2, etp=1, transformer_engine=True))
    for number, target in enumerate(targets):
        there_and_back(source, tmp_path / f"{number}", target)


def test_tied_output_layer_is_not_stored(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    there_and_back(model("qwen2", tie_word_embeddings=True), tmp_path, Target(pp=2))
    assert "output_layer.weight" not in read_folder(tmp_path / ITERATION).tensors


def test_an_output_layer_that_is_no_copy_of_the_embedding(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    source = model("qwen2")
    write_torch_dist(source, tmp_path, Target(tp=2))
    config = tmp_path / "huggingface" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(TesselError, match='output_layer.weight differs from the embedding.*"tie_word_embeddings": fal'):
        open_torch_dist(tmp_path)
    head = source.tensors["model.embed_tokens.weight"]
    same = replace(source, tensors={**source.tensors, "lm_head.weight": head})
    write_torch_dist(same, tmp_path / "same", Target(tp=2))
    config = tmp_path / "same" / "huggingface" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert "lm_head.weight" not in open_torch_dist(tmp_path / "same").tensors


def test_keys_of_each_layer_where_layers_differ(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    source = model("qwen2_moe")
    assert source.config.dense_layers == (0,)
    there_and_back(source, tmp_path, Target())
    keys = read_folder(tmp_path / ITERATION).tensors
    assert "decoder.layers.0.mlp.linear_fc1.weight" in keys
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight" in keys
    assert not any(key.startswith("decoder.layers.self_attention") for key in keys)


def test_config_out_of_the_args(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    source = model("qwen3")
    write_torch_dist(source, tmp_path, Target(tp=2))
    shutil.rmtree(tmp_path / "huggingface")
    found = open_torch_dist(tmp_path)
    assert found.guessed
    assert (found.config.family, found.config.head_dim, found.config.vocab_size) == ("qwen3", 16, 307)
    assert different(found.tensors, source.tensors) == []
    assert any("512 rows" in note for note in found.notes)


def test_bias_of_the_choice_of_experts(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    source = model("qwen3_moe")
    bias = tuple(tuple(0.25 * layer + expert for expert in range(4)) for layer in range(2))
    source = replace(source, config=replace(source.config, expert_bias=bias))
    write_torch_dist(source, tmp_path, Target(pp=2))
    assert read_folder(tmp_path / ITERATION).tensors["decoder.layers.mlp.router.expert_bias"].shape == (2, 4)
    assert open_torch_dist(tmp_path).config.expert_bias == bias


def test_degrees_that_do_not_fit(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    for target, said in ((Target(tp=4), "key/value heads"), (Target(ep=2), "no experts"), (Target(pp=3), "layers")):
        with pytest.raises(UsageError, match=said):
            plan_torch_dist(model("qwen2"), target)


def with_states(source: StoredModel) -> StoredModel:
    states = {}
    for number, kind in enumerate(("param", "exp_avg", "exp_avg_sq")):
        for name, tensor in source.tensors.items():
            states[f"{kind}.{name}"] = in_memory(name, tensor.read().float() * (number + 1))
    groups = [{"lr": 1e-3, "weight_decay": decay, "betas": (0.9, 0.95)} for decay in (0.1, 0.0)]
    state = {"step": 7, "param_groups": groups, "opt_param_scheduler": {"num_steps": 56}, "consumed_train_samples": 56}
    return replace(source, optimizer=states, state=state)


@pytest.mark.parametrize("family", ("qwen3", "qwen3_moe"))
def test_optimizer_there_and_back(model: Callable[..., StoredModel], tmp_path: Path, family: str) -> None:
    source = with_states(model(family))
    write_torch_dist(source, tmp_path, Target(tp=2), with_optimizer=True)
    found = open_torch_dist(tmp_path)
    assert different(found.optimizer, source.optimizer) == []
    assert (found.state["step"], found.state["consumed_train_samples"]) == (7, 56)
    assert found.state["opt_param_scheduler"] == {"num_steps": 56}
    assert [group["wd_mult"] for group in found.state["param_groups"]] == [1.0, 0.0]


def test_release_has_no_optimizer(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    write_torch_dist(with_states(model("qwen2")), tmp_path, Target(iteration=None), with_optimizer=True)
    assert not open_torch_dist(tmp_path).optimizer


def test_optimizer_in_fragments(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    """Each rank's part of a weight as one row: [layers, parts of dim 0, parts of dim 1, elements]."""
    source = with_states(model("qwen3"))
    write_torch_dist(source, tmp_path, Target(), with_optimizer=True)
    found = read_folder(tmp_path / ITERATION)
    parts = []
    for key, tensor in found.tensors.items():
        values = tensor.read().clone()  # its file is written anew
        if key.startswith("optimizer.state.exp_avg.") and values.dim() == 3:
            layers, rows, columns = values.shape
            cut = values.reshape(layers, 2, rows // 2, 2, columns // 2).transpose(2, 3)
            values = cut.reshape(layers, 2, 2, -1)
        parts.append(Part(key, tuple(values.shape), (0,) * values.dim(), in_memory(key, values.contiguous())))
    plan = plan_folder({"__0_0.distcp": parts})
    for file in plan.files:
        file.write(tmp_path / ITERATION / file.name)
    (tmp_path / ITERATION / ".metadata").write_bytes(plan.metadata)
    assert different(open_torch_dist(tmp_path).optimizer, source.optimizer) == []


def test_momentum_of_sgd(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    source = with_states(model("qwen2"))
    write_torch_dist(source, tmp_path, Target(), with_optimizer=True)
    parts = []
    for key, tensor in read_folder(tmp_path / ITERATION).tensors.items():
        if not key.startswith(("optimizer.state.exp_avg_sq.", "optimizer.state.param.")):
            values = tensor.read().clone()  # its file is written anew
            name = key.replace("optimizer.state.exp_avg.", "optimizer.state.momentum_buffer.")
            parts.append(Part(name, tuple(values.shape), (0,) * values.dim(), in_memory(name, values)))
    plan = plan_folder({"__0_0.distcp": parts})
    for file in plan.files:
        file.write(tmp_path / ITERATION / file.name)
    (tmp_path / ITERATION / ".metadata").write_bytes(plan.metadata)
    found = open_torch_dist(tmp_path).optimizer
    renamed = {name.replace("momentum_buffer.", "exp_avg."): state for name, state in found.items()}
    kept = {name: state for name, state in source.optimizer.items() if not name.startswith("exp_avg_sq.")}
    assert different(renamed, kept) == [] and any(name.startswith("momentum_buffer.") for name in found)


def test_boxes_of_what_lies_flat() -> None:
    values = torch.arange(120.0)
    flat = Unflattened(in_memory("flat", values), (), 7, (3, 4, 5))
    whole = values[7:67].reshape(3, 4, 5)
    for index in (None, (slice(1, 3), slice(0, 4), slice(2, 4)), (slice(2, 2), slice(0, 4), slice(0, 5))):
        assert torch.equal(flat.read(index), whole if index is None else whole[index])
    assert of_fragments(in_memory("x", torch.zeros(3, 2, 1, 10)), (3, 4, 5)) is not None
    assert of_fragments(in_memory("x", torch.zeros(3, 2, 1, 9)), (3, 4, 5)) is None


def test_places_in_buckets() -> None:
    entries = [Entry(str(size), alone("x", (0,), (size,))) for size in (70, 10, 64, 3)]
    spots = placed(entries, [128, 64 + 10, 70])
    assert spots is None, "the first bucket ends in the middle of nothing"
    spots = placed(entries, [128, 74 - 10 + 64 + 6])
    assert spots is not None
    assert [(spot.entry.key, spot.bucket, spot.start) for spot in spots] == [
        ("3", 0, 0), ("64", 0, 64), ("10", 1, 0), ("70", 1, 64),
    ]  # fmt: skip
    assert placed(entries, [128, 135]) is None


def test_each_chunk_is_a_file_of_torch_save(tmp_path: Path) -> None:
    values = torch.randn(7, 5)
    plan = plan_folder({"x": [Part("a", (7, 5), (0, 0), in_memory("a", values))]})
    digest = plan.files[0].write(tmp_path / "x")
    assert digest == sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert torch.equal(torch.load(tmp_path / "x"), values)
    with zipfile.ZipFile(tmp_path / "x") as archive:
        assert archive.testzip() is None, "check sums"


def test_reads_what_it_is_asked_for(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    """One file is empty of sense: what lies in the other can be read."""
    source = model("llama")
    write_torch_dist(source, tmp_path, Target())
    second = tmp_path / ITERATION / "__0_1.distcp"
    second.write_bytes(bytes(second.stat().st_size))
    found = open_torch_dist(tmp_path)
    first = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(found.tensors[first].read((slice(3, 5), slice(1, 9))), source.tensors[first].read()[3:5, 1:9])
    with pytest.raises(TesselError, match=r"__0_1.distcp is damaged"):
        found.tensors["lm_head.weight"].read()


# --- what may be wrong with a folder


@pytest.fixture
def written(model: Callable[..., StoredModel], tmp_path: Path) -> Path:
    write_torch_dist(model("qwen2"), tmp_path / "checkpoint", Target())
    return tmp_path / "checkpoint"


def refused(folder: Path, said: str) -> None:
    with pytest.raises(TesselError, match=said):
        for tensor in open_torch_dist(folder).tensors.values():
            tensor.read()


@pytest.mark.parametrize("name", ("metadata.json", ".metadata", "common.pt", "__0_1.distcp"))
def test_missing_file(written: Path, name: str) -> None:
    (written / ITERATION / name).unlink()
    refused(written, name)


def test_another_backend(written: Path) -> None:
    (written / ITERATION / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    refused(written, "'zarr', and only torch_dist is read")
    (written / ITERATION / "metadata.json").write_text("{")
    refused(written, "metadata.json is damaged")


@pytest.mark.parametrize("name", (".metadata", "common.pt", "__0_0.distcp", "__0_1.distcp"))
def test_cut_short(written: Path, name: str) -> None:
    path = written / ITERATION / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(written, "damaged|whole file|ends in the middle")


class Poison:
    """Makes the file that it is given, where a pickle of it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("name", (".metadata", "common.pt"))
def test_poison_is_refused(written: Path, tmp_path: Path, name: str) -> None:
    path = written / ITERATION / name
    if name == ".metadata":
        path.write_bytes(pickle.dumps(Poison(tmp_path / "run")))
    else:
        torch.save({"args": Poison(tmp_path / "run")}, path)
    refused(written, "system.* which is not on the list")
    assert not (tmp_path / "run").exists()


def test_index_cannot_leave_the_folder(written: Path) -> None:
    path = written / ITERATION / ".metadata"
    content = path.read_bytes()
    assert b"__0_0.distcp" in content
    path.write_bytes(content.replace(b"__0_0.distcp", b"../../secret"))
    refused(written, "'../../secret' is not the name of a file in that folder")


def test_config_of_another_model(written: Path, tiny_hf_folder: Callable[..., Path]) -> None:
    def opened(**overrides: Any) -> None:
        open_torch_dist(written, hf_dir=tiny_hf_folder("qwen2", **overrides))

    with pytest.raises(TesselError, match=r"holds 2 layers, and the model's config says 3"):
        opened(num_hidden_layers=3)
    with pytest.raises(TesselError, match=r"linear_fc2.weight is \(2, 32, 56\) and should be \(2, 32, 40\)"):
        opened(intermediate_size=40)
    with pytest.raises(TesselError, match=r"has 384 rows, fewer than the vocabulary's 400"):
        opened(vocab_size=400)
    with pytest.raises(TesselError, match=r"linear_qkv.bias is not of this model"):
        open_torch_dist(written, hf_dir=tiny_hf_folder("llama"))


def test_forgotten_biases(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    source = model("llama")
    write_torch_dist(source, tmp_path / "checkpoint", Target())
    raw = json.loads((source.folder / "config.json").read_text())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw | {"model_type": "qwen2"}))
    with pytest.raises(TesselError, match=r"missing: .*linear_qkv.bias.*--add-qkv-bias"):
        open_torch_dist(tmp_path / "checkpoint", hf_dir=tmp_path / "hf")


@pytest.mark.parametrize("name", (".metadata", "common.pt", "__0_0.distcp"))
def test_mutations_are_errors_in_words_or_load(written: Path, name: str) -> None:
    path = written / ITERATION / name
    content = path.read_bytes()
    draw = random.Random(name)
    for _ in range(150):
        mutated = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(mutated))
            length = draw.choice((1, 1, 2, 8))
            how = draw.randrange(4)
            if how == 0:
                mutated[at : at + length] = draw.randbytes(length)
            elif how == 1:
                mutated[at : at + length] = b"\xff" * length
            elif how == 2:
                del mutated[at : at + draw.randrange(1, 200)]
            else:
                other = draw.randrange(len(mutated))
                mutated[at : at + length], mutated[other : other + length] = (
                    mutated[other : other + length],
                    mutated[at : at + length],
                )
        path.write_bytes(mutated)
        try:
            for tensor in open_torch_dist(written).tensors.values():
                tensor.read()
        except TesselError:
            pass
