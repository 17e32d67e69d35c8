"""The same command on an accelerator: the CPU's losses, to the rounding of the precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.runs import flags, losses, metrics, tessel, weight_bytes, write_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch sees no accelerator"),
]


def on(device: str, arguments: list[str]) -> list[str]:
    at = arguments.index("--device") + 1
    return [*arguments[:at], device, *arguments[at + 1 :]]


@pytest.mark.parametrize(("precision", "tolerance"), [("--fp32", 1e-4), ("--bf16", 2e-2), ("--fp16", 2e-2)])
def test_losses_are_those_of_the_cpu(tmp_path: Path, precision: str, tolerance: float) -> None:
    data = write_data(tmp_path / "data")
    more = [precision, "--initial-loss-scale", "1024"]
    tessel(on("cpu", flags(data, tmp_path / "cpu", 20, *more)))
    tessel(on("auto", flags(data, tmp_path / "auto", 20, *more)))
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)
    assert metrics(tmp_path / "auto")[0]["peak_memory_bytes"] > 0


@pytest.mark.parametrize("precision", ["--fp32", "--bf16"])
def test_resuming_is_bitwise(tmp_path: Path, precision: str) -> None:
    data = write_data(tmp_path / "data")
    more = [precision, "--deterministic-mode"]
    tessel(on("auto", flags(data, tmp_path / "whole", 12, *more)))
    tessel(on("auto", flags(data, tmp_path / "parts", 12, *more, "--exit-interval", "6")))
    tessel(on("auto", flags(data, tmp_path / "parts", 12, *more)))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weight_bytes(tmp_path / "parts") == weight_bytes(tmp_path / "whole")


@pytest.mark.parametrize("option", ["--compile", "--recompute-activations"])
def test_options_keep_the_losses(tmp_path: Path, option: str) -> None:
    data = write_data(tmp_path / "data")
    tessel(on("auto", flags(data, tmp_path / "plain", 8, "--bf16")))
    tessel(on("auto", flags(data, tmp_path / "option", 8, "--bf16", option)))
    assert losses(tmp_path / "option") == pytest.approx(losses(tmp_path / "plain"), rel=1e-2)


WIDE = "--hidden-size 256 --ffn-hidden-size 512 --seq-length 64 --deterministic-mode".split()
PRECISE = "--use-precision-aware-optimizer"
RECOMPUTE = "--recompute-granularity selective --recompute-modules core_attn layernorm"


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        ("--cpu-offloading-num-layers 2", 0.0),
        (f"--swap-attention {RECOMPUTE} mlp", 0.0),
        (f"{RECOMPUTE} --recompute-activation-function --cpu-offloading-num-layers 1", 0.0),
        ("--swap-optimizer", 0.0),
        # The CPU rounds its products otherwise.
        ("--optimizer-cpu-offload", 1e-3),
        ("--optimizer-cpu-offload --optimizer-offload-fraction 0.5 --overlap-cpu-optimizer-d2h-h2d", 1e-3),
        ("--optimizer-cpu-offload --no-pin-cpu-grads --no-pin-cpu-params", 1e-3),
        (f"{PRECISE} --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --swap-optimizer", 1e-2),
        (f"{PRECISE} --exp-avg-dtype 8bit --exp-avg-sq-dtype 8bit", 1e-2),
    ],
)
def test_what_saves_memory_keeps_the_losses(tmp_path: Path, option: str, tolerance: float) -> None:
    data = write_data(tmp_path / "data")
    tessel(on("auto", flags(data, tmp_path / "plain", 8, "--bf16", *WIDE)))
    tessel(on("auto", flags(data, tmp_path / "option", 8, "--bf16", *WIDE, *option.split())))
    found, expected = losses(tmp_path / "option"), losses(tmp_path / "plain")
    assert found == (pytest.approx(expected, rel=tolerance) if tolerance else expected)
    if tolerance == 0.0:
        assert weight_bytes(tmp_path / "option") == weight_bytes(tmp_path / "plain")
