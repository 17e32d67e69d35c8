"""Two nodes: two agents on loopback, one process each."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.runtime.launched import TIME_LIMIT_S, by_torchrun, free_port, pids, started


def two_nodes(stack: ExitStack, mode: str, argument: object) -> list[subprocess.Popen[str]]:
    """torchrun for node 0 and node 1."""
    meeting = f"--nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {free_port()}"
    commands = [by_torchrun(f"{meeting} --node-rank {node}", mode, argument) for node in (0, 1)]
    return [stack.enter_context(started(command)) for command in commands]


def ends(nodes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and stderr of each."""
    return [(node.returncode, err) for node in nodes for err in [node.communicate(timeout=TIME_LIMIT_S)[1]]]


def test_without_shared_storage_the_first_of_each_node_makes_what_the_others_read(tmp_path: Path) -> None:
    with ExitStack() as stack:
        (status, _), (other_status, _) = ends(two_nodes(stack, "once", tmp_path))
    assert (status, other_status) == (0, 0)
    made = {path.name for path in tmp_path.iterdir()}
    assert {"all_leader_0_1", "all_leader_1_0", "node_0_leader_0_1", "node_1_leader_1_1"} <= made


def test_a_node_that_lacks_a_folder_is_named_on_all(tmp_path: Path) -> None:
    with ExitStack() as stack:
        found = ends(two_nodes(stack, "lacking", tmp_path))
    for status, err in found:
        assert status == 1
        first = err.splitlines()[0]
        assert first.startswith("tessel: error: node 1 (") and first.endswith("): --load: /model does not exist.")


def test_a_node_whose_process_is_killed_ends_the_other(tmp_path: Path) -> None:
    with ExitStack() as stack:
        nodes = two_nodes(stack, "go_on", tmp_path)
        os.kill(pids(tmp_path, 2)[1], signal.SIGKILL)
        (status, err), (other_status, other_err) = ends(nodes)
    assert status != 0 and other_status != 0
    assert "SIGKILL" in other_err
    assert "tessel: error: another process is gone in all_reduce (worker.py:" in err
