"""Processes of tessel's own launcher that are killed or stopped, and a launcher that is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.runtime.launched import by_tessel, lives, pids, started, wait_for


def test_a_killed_rank_is_named_and_ends_all(tmp_path: Path) -> None:
    with started(by_tessel("--nproc-per-node 4", "go_on", tmp_path)) as launcher:
        ranks = pids(tmp_path, 4)
        os.kill(ranks[2], signal.SIGKILL)
        _, err = launcher.communicate(timeout=30)
    assert err.startswith(f"tessel: error: rank 2 (pid {ranks[2]}) was killed by SIGKILL")
    assert len(err.splitlines()) == 1
    assert launcher.returncode == 128 + signal.SIGKILL
    assert not any(lives(pid) for pid in ranks)


def test_sigterm_goes_to_the_processes_which_stop_in_good_order(tmp_path: Path) -> None:
    with started(by_tessel("--nproc-per-node 2", "stop", tmp_path)) as launcher:
        pids(tmp_path, 2)
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=30)
    assert (launcher.returncode, err) == (0, "")
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


def test_processes_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    with started(by_tessel("--nproc-per-node 2", "go_on", tmp_path)) as launcher:
        ranks = pids(tmp_path, 2)
        launcher.kill()
        wait_for(lambda: not any(lives(pid) for pid in ranks), "end of the processes")
        _, err = launcher.communicate(timeout=30)
    assert err == f"tessel: error: the launcher (pid {launcher.pid}) is gone\n"
