"""Megatron's torch format against files of the real tools: read bit for bit, written key for key, hash for hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tessel.checkpoint import torch_file
from tessel.checkpoint.mcore import open_torch
from tessel.checkpoint.mcore_write import write_torch
from tessel.checkpoint.stored import Cast, Flavour, Target
from tessel.errors import TesselError
from tests.checkpoint.megatron import different, hf_model, manifest_of, tensors_of

pytestmark = pytest.mark.oracle

CASES = (
    "v1_llama_tp2pp2 v1_mixtral_tp1pp2ep2 v1_qwen2_8l_pp4_list v1_qwen2_8l_tp2pp2vpp v1_qwen2_fp16default_tp1pp1 "
    "v1_qwen2_tp1pp1 v1_qwen2_tp1pp4 v1_qwen2_tp2pp1 v1_qwen2_tp2pp2 v1_qwen2_tp2pp2_vocab128 v1_qwen2tied_tp1pp1 "
    "v1_qwen2tied_tp2pp2 v1_qwen3_tp2pp2 v1_qwen3moe_gemm_tp2pp1ep2 v2_qwen25_tp2pp2 v2_qwen2_8l_tp2pp2vpp "
    "v2_qwen2tied_tp2pp2 v2_qwen3_te_tp2pp2 v2_qwen3_tp2pp2 v2_qwen3moe_gemm_etp1 v2_qwen3moe_gemm_te_tp1ep2"
).split()
# What section 2 of the formats' reference names, and is true of every model.
ARGS = (
    "num_layers hidden_size num_attention_heads group_query_attention num_query_groups num_key_value_heads "
    "ffn_hidden_size kv_channels vocab_size padded_vocab_size make_vocab_size_divisible_by norm_epsilon "
    "layernorm_epsilon rotary_base rope_theta params_dtype bf16 fp16 torch_dtype tensor_model_parallel_size "
    "pipeline_model_parallel_size expert_model_parallel_size expert_tensor_parallel_size num_layer_list "
    "virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage world_size add_position_embedding "
    "untie_embeddings_and_output_weights add_qkv_bias consumed_train_samples consumed_valid_samples"
).split()


@pytest.fixture(scope="module")
def oracle(shared: Path) -> Path:
    return shared / "oracle" / "checkpoints"


def target_of(manifest: dict[str, Any]) -> Target:
    """What the tool's command line asked for."""
    words, degrees = manifest["command"].split(), manifest["degrees"]

    def value(flag: str) -> str | None:
        return words[words.index(flag) + 1] if flag in words else None

    etp, divisor, layers = (
        value("--expert-tensor-parallel-size"),
        value("--make-vocab-size-divisible-by"),
        value("--num-layer-list"),
    )
    return Target(
        tp=degrees.get("tp", 1),
        pp=degrees.get("pp", 1),
        ep=degrees.get("ep", 1),
        etp=int(etp) if etp else None,
        num_chunks=2 if "--num-layers-per-virtual-pipeline-stage" in words else 1,
        layer_list=tuple(map(int, layers.split(","))) if layers else None,
        flavour=cast(Flavour, manifest["name"][:2]),
        vocab_divisor=int(divisor) if divisor else None,
        dtype=torch.float16 if "fp16default" in manifest["name"] else None,
        transformer_engine="transformer_engine" in words,
        grouped_gemm="--moe-grouped-gemm" in words,
    )


@pytest.mark.parametrize("with_hf_dir", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_reading_gives_the_model_it_came_from(oracle: Path, name: str, with_hf_dir: bool) -> None:
    case = oracle / "cases" / name
    hf = oracle / "hf" / manifest_of(case)["model"]
    expected = hf_model(hf).tensors
    if "fp16default" in name:
        expected = {key: Cast(tensor, torch.float16) for key, tensor in expected.items()}
    found = open_torch(case / "checkpoint", hf_dir=hf if with_hf_dir else None)
    assert different(found.tensors, expected) == []
    assert found.iteration == 1
    asked = target_of(manifest_of(case))
    assert [found.degrees.get(axis, 1) for axis in ("tp", "pp", "ep", "chunks")] == [
        asked.tp,
        asked.pp,
        asked.ep,
        asked.num_chunks,
    ]
    assert (found.guessed == ()) == (with_hf_dir or name.startswith("v2"))


@pytest.mark.parametrize("name", CASES)
def test_without_hf_dir_the_config_is_that_of_the_model_but_for_what_is_guessed(oracle: Path, name: str) -> None:
    case = oracle / "cases" / name
    expected = hf_model(oracle / "hf" / manifest_of(case)["model"]).config
    found = open_torch(case / "checkpoint").config
    for field in expected.__dataclass_fields__:
        if field in ("raw", "dtype") or (field == "rope_theta" and name.startswith("v1")):
            continue  # the first converter stores 10000 whatever the model's, and reading says so
        assert getattr(found, field) == getattr(expected, field), field


@pytest.mark.parametrize("name", CASES)
def test_writing_gives_what_the_tool_wrote(oracle: Path, tmp_path: Path, name: str) -> None:
    case = oracle / "cases" / name
    manifest = manifest_of(case)
    source = hf_model(oracle / "hf" / manifest["model"])
    target = target_of(manifest)
    write_torch(source, tmp_path / "checkpoint", target)
    written = {
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*")
        if path.is_file() and "huggingface" not in path.parts
    }
    assert written == manifest["files"].keys()
    for file, tensors in manifest["tensors"].items():
        assert tensors_of(tmp_path / file) == tensors, file
    tracker = "checkpoint/latest_checkpointed_iteration.txt"
    assert (tmp_path / tracker).read_bytes() == (case / tracker).read_bytes()
    back = open_torch(tmp_path / "checkpoint")
    expected = source.tensors
    if target.dtype is not None:
        expected = {key: Cast(tensor, target.dtype) for key, tensor in expected.items()}
    assert different(back.tensors, expected) == []
    assert set(ARGS) <= back.args.keys()


@pytest.mark.parametrize("name", [case for case in CASES if case.startswith("v1")])
def test_keys_come_in_the_order_of_the_tool(oracle: Path, tmp_path: Path, name: str) -> None:
    """It is that of Megatron's modules, the states that linears lack among them."""
    manifest = manifest_of(oracle / "cases" / name)
    write_torch(hf_model(oracle / "hf" / manifest["model"]), tmp_path / "checkpoint", target_of(manifest))
    for file in manifest["tensors"]:
        ours = torch.load(tmp_path / file, weights_only=False)
        theirs = torch_file.load(oracle / "cases" / name / file)
        for chunk in (key for key in theirs if str(key).startswith("model")):
            assert list(ours[chunk]) == list(theirs[chunk])


def test_a_checkpoint_without_the_models_biases_is_refused(oracle: Path) -> None:
    with pytest.raises(TesselError, match=r"4 tensors missing: .*linear_qkv\.bias.*--add-qkv-bias"):
        open_torch(oracle / "cases/v1_qwen2_nobias_tp1pp1/checkpoint", hf_dir=oracle / "hf/qwen2_untied_bf16")


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        ("v1_qwen2_tp2pp2", "qwen3_bf16", "tensors missing.*q_layernorm"),
        ("v1_qwen2_tp2pp2", "qwen2_8l_bf16", "4 layers, and .*config.json says 8"),
        ("v1_llama_tp2pp2", "llama_mha_8l_bf16", "4 layers"),
        ("v1_qwen2_tp2pp2", "qwen2_tied_bf16", "shape|and should be|differs from the embedding"),
        ("v1_qwen2tied_tp1pp1", "qwen2_untied_bf16", "output_layer.weight|should be"),
        ("v1_qwen3moe_gemm_tp2pp1ep2", "qwen3_bf16", "missing"),
    ],
)
def test_a_config_of_another_model_is_refused(oracle: Path, name: str, model: str, words: str) -> None:
    with pytest.raises(TesselError, match=words):
        open_torch(oracle / "cases" / name / "checkpoint", hf_dir=oracle / "hf" / model)
