"""Damaged checkpoints of every format: an error in words or a correct load; and pickles that ask for code."""

from __future__ import annotations

import faulthandler
import os
import pickle
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.checkpoint.detect import open_model
from tessel.cli import main
from tessel.errors import TesselError
from tests.checkpoint import mutations
from tests.checkpoint.megatron import hf_model

FORMATS = ("safetensors", "shards", "bin", "mapped", "torch", "legacy", "args", "torch_dist", "torch_dcp")
NUM_QUICK, NUM_ALL = 60, 2000
# Far less than what a file could make a reader take by mistake, and more than what the tests' own copies do.
SLACK_BYTES = 150 * 2**20
MAX_SECONDS = 60


@pytest.fixture(params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, tiny_hf_folder: Callable[..., Path], tmp_path: Path) -> Path:
    kind = request.param
    family = "qwen3_moe" if kind in ("torch_dist", "mapped") else "qwen2"
    source = tiny_hf_folder(family, vocab_size=61, intermediate_size=24)
    if kind == "safetensors":
        return source
    if kind == "mapped":
        (source / "model_mapping.yaml").write_text(
            "family: qwen3_moe\ntensors:\n  model.norm.{kind}: model.norm.{kind}\n  model.embed_tokens.weight:\n"
            "    {name: model.embed_tokens.weight}\n"
        )
        return source
    if kind == "shards":
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        return tmp_path / "shards"
    if kind == "bin":
        weights = {name: tensor.read().clone() for name, tensor in hf_model(source).tensors.items()}
        (source / "model.safetensors").unlink()
        torch.save(weights, source / "pytorch_model.bin")
        return source
    to = "torch" if kind == "args" else kind
    degrees = ["--tensor-model-parallel-size", "2"] if kind in ("torch", "legacy") else []
    assert main(["convert", "--load", str(source), "--save", str(tmp_path / "made"), "--to", to, *degrees]) == 0
    if kind == "args":  # the model is what they say
        shutil.rmtree(tmp_path / "made/huggingface")
    return tmp_path / "made"


def ways(path: Path) -> list[Callable[[bytes, random.Random], bytes]]:
    """What can be done to a file, by its kind."""
    if path.suffix in (".pt", ".bin"):
        return [mutations.of_bytes, mutations.of_archive, mutations.of_content, mutations.of_content]
    if path.suffix == ".json":
        return [mutations.of_bytes, mutations.of_json, mutations.of_json]
    return [mutations.of_bytes, *[mutations.of_safetensors] * (path.suffix == ".safetensors")]


def check(folder: Path, num_mutations: int, seed: int) -> None:
    numbers = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "MANIFEST.json")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcomes = {"refused": 0, "read": 0}
    for number in range(num_mutations):
        path = numbers.choice(files)
        whole = path.read_bytes()
        # A new file: the old one may still be mapped, and cutting it would be a crash of the test's own making.
        path.unlink()
        if numbers.random() < 0.97:
            path.write_bytes(numbers.choice(ways(path))(whole, numbers))
        start = time.monotonic()
        try:
            outcomes[read(folder)] += 1
        except BaseException as error:
            error.add_note(f"mutation {number} of seed {seed}, in {path}")
            raise
        assert time.monotonic() - start < MAX_SECONDS, (number, path)
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
    assert min(outcomes.values()) > num_mutations // 50, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < SLACK_BYTES


def read(folder: Path) -> str:
    """Read everything: "read", or "refused" in words."""
    try:
        found = open_model(folder)
        for name, tensor in (*found.tensors.items(), *found.optimizer.items()):
            values = tensor.read()
            assert tuple(values.shape) == tensor.shape, name
    except TesselError as error:
        assert str(error).rstrip().endswith((".", ".)", "?")), error
        assert "Traceback" not in str(error)
        return "refused"
    return "read"


@pytest.mark.timeout(300)
def test_damaged_files(checkpoint: Path) -> None:
    faulthandler.enable()
    check(checkpoint, NUM_QUICK, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_damaged_files(checkpoint: Path) -> None:
    faulthandler.enable()
    check(checkpoint, NUM_ALL, seed=2)


class Poison:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def poisoned(content: Any, mark: Path) -> Any:
    return {**content, "poison": Poison(mark)} if isinstance(content, dict) else [content, Poison(mark)]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["bin", "torch", "legacy", "common.pt", "distrib_optim.pt"])
def test_a_poisoned_file_is_refused_and_nothing_runs(
    tiny_hf_folder: Callable[..., Path], tmp_path: Path, place: str, protocol: int
) -> None:
    source = tiny_hf_folder("qwen2")
    mark = tmp_path / "ran"
    if place == "bin":
        folder, name = source, "pytorch_model.bin"
        torch.save({key: tensor.read().clone() for key, tensor in hf_model(source).tensors.items()}, folder / name)
        (source / "model.safetensors").unlink()
    else:
        folder, name = tmp_path / "made", {"common.pt": "common.pt"}.get(place, "model_optim_rng.pt")
        to = {"common.pt": "torch_dist", "legacy": "legacy"}.get(place, "torch")
        assert main(["convert", "--load", str(source), "--save", str(folder), "--to", to]) == 0
    (path,) = folder.rglob(name)
    content = torch.load(path, weights_only=False)
    if place == "distrib_optim.pt":
        path, content = path.parent / place, {}
    torch.save(poisoned(content, mark), path, pickle_protocol=protocol)
    with pytest.raises(TesselError, match=r"posix\.system"):
        open_model(folder)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the poison works where nothing is checked"


@pytest.mark.parametrize("to", ["torch_dist", "torch_dcp"])
def test_a_poisoned_index_is_refused_and_nothing_runs(
    tiny_hf_folder: Callable[..., Path], tmp_path: Path, to: str
) -> None:
    mark = tmp_path / "ran"
    assert main(["convert", "--load", str(tiny_hf_folder("qwen2")), "--save", str(tmp_path / "made"), "--to", to]) == 0
    (path,) = (tmp_path / "made").rglob(".metadata")
    content = pickle.loads(path.read_bytes())
    content.poison = Poison(mark)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(TesselError, match=r"posix\.system"):
        open_model(tmp_path / "made")
    assert not mark.exists()
