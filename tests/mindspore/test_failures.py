"""A worker that dies ends the run: with a status other than 0, and with its error on the launcher's output."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mindspore.test_layouts import msrun
from tests.runtime.launched import started
from tests.train.runs import flags, write_data

TIME_LIMIT_S = 300


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    data = write_data(tmp_path / "text")
    return flags(data, tmp_path / "run", 100_000, "--ai-framework", "mindspore", "--save-interval", "1000000")


def pid_of(rank: int, logs: Path) -> int:
    """The process of a rank, once it trains."""
    deadline_s = time.monotonic() + TIME_LIMIT_S
    log = logs / f"rank_{rank:05d}.log"
    while time.monotonic() < deadline_s:
        if log.exists() and "before the start of training step" in log.read_text():
            found = re.search(r"pid (\d+)", log.read_text())
            assert found is not None
            return int(found[1])
        time.sleep(0.2)
    raise AssertionError(f"rank {rank} did not begin to train")


def test_a_worker_that_is_killed_ends_the_run_with_its_rank_named(arguments: list[str], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    more = ["--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--rank-log-dir", str(logs)]
    with started([sys.executable, "-m", "tessel", *arguments, *more]) as launcher:
        os.kill(pid_of(1, logs), signal.SIGKILL)
        _, error = launcher.communicate(timeout=TIME_LIMIT_S)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert re.search(r"tessel: error: rank 1 \(pid \d+\) was killed by SIGKILL", error)


def test_a_workers_error_is_on_msruns_output(arguments: list[str], tmp_path: Path) -> None:
    wrong = [argument if argument != str(tmp_path / "text") else str(tmp_path / "missing") for argument in arguments]
    assert wrong != arguments
    done = msrun(2, wrong, tmp_path / "logs")
    assert done.returncode == 1
    assert "tessel: error: " in done.stdout + done.stderr and "missing" in done.stdout + done.stderr


def test_a_worker_of_msrun_that_is_killed_ends_the_run(arguments: list[str], tmp_path: Path) -> None:
    logs = tmp_path / "ranks"
    child = os.fork()
    if child == 0:  # waits for the worker, and kills it
        with suppress(BaseException):
            os.kill(pid_of(1, logs), signal.SIGKILL)
        os._exit(0)
    try:
        done: subprocess.CompletedProcess[str] = msrun(2, [*arguments, "--rank-log-dir", str(logs)], tmp_path / "logs")
    finally:
        os.waitpid(child, 0)
    assert done.returncode == 1
    assert "exit with exception" in done.stdout + done.stderr
