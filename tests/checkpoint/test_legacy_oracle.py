"""Legacy checkpoints against files of the real tool: read bit for bit, written key for key, hash for hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.checkpoint import torch_file
from tessel.checkpoint.detect import format_of, open_model
from tessel.checkpoint.legacy import open_legacy, write_legacy
from tessel.checkpoint.stored import Target
from tessel.errors import TesselError
from tests.checkpoint.megatron import different, digest, hf_model, manifest_of

pytestmark = pytest.mark.oracle

CASES = ("leg_llama_tp2pp2", "leg_llamamha_8l_tp2pp2vpp", "leg_qwen2tied_tp2pp2")


@pytest.fixture(scope="module")
def oracle(shared: Path) -> Path:
    return shared / "oracle" / "checkpoints"


def target_of(name: str) -> Target:
    """The tool pads as MindSpeed's first converter does."""
    return Target(tp=2, pp=2, num_chunks=2 if name.endswith("vpp") else 1, flavour="v1")


def entries(path: Path) -> dict[str, dict[str, Any]]:
    """All entries of a file's chunks, nested keys joined by dots, in order."""

    def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in state.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    content = torch_file.load(path)
    return {chunk: flat(state) for chunk, state in content.items() if chunk.startswith("model")}


@pytest.mark.parametrize("with_hf_dir", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_reading_gives_the_model_it_came_from(oracle: Path, name: str, with_hf_dir: bool) -> None:
    case = oracle / "cases" / name
    hf = oracle / "hf" / manifest_of(case)["model"]
    assert format_of(case / "checkpoint") == "legacy"
    found = open_model(case / "checkpoint", hf_dir=hf if with_hf_dir else None)
    assert different(found.tensors, hf_model(hf).tensors) == []
    assert (found.format, found.iteration) == ("legacy", 1)
    assert found.degrees == {"tp": 2, "pp": 2} | ({"chunks": 2} if name.endswith("vpp") else {})
    assert (found.guessed == ()) == with_hf_dir


@pytest.mark.parametrize("name", CASES)
def test_without_hf_dir_the_config_is_that_of_the_model_but_for_what_is_guessed(oracle: Path, name: str) -> None:
    case = oracle / "cases" / name
    expected = hf_model(oracle / "hf" / manifest_of(case)["model"]).config
    found = open_legacy(case / "checkpoint")
    # The tool does not store rotary_base, and reading says so; the length is its own default.
    guessed = ("rope_theta", "max_position_embeddings")
    for field in expected.__dataclass_fields__:
        if field not in ("raw", "dtype", *guessed):
            assert getattr(found.config, field) == getattr(expected, field), field
    assert any("rope_theta" in said for said in found.guessed)


@pytest.mark.parametrize("name", CASES)
def test_writing_gives_what_the_tool_wrote(oracle: Path, tmp_path: Path, name: str) -> None:
    case = oracle / "cases" / name
    manifest = manifest_of(case)
    source = hf_model(oracle / "hf" / manifest["model"])
    write_legacy(source, tmp_path / "checkpoint", target_of(name))
    written = {
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*")
        if path.is_file() and "huggingface" not in path.parts
    }
    assert written == manifest["files"].keys()
    for file, tensors in manifest["tensors"].items():
        ours, theirs = entries(tmp_path / file), entries(case / file)
        found = {
            f"{chunk}:{key}": [str(value.dtype).removeprefix("torch."), list(value.shape), digest(value)]
            for chunk, state in ours.items()
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        assert found == tensors, file
        assert [(chunk, list(state)) for chunk, state in ours.items()] == [
            (chunk, list(state)) for chunk, state in theirs.items()
        ], "the order, the states that linears lack among them"
    tracker = "checkpoint/latest_checkpointed_iteration.txt"
    assert (tmp_path / tracker).read_bytes() == (case / tracker).read_bytes()
    assert different(open_legacy(tmp_path / "checkpoint").tensors, source.tensors) == []


def test_a_config_of_another_model_is_refused(oracle: Path) -> None:
    for name, model, words in (
        ("leg_llama_tp2pp2", "llama_mha_8l_bf16", "4 layers, and .*config.json says 8"),
        ("leg_llama_tp2pp2", "qwen3_bf16", "tensors missing"),
        ("leg_llama_tp2pp2", "qwen2_untied_bf16", "query_key_value.bias.*--add-qkv-bias"),
    ):
        with pytest.raises(TesselError, match=words):
            open_legacy(oracle / "cases" / name / "checkpoint", hf_dir=oracle / "hf" / model)
