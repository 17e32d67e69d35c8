"""Whole runs of a mixture of experts: resuming, what is exported, the log, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tessel.generate.engine import load_model
from tessel.model.transformer import Transformer
from tests.train import runs

EXPERTS = "--num-experts 4 --moe-router-topk 2 --qk-layernorm --moe-ffn-hidden-size 24 --moe-layer-freq [0,1]".split()
BIAS = (
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.01 "
    "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_data(tmp_path_factory.mktemp("data") / "text")


def kept_bias(model: Transformer) -> torch.Tensor:
    assert model.balance.bias_LX is not None
    return model.balance.bias_LX


def test_resuming_is_bitwise_and_the_bias_goes_along(data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = runs.tessel(runs.flags(data, whole, 6, *EXPERTS, *BIAS))
    assert " max expert load: " in result.stdout and " load_balancing_loss: " in result.stdout
    assert "transformers does not know of sigmoid scores, a bias of the choice" in result.stdout + result.stderr
    runs.tessel(runs.flags(data, parts, 6, *EXPERTS, *BIAS, "--exit-interval", "4"))
    runs.tessel(runs.flags(data, parts, 6, *EXPERTS, *BIAS))
    assert runs.losses(parts) == runs.losses(whole)
    assert runs.weight_bytes(parts) == runs.weight_bytes(whole)
    configs = [json.loads((save / "hf" / "config.json").read_text()) for save in (whole, parts)]
    assert configs[0] == configs[1]
    bias = torch.tensor(configs[0]["e_score_correction_bias"])
    assert not bias[0].any() and bias[1].any(), "layer 0 has no experts"
    assert bias.abs().max() <= 0.0601
    from_export, _ = load_model(whole / "hf")
    from_run, config = load_model(whole)
    assert config.scoring_func == "sigmoid" and config.dense_layers == (0,)
    for model in (from_export, from_run):
        assert torch.equal(kept_bias(model), bias)
    row = runs.metrics(whole)[-1]
    assert row["max_expert_load"] >= 1 and row["load_balancing_loss"] > 0 and row["z_loss"] > 0


def test_an_exported_mixture_is_a_start(data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    runs.tessel(runs.flags(data, first, 2, *EXPERTS, *BIAS))
    runs.tessel(runs.loading(first / "hf", data, second, 3, *BIAS, "--exit-interval", "1"))
    # --load names the model as it was before the options changed it: going on is no contradiction.
    runs.tessel(runs.loading(first / "hf", data, second, 3, *BIAS))
    assert [row["iteration"] for row in runs.metrics(second)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--moe-pad-expert-input-to-capacity"], "needs --moe-expert-capacity-factor"),
        (["--moe-expert-capacity-factor", "0"], "--moe-expert-capacity-factor is 0.0: it must be above 0"),
        (["--moe-aux-loss-coeff", "-1"], "--moe-aux-loss-coeff is -1.0: it must not be negative"),
        (["--moe-router-enable-expert-bias"], "needs --moe-router-score-function sigmoid"),
        (["--moe-router-load-balancing-type", "sinkhorn"], "it must be one of aux_loss"),
        (["--moe-router-topk", "5"], "--moe-router-topk 5 is more than --num-experts 4"),
    ],
)
def test_what_is_refused(more: list[str], message: str, data: Path) -> None:
    result = runs.tessel(runs.flags(data, None, 2, *EXPERTS, *more), expect=2)
    assert message in result.stderr


def test_options_of_experts_for_a_model_without(data: Path) -> None:
    result = runs.tessel(runs.flags(data, None, 2, "--moe-aux-loss-coeff", "0.1"), expect=2)
    assert "--moe-aux-loss-coeff: the model has no experts" in result.stderr
