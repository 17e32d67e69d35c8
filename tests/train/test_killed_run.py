"""`tessel pretrain --nproc-per-node 4`: a rank is killed, and the same command goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.runtime.launched import by_rank, lives, started, wait_for
from tests.train import runs

NUM_ITERS = 60
SAVED = 10
MORE = ["--global-batch-size", "8", "--save-interval", str(SAVED), "--eval-interval", "1000"]


def test_a_killed_rank_ends_all_and_the_same_command_resumes(tmp_path: Path) -> None:
    data = runs.write_data(tmp_path / "data")
    alone = tmp_path / "alone"
    runs.tessel([*runs.flags(data, alone, NUM_ITERS, *MORE)])
    save = tmp_path / "save"
    arguments = [*runs.flags(data, save, NUM_ITERS, *MORE), "--nproc-per-node", "4"]
    with started([sys.executable, "-m", "tessel", *arguments]) as launcher:
        tracker = save / "latest_checkpointed_iteration.txt"
        wait_for(lambda: tracker.exists() or launcher.poll() is not None, "checkpoint")
        ranks = by_rank(launcher.pid)
        os.kill(ranks[2], signal.SIGKILL)
        _, err = launcher.communicate(timeout=30)
    assert f"tessel: error: rank 2 (pid {ranks[2]}) was killed by SIGKILL" in err
    assert err.count("error") == 1 and launcher.returncode != 0
    assert not any(lives(pid) for pid in ranks.values())
    reached = int(tracker.read_text())
    assert SAVED <= reached < NUM_ITERS
    resumed = runs.tessel(arguments)
    assert f"iteration {reached + 1:8d}/" in resumed.stdout and f"iteration {reached:8d}/" not in resumed.stdout
    assert runs.losses(save) == pytest.approx(runs.losses(alone), rel=1e-5)


def test_sigterm_saves_and_ends_with_the_status_of_one_process(tmp_path: Path) -> None:
    data, save = runs.write_data(tmp_path / "data"), tmp_path / "save"
    arguments = [*runs.flags(data, save, 100_000, "--save-interval", "100000"), "--nproc-per-node", "2"]
    with started([sys.executable, "-m", "tessel", *arguments]) as launcher:
        log = save / "metrics.jsonl"
        wait_for(lambda: log.exists() and '"train"' in log.read_text() or launcher.poll() is not None, "an iteration")
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, err
    assert "received SIGTERM" in out
    last = runs.metrics(save)[-1]["iteration"]
    assert int((save / "latest_checkpointed_iteration.txt").read_text()) == last
