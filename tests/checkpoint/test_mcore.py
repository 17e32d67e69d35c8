"""Megatron's torch format: there and back in every layout of ranks, and what is wrong with a folder said in words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.checkpoint import torch_file
from tessel.checkpoint.formats import written
from tessel.checkpoint.mcore import open_torch
from tessel.checkpoint.mcore_write import plan_torch, write_torch
from tessel.checkpoint.stored import Cast, StoredModel, Target
from tessel.errors import TesselError, UsageError
from tests.checkpoint.megatron import different, hf_model

DENSE = ("qwen2", "qwen3", "llama", "mistral")
MIXED = ("mixtral", "qwen2_moe", "qwen3_moe")
FOUR = {"num_hidden_layers": 4}
CUT = Target(tp=2, pp=2, num_chunks=2)
RANK = "mp_rank_01_001/model_optim_rng.pt"


@pytest.fixture
def model(tiny_hf_folder: Callable[..., Path]) -> Callable[..., StoredModel]:
    def make(family: str, **overrides: Any) -> StoredModel:
        experts = {"num_experts": 4} if family in ("qwen2_moe", "qwen3_moe") else {}
        return hf_model(tiny_hf_folder(family, **FOUR, **experts, **overrides))

    return make


def there_and_back(source: StoredModel, folder: Path, target: Target) -> StoredModel:
    write_torch(source, folder, target)
    found = open_torch(folder)
    assert different(found.tensors, source.tensors) == []
    return found


@pytest.mark.parametrize("family", DENSE + MIXED)
def test_there_and_back(model: Callable[..., StoredModel], tmp_path: Path, family: str) -> None:
    source = model(family)
    for number, target in enumerate((Target(), Target(tp=2, flavour="v1"), CUT, Target(pp=4, flavour="v2"))):
        found = there_and_back(source, tmp_path / f"{number}", target)
        assert found.config == source.config, "config.json travels along"
        assert found.guessed == ()
        assert found.iteration == 1


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize(
    "target",
    [
        Target(ep=2),
        Target(tp=2, ep=4, etp=1),
        Target(tp=2, pp=2, ep=2, etp=1, grouped_gemm=True),
        Target(tp=2, ep=2, num_chunks=1, grouped_gemm=True, transformer_engine=True),
        Target(pp=2, ep=4, num_chunks=2, transformer_engine=True),
    ],
)
def test_experts_there_and_back(model: Callable[..., StoredModel], tmp_path: Path, family: str, target: Target) -> None:
    found = there_and_back(model(family), tmp_path / "mg", target)
    assert found.degrees.get("ep") == target.ep


@pytest.mark.parametrize(
    "target",
    [
        Target(pp=2, layer_list=(1, 3)),
        Target(pp=3, first=1, last=1),
        Target(pp=2, num_chunks=2, placement="v"),
        Target(pp=2, noop_layers=(0, 5)),
        Target(pp=2, num_chunks=2, noop_layers=(2, 3, 4, 7)),
        Target(transformer_engine=True),
        Target(transformer_engine=True, flavour="v2"),
        Target(iteration=None),
        Target(iteration=1234567, vocab_divisor=100),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_stages_names_and_folders(
    model: Callable[..., StoredModel], tmp_path: Path, target: Target, tied: bool
) -> None:
    source = model("qwen2", tie_word_embeddings=tied)
    found = there_and_back(source, tmp_path / "mg", target)
    assert found.iteration == target.iteration
    assert (tmp_path / "mg" / "latest_checkpointed_iteration.txt").read_text() == str(target.iteration or "release")


def test_biases_everywhere(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    there_and_back(model("llama", attention_bias=True, mlp_bias=True), tmp_path / "mg", Target(tp=2, pp=2))


def test_places_without_a_layer_count_in_the_numbers(model: Callable[..., StoredModel]) -> None:
    first, second = plan_torch(model("llama"), Target(pp=2, noop_layers=(0, 5)))
    assert {key.split(".")[2] for key in first.tensors if ".layers." in key} == {"1", "2"}
    assert {key.split(".")[2] for key in second.tensors if ".layers." in key} == {"0", "1"}


def test_the_config_can_come_from_the_args(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    for family in ("qwen2", "qwen3", "llama", "mixtral", "qwen2_moe", "qwen3_moe"):
        source = model(family)
        write_torch(source, tmp_path / family, Target(tp=2, pp=2, noop_layers=(4, 5)))
        shutil.rmtree(tmp_path / family / "huggingface")
        found = open_torch(tmp_path / family)
        assert different(found.tensors, source.tensors) == []
        assert found.guessed
        for name in ("family", "num_hidden_layers", "vocab_size", "dense_layers", "norm_topk_prob", "rope_theta"):
            assert getattr(found.config, name) == getattr(source.config, name), (family, name)


def test_a_bias_of_the_choice_travels_with_the_weights(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    source = model("qwen3_moe")
    rows = tuple(tuple(float(layer) + expert / 4 for expert in range(4)) for layer in range(4))
    config = replace(source.config, scoring_func="sigmoid", expert_bias=rows)
    write_torch(replace(source, config=config), tmp_path / "mg", Target(pp=2, ep=2))
    shutil.rmtree(tmp_path / "mg" / "huggingface")
    found = open_torch(tmp_path / "mg")
    assert (found.config.expert_bias, found.config.scoring_func) == (rows, "sigmoid")
    assert different(found.tensors, source.tensors) == []


def test_an_iteration_can_be_chosen(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    source = model("llama")
    for number in (3, 5):
        write_torch(source, tmp_path, Target(iteration=number))
    assert open_torch(tmp_path).iteration == 5
    assert open_torch(tmp_path, ckpt_step=3).iteration == 3
    assert open_torch(tmp_path / "iter_0000003").iteration == 3
    with pytest.raises(TesselError, match="--ckpt-step 4 is not in .* It holds iter_0000003, iter_0000005"):
        open_torch(tmp_path, ckpt_step=4)
    with pytest.raises(TesselError, match="another iteration"):
        open_torch(tmp_path / "iter_0000003", ckpt_step=5)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("seven")
    with pytest.raises(TesselError, match="'seven': it must be a number or release"):
        open_torch(tmp_path)
    tracker.unlink()
    with pytest.raises(TesselError, match="does not say which iteration to read. It holds iter_0000003"):
        open_torch(tmp_path)


def test_an_iteration_saved_beside_a_converted_one_has_its_config(
    model: Callable[..., StoredModel], tmp_path: Path
) -> None:
    source = model("mistral")
    write_torch(source, tmp_path, Target(iteration=None))
    write_torch(source, tmp_path, Target(iteration=10))
    (tmp_path / "huggingface").rename(tmp_path / "release" / "huggingface")  # where a run of tessel has it
    found = open_torch(tmp_path)
    assert (found.iteration, found.config, found.guessed) == (10, source.config, ())


def test_an_iteration_holds_ranks_alone(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    """MindSpeed's second converter takes the args from whichever entry of it comes first."""
    write_torch(model("qwen2"), tmp_path / "mg", CUT)
    planned = written("torch", model("qwen2"), CUT)
    names = [*planned.texts, *(file.name for file in planned.files)]
    iteration = {Path(name).parts[1] for name in names if name.startswith("iter_0000001/")}
    assert {path.name for path in (tmp_path / "mg" / "iter_0000001").iterdir()} == iteration
    assert all(name.startswith("mp_rank_") for name in iteration) and "huggingface/config.json" in names


def test_a_down_cast_names_what_does_not_fit(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    source = model("llama")
    found = open_torch_cast(source, tmp_path / "half", torch.bfloat16)
    assert different(found.tensors, {k: Cast(v, torch.bfloat16) for k, v in source.tensors.items()}) == []
    huge = torch_file.LoadedTensor("model.layers.2.mlp.up_proj.weight", Path(), torch.full((56, 32), 1e6))
    tensors = {**source.tensors, huge.name: huge}
    broken = StoredModel("hf", source.folder, source.config, tensors)
    with pytest.raises(TesselError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: 1,792 values are too large"):
        write_torch(broken, tmp_path / "fp16", Target(dtype=torch.float16))
    assert not (tmp_path / "fp16" / "iter_0000001").exists()
    assert not (tmp_path / "fp16" / "latest_checkpointed_iteration.txt").exists()


def open_torch_cast(source: StoredModel, folder: Path, dtype: torch.dtype) -> StoredModel:
    write_torch(source, folder, Target(dtype=dtype))
    return open_torch(folder)


@pytest.fixture
def cut(model: Callable[..., StoredModel], tmp_path: Path) -> Path:
    """The folder of an iteration of a Qwen2 model on TP2 PP2, two chunks each."""
    write_torch(model("qwen2"), tmp_path / "mg", CUT)
    return tmp_path / "mg" / "iter_0000001"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def test_missing_folders_are_named(cut: Path) -> None:
    shutil.rmtree(cut / "mp_rank_01_000")
    with pytest.raises(TesselError, match="lacks 1 of the 4 folders of TP2 PP2 EP1: mp_rank_01_000"):
        open_torch(cut)


def test_a_folder_without_its_file_is_named(cut: Path) -> None:
    (cut / RANK).unlink()
    with pytest.raises(TesselError, match="mp_rank_01_001 has no model_optim_rng.pt"):
        open_torch(cut)


def test_degrees_that_contradict_the_folders(cut: Path) -> None:
    (cut / "mp_rank_01_001").rename(cut / "mp_rank_02_001")
    with pytest.raises(TesselError, match="args in mp_rank_00_000 say TP2 PP2 EP1.*there are .*mp_rank_02_001"):
        open_torch(cut)


def test_ranks_that_contradict_each_other(cut: Path) -> None:
    edit(cut / RANK, lambda content: setattr(content["args"], "pipeline_model_parallel_size", 4))
    with pytest.raises(TesselError, match="says pipeline_model_parallel_size 4, unlike mp_rank_00_000"):
        open_torch(cut)


@pytest.mark.parametrize("value", [0, -2, "2", True, 10**9])
def test_degrees_that_are_none(cut: Path, value: object) -> None:
    edit(cut / "mp_rank_00_000/model_optim_rng.pt", lambda c: setattr(c["args"], "tensor_model_parallel_size", value))
    with pytest.raises(TesselError, match="must be a whole number above 0"):
        open_torch(cut)


def test_unknown_tensors_are_named(cut: Path) -> None:
    edit(cut / RANK, lambda content: content["model1"].update(extra=torch.zeros(1)))
    with pytest.raises(TesselError, match="1 that do not fit: mp_rank_01_001: extra is not of this model"):
        open_torch(cut)


def test_missing_tensors_are_named(cut: Path) -> None:
    edit(cut / RANK, lambda content: content["model1"].pop("decoder.layers.0.mlp.linear_fc2.weight"))
    with pytest.raises(TesselError, match=r"1 tensors missing: mp_rank_01_001: decoder\.layers\.0\.mlp\.linear_fc2"):
        open_torch(cut)


def test_a_missing_output_layer_says_tied(cut: Path) -> None:
    for rank in ("mp_rank_00_001", "mp_rank_01_001"):
        edit(cut / rank / "model_optim_rng.pt", lambda content: content["model1"].pop("output_layer.weight"))
    with pytest.raises(TesselError, match='"tie_word_embeddings": true'):
        open_torch(cut)


def test_a_shape_of_another_model(cut: Path) -> None:
    key = "decoder.layers.0.mlp.linear_fc2.weight"
    edit(cut / RANK, lambda content: content["model0"].update({key: torch.zeros(32, 27)}))
    with pytest.raises(TesselError, match=r"linear_fc2.weight is \(32, 27\) and should be \(32, 28\)"):
        open_torch(cut)


def test_a_missing_layer(cut: Path) -> None:
    def drop(content: dict[str, Any]) -> None:
        content["model1"] = {k: v for k, v in content["model1"].items() if ".layers." not in k}

    for tp in (0, 1):
        edit(cut / f"mp_rank_{tp:02d}_001/model_optim_rng.pt", drop)
    with pytest.raises(TesselError, match="holds 3 layers, and .*config.json says 4"):
        open_torch(cut)


def test_too_few_rows(cut: Path) -> None:
    for tp in (0, 1):
        path = cut / f"mp_rank_{tp:02d}_000/model_optim_rng.pt"
        edit(path, lambda content: content["model0"].update({"embedding.word_embeddings.weight": torch.zeros(100, 32)}))
    with pytest.raises(TesselError, match="has 200 rows in all, and the model's config says vocab_size 307"):
        open_torch(cut)


def test_padding_is_said(cut: Path) -> None:
    assert open_torch(cut).notes == (
        "The vocabulary is padded from 307 to 512 rows in the files; the padding is left out.",
    )


def test_a_tied_copy_that_differs(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    write_torch(model("qwen3", tie_word_embeddings=True), tmp_path, Target(pp=2))
    path = tmp_path / "iter_0000001/mp_rank_00_001/model_optim_rng.pt"
    edit(path, lambda content: content["model"]["output_layer.weight"][5].add_(1))
    with pytest.raises(TesselError, match="output_layer.weight differs from the embedding"):
        open_torch(tmp_path)


def test_old_versions_and_other_contents(cut: Path) -> None:
    edit(cut / RANK, lambda content: content.update(checkpoint_version=1.0))
    with pytest.raises(TesselError, match="checkpoint_version 1.0"):
        open_torch(cut)
    edit(cut / RANK, lambda content: content.update(checkpoint_version=3.0, model0=None))
    with pytest.raises(TesselError, match="no names of Megatron-core's"):
        open_torch(cut)
    edit(cut / RANK, lambda content: [content.pop(key) for key in ("model0", "model1")])
    with pytest.raises(TesselError, match="holds no model"):
        open_torch(cut)
    torch.save([1], cut / RANK)
    with pytest.raises(TesselError, match="holds a list, not what Megatron saves"):
        open_torch(cut)


def test_no_folder_and_no_config(cut: Path, tmp_path: Path) -> None:
    with pytest.raises(TesselError, match="does not exist"):
        open_torch(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TesselError, match="It holds no iter_"):
        open_torch(tmp_path / "empty")
    with pytest.raises(TesselError, match="has no config.json"):
        open_torch(cut, hf_dir=tmp_path / "empty")
    shutil.rmtree(cut.parent / "huggingface")
    edit(cut / "mp_rank_00_000/model_optim_rng.pt", lambda content: setattr(content["args"], "swiglu", False))
    with pytest.raises(TesselError, match="describe no model that can be read: .*--swiglu.*--hf-dir"):
        open_torch(cut)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(tp=4), "does not divide the 2 key/value heads"),
        (Target(pp=3), "cannot be dealt out evenly"),
        (Target(ep=2), "has no experts"),
        (Target(tp=2, flavour="pai"), "does not divide the vocabulary of 307 rows"),
        (Target(pp=2, num_chunks=2, layer_list=(2, 2)), "does not go with virtual pipeline stages"),
    ],
)
def test_targets_that_do_not_fit(model: Callable[..., StoredModel], target: Target, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_torch(model("qwen2"), target)


@pytest.mark.parametrize(
    ("target", "words"), [(Target(ep=3), "does not divide the 4 experts"), (Target(etp=2), "cannot hold that")]
)
def test_targets_that_do_not_fit_experts(model: Callable[..., StoredModel], target: Target, words: str) -> None:
    with pytest.raises(TesselError, match=words):
        plan_torch(model("qwen3_moe"), target)
