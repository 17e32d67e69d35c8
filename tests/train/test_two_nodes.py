"""Two torchrun agents on loopback that share no folder: the numbers of one process, also after one is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.runtime.launched import TIME_LIMIT_S, by_rank, free_port, started, wait_for
from tests.train import runs

NUM_ITERS = 60
SAVED = 10
MORE = ["--save-interval", str(SAVED), "--eval-interval", "1000"]
TRACKER = "latest_checkpointed_iteration.txt"


def start(stack: ExitStack, nodes: list[Path]) -> list[subprocess.Popen[str]]:
    """One process on each node, which sees its own folder alone."""
    port = free_port()
    launchers = []
    for number, node in enumerate(nodes):
        agent = f"--nnodes 2 --nproc-per-node 1 --node-rank {number} --master-addr 127.0.0.1 --master-port {port}"
        flags = runs.flags(node / "data", node / "save", NUM_ITERS, *MORE, "--no-shared-storage")
        command = [sys.executable, "-m", "torch.distributed.run", *agent.split(), "-m", "tessel", *flags]
        launchers.append(stack.enter_context(started([*command, "--data-cache-path", str(node / "cache")])))
    return launchers


def test_nodes_with_folders_of_their_own_train_are_killed_and_resume(tmp_path: Path) -> None:
    data = runs.write_data(tmp_path / "data")
    alone = tmp_path / "alone"
    runs.tessel(runs.flags(data, alone, NUM_ITERS, *MORE))
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{data}{suffix}", node / f"data{suffix}")
    with ExitStack() as stack:
        launchers = start(stack, nodes)
        trackers = [node / "save" / TRACKER for node in nodes]
        wait_for(lambda: all(t.exists() for t in trackers) or launchers[0].poll() is not None, "checkpoints")
        os.kill(by_rank(launchers[1].pid)[1], signal.SIGKILL)
        errors = [launcher.communicate(timeout=TIME_LIMIT_S)[1] for launcher in launchers]
    assert all(launcher.returncode for launcher in launchers), errors
    assert all(SAVED <= int(tracker.read_text()) < NUM_ITERS for tracker in trackers)
    with ExitStack() as stack:
        launchers = start(stack, nodes)
        errors = [launcher.communicate(timeout=TIME_LIMIT_S)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors
    assert runs.losses(nodes[0] / "save") == pytest.approx(runs.losses(alone), rel=1e-5)
    assert all(any((node / "cache").iterdir()) for node in nodes), "each has built its own index"
    assert (nodes[0] / "save" / "hf" / "model.safetensors").exists()
    assert not (nodes[1] / "save" / "hf").exists()
