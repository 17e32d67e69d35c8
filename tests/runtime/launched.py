"""Starts `tests.runtime.worker` in several processes, through tessel's launcher or torchrun, and waits for its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TIME_LIMIT_S = 90.0
_LAUNCH = [sys.executable, "-m", "tests.runtime.worker", "launch"]
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def environment(**more: str) -> dict[str, str]:
    """One thread, this checkout, and nothing of a launcher that may have started the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **more}


def by_tessel(flags: str, mode: str, argument: object) -> list[str]:
    """The command of a worker's mode through tessel's launcher."""
    return [*_LAUNCH, *flags.split(), "--", mode, str(argument)]


def by_torchrun(flags: str, mode: str, argument: object) -> list[str]:
    """The same through torchrun."""
    return [*_TORCHRUN, *flags.split(), "-m", "tests.runtime.worker", mode, str(argument)]


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def started(command: Sequence[str], **more: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher that runs; it and its processes are gone afterwards."""
    launcher = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield launcher
    finally:
        if launcher.poll() is None:
            children = children_of(launcher.pid)
            launcher.kill()
            for pid in children:
                end(pid)
        launcher.communicate()


def run(command: Sequence[str], **more: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a launcher that ends by itself."""
    with started(command, **more) as launcher:
        out, err = launcher.communicate(timeout=TIME_LIMIT_S)
        return launcher.returncode, out, err


def pids(folder: Path, num_ranks: int) -> list[int]:
    """The processes of the ranks, once all have begun."""
    files = [folder / f"pid_{rank}" for rank in range(num_ranks)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files), f"pids in {folder}")
    return [int(file.read_text()) for file in files]


def wait_for(condition: object, what: str) -> None:
    """Wait until `condition()` holds."""
    deadline_s = time.monotonic() + TIME_LIMIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, f"no {what}"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether a process is there and not a dead child that nobody has asked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def end(pid: int) -> None:
    """Kill a process if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def by_rank(launcher: int) -> dict[int, int]:
    """The processes of a launcher by rank, as their environment says."""
    found = {}
    for pid in children_of(launcher):
        entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
        ranks = [entry.partition("=")[2] for entry in entries if entry.startswith("RANK=")]
        found.update({int(rank): pid for rank in ranks})
    return found
