"""megatron-core's own dist_checkpointing loads what we write, and we load what it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessel.checkpoint.stored import Target
from tessel.checkpoint.torch_dist import open_torch_dist
from tessel.checkpoint.torch_dist_write import write_torch_dist
from tests.checkpoint.megatron import different, hf_model
from tests.checkpoint.megatron_core import gpt_model, load, losses, randomize, save
from tests.parallel.processes import run

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

ROWS = 128
ITERATION = "iter_0000001"


@pytest.fixture
def folder(tiny_hf_folder: Callable[..., Path]) -> Callable[..., Path]:
    """A Hugging Face model whose vocabulary needs no padding: padding takes part in Megatron's softmax."""

    def make(family: str, **overrides: Any) -> Path:
        experts = {"num_experts": 4} if family in ("qwen2_moe", "qwen3_moe") else {}
        return tiny_hf_folder(family, vocab_size=ROWS, **experts, **overrides)

    return make


def loaded_by_megatron(checkpoint: str) -> tuple[float, float]:
    """The largest difference of a token's loss, and how much the losses of tokens differ."""
    stored = open_torch_dist(checkpoint)
    model = gpt_model(stored.config, ROWS)
    load(model, Path(checkpoint) / ITERATION)
    ours_BS, theirs_BS = losses(model, stored.config, stored)
    return float((ours_BS - theirs_BS).abs().max()), float(theirs_BS.std())


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("qwen3", True)])
def test_megatron_loads_ours_and_has_our_loss(
    folder: Callable[..., Path], tmp_path: Path, family: str, tied: bool
) -> None:
    source = hf_model(folder(family, tie_word_embeddings=tied))
    write_torch_dist(source, tmp_path, Target(tp=2, pp=2, vocab_divisor=1))
    ((difference, spread),) = run(1, loaded_by_megatron, str(tmp_path))
    assert difference < 1e-5
    assert spread > 0.1, "tokens of one loss would compare nothing"


def written_by_megatron(checkpoint: str, hf: str) -> tuple[float, float]:
    stored = hf_model(Path(hf))
    model = gpt_model(stored.config, ROWS)
    randomize(model, seed=1)
    save(model, Path(checkpoint) / ITERATION, {})
    found = open_torch_dist(Path(checkpoint) / ITERATION, hf_dir=hf)
    ours_BS, theirs_BS = losses(model, stored.config, found)
    return float((ours_BS - theirs_BS).abs().max()), float(theirs_BS.std())


def test_we_load_megatrons_and_have_its_loss(folder: Callable[..., Path], tmp_path: Path) -> None:
    ((difference, spread),) = run(1, written_by_megatron, str(tmp_path), str(folder("qwen2")))
    assert difference < 1e-5
    assert spread > 0.1


def through_megatron(ours: str, theirs: str, tp: int, pp: int, ep: int) -> None:
    model = gpt_model(open_torch_dist(ours).config, ROWS, tp, pp, ep)
    load(model, Path(ours) / ITERATION)
    save(model, Path(theirs) / ITERATION, {})


@pytest.mark.parametrize(
    ("family", "tp", "pp", "ep"),
    [("qwen3", 2, 1, 1), ("qwen2", 1, 2, 1), ("qwen3_moe", 1, 1, 2), ("qwen2_moe", 1, 2, 1)],
)
def test_through_megatron_and_back(
    folder: Callable[..., Path], tmp_path: Path, family: str, tp: int, pp: int, ep: int
) -> None:
    """Ours, loaded by megatron-core on two ranks of other degrees and saved by it, is the same bit for bit."""
    hf = folder(family, tie_word_embeddings=family == "qwen2")
    source = hf_model(hf)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_torch_dist(source, ours, Target(tp=2, ep=2 if source.config.num_experts else 1))
    run(2, through_megatron, str(ours), str(theirs), tp, pp, ep)
    found = open_torch_dist(theirs / ITERATION, hf_dir=hf)
    assert different(found.tensors, source.tensors) == []
