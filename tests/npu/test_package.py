"""What is used of torch_npu, against the real package: `make test-npu-schemas`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.model import vendor_operators

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the package says, from a process of its own: its import changes torch for good.

    TESSEL_TORCH_NPU is a folder as `tests/npu/package.py` makes it.
    """
    folder = os.environ.get("TESSEL_TORCH_NPU")
    if folder is None:
        pytest.skip("no torch_npu that can be imported here (make test-npu-schemas)")
    repository = Path(__file__).resolve().parent.parent.parent
    environment: dict[str, str] = dict(
        os.environ,
        PYTHONPATH=f"{folder}/site:{repository}",
        LD_LIBRARY_PATH=f"{folder}/lib",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    command = [sys.executable, "-m", "tests.npu.ask", str(tmp_path_factory.mktemp("npu")), *vendor_operators.schemas()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_operators_are_declared_as_recorded(answers: dict[str, Any]) -> None:
    """The other tests hold every call against the record."""
    assert answers["schemas"] == list(vendor_operators.schemas().values())


def test_operators_without_gradients_of_their_own_are_those_that_are_given_some(answers: dict[str, Any]) -> None:
    without = ["npu_grouped_matmul", "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"]
    assert answers["without_gradients"] == without


def test_the_device_has_what_is_asked_of_it(answers: dict[str, Any]) -> None:
    assert answers["fused_adamw"] and answers["kernels"] and answers["module"]
    assert answers["backend"] == "cpu:gloo,npu:hccl"
    assert answers["mc2"] == "MC2 is for 2, 4, 8, 16 or 32 NPUs of one machine, and these are 1 of 0"
    assert (answers["peak_memory_bytes"], answers["auto"]) == (0, "cpu")


def test_torchair_gives_a_compiler(answers: dict[str, Any]) -> None:
    assert answers["torchair"] == [True, None]


def test_the_profiler_takes_what_it_is_given(answers: dict[str, Any]) -> None:
    assert answers["profiler_differences"] == []
    # Counters of AI Cores come with level 1, says the package's reference.
    metrics = {"Level_none": "NONE", "Level0": "NONE", "Level1": "PIPE_UTILIZATION", "Level2": "PIPE_UTILIZATION"}
    expected = [[level, kind, f"ACL_AICORE_{kept}"] for level, kept in metrics.items() for kind in ("text", "db")]
    assert answers["recordings"] == expected
