"""Megatron-LM itself goes on from what a run saved with --ckpt-format, and prints our losses.

It needs a checkout of Megatron-LM (seen with core_v0.12.1) and a Python that has what it imports (numpy, einops,
transformers, pybind11, nltk; psutil for torch_dist):

    export MEGATRON_LM=.../Megatron-LM MEGATRON_PYTHON=.../bin/python
    make test-oracle ARGS=tests/train/test_megatron_goes_on.py
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessel.cli import main
from tests.train.test_foreign import CASES, Case, losses

FLAGS = (
    "--transformer-impl local --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion "
    "--no-rope-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm --attention-softmax-in-fp32 "
    "--distributed-backend gloo --num-workers 0 --exit-on-missing-checkpoint --no-load-rng"
).split()
MIDDLE = 14


@pytest.fixture
def megatron(shared: Path, tmp_path: Path) -> Callable[[list[str]], str]:
    """Runs its pretrain_gpt.py on one process and gives what it prints."""
    folder, python = os.environ.get("MEGATRON_LM"), os.environ.get("MEGATRON_PYTHON")
    if not folder or not python:
        pytest.skip("MEGATRON_LM and MEGATRON_PYTHON do not say where Megatron-LM is")

    def run(flags: list[str]) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        alone |= {"MASTER_PORT": str(port), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        script = [python, str(shared / "tools" / "megatron_on_cpu.py"), folder, "pretrain_gpt.py"]
        cache = ["--data-cache-path", str(tmp_path / "megatron_cache")]
        done = subprocess.run(
            [*script, *flags, *FLAGS, *cache], env=own | alone, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.oracle
@pytest.mark.parametrize("to", ["torch", "torch_dist"])
@pytest.mark.parametrize(("name", "relative"), CASES)
def test_megatron_goes_on_from_our_run(
    to: str,
    name: str,
    relative: float,
    shared: Path,
    tmp_path: Path,
    megatron: Callable[[list[str]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = Case(shared, name)
    ours = [*case.flags, "--hf-dir", str(case.folder / "hf"), "--data-cache-path", str(tmp_path / "cache")]

    def run(*more: Any) -> dict[int, float]:
        assert main(["pretrain", *ours, *map(str, more)]) == 0
        return losses(capsys.readouterr().out)

    expected = run()
    run("--save", tmp_path / "save", "--ckpt-format", to, "--exit-interval", MIDDLE)
    at = case.flags.index("--device")
    # In a form that the distributed optimizer of that version reads, it is not written.
    theirs = [flag for flag in case.flags[2:at] if flag != "--use-distributed-optimizer"]
    found = losses(megatron([*theirs, "--load", str(tmp_path / "save"), "--ckpt-format", to]))
    assert found == pytest.approx({i: loss for i, loss in expected.items() if i > MIDDLE}, rel=relative)
    assert len(found) == 6
