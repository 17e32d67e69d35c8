"""Whole training runs on several processes, through the command line's own entry, and what they came to."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from safetensors.torch import load_file

TIME_LIMIT_S = 240.0


@dataclass(frozen=True)
class Outcome:
    """What a run printed and left."""

    losses: list[float]
    grad_norms: list[float]
    evaluations: list[float]
    weights: dict[str, torch.Tensor]
    samples: list[list[int]]


@dataclass(frozen=True)
class Deviation:
    """How far a run is from the one of one process, relative; the last is the share of weights within 1e-5."""

    loss: float
    grad_norm: float
    weights_within: float


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def train(num_processes: int, arguments: Sequence[str], save: Path, *, recorder: str | None = None) -> None:
    """`tessel ARGUMENTS --save SAVE` on so many processes; raises what the first rank to fail raised.

    `recorder` names a context manager, as module:name, that is entered with (save, rank) around the run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.pipelining", "transformers"])
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    pipes = [context.Pipe(duplex=False) for _ in range(num_processes)]
    processes = [
        context.Process(
            target=_one_rank,
            args=(rank, environment if num_processes > 1 else {}, [*arguments, "--save", str(save)], save, sending),
            kwargs={"recorder": recorder},
        )
        for rank, (_, sending) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, sending in pipes:
            sending.close()
        _wait_for([receiving for receiving, _ in pipes], save.parent / f"{save.name}.ranks")
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()


def _wait_for(pipes: list[Connection], folder: Path) -> None:
    left = dict(zip(pipes, range(len(pipes)), strict=True))
    while left:
        ready = wait(list(left), timeout=TIME_LIMIT_S)
        assert ready, f"ranks {sorted(left.values())} did not end within {TIME_LIMIT_S:g} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = left.pop(pipe)
            try:
                failure = pipe.recv()
            except EOFError:
                said = "\n".join(path.read_text() for path in sorted(folder.glob("*.err")))
                raise AssertionError(f"rank {rank} ended early:\n{said}") from None
            assert failure is None, f"rank {rank} failed:\n{failure}"


def _one_rank(
    rank: int, environment: dict[str, str], arguments: list[str], save: Path, pipe: Connection, recorder: str | None
) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    if environment:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    folder = save.parent / f"{save.name}.ranks"
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout = open(folder / f"{rank}.out", "w")  # noqa: SIM115 - as long as the process lives
    sys.stderr = open(folder / f"{rank}.err", "w")  # noqa: SIM115
    try:
        status = _run(arguments, folder, rank, recorder)
        sys.stderr.flush()
        failure = None if status == 0 else f"exit status {status}\n{(folder / f'{rank}.err').read_text()}"
    except BaseException:  # noqa: BLE001 - told to the test, which fails with it
        failure = traceback.format_exc()
    pipe.send(failure)
    pipe.close()


def _run(arguments: list[str], folder: Path, rank: int, recorder: str | None) -> int:
    from tessel.cli import main
    from tests.layouts.recorders import around, recording_samples

    with recording_samples(folder, rank), around(recorder, folder, rank):
        return main(arguments)


def read(save: Path, num_processes: int) -> Outcome:
    """What the run in `save` came to."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    return Outcome(
        losses=[row["lm_loss"] for row in steps],
        grad_norms=[row["grad_norm"] for row in steps],
        evaluations=[row["lm_loss_validation"] for row in rows if "lm_loss_validation" in row],
        weights=load_file(save / "hf" / "model.safetensors"),
        samples=_samples(save.parent / f"{save.name}.ranks", num_processes),
    )


def _samples(folder: Path, num_processes: int) -> list[list[int]]:
    """The sample ids of every step, sorted: of all replicas together, each counted once."""
    by_replica: dict[int, list[list[int]]] = {}
    for rank in range(num_processes):
        record = json.loads((folder / f"{rank}.samples.json").read_text())
        known = by_replica.setdefault(record["replica"], record["steps"])
        assert known == record["steps"], f"rank {rank} read other samples than its replica {record['replica']}"
    return [sorted(i for part in step for i in part) for step in zip(*by_replica.values(), strict=True)]


def compare(outcome: Outcome, reference: Outcome) -> Deviation:
    """The largest deviations of a run from the reference."""
    assert len(outcome.losses) == len(reference.losses)
    assert outcome.weights.keys() == reference.weights.keys()
    close = total = 0
    for name, weights in reference.weights.items():
        assert outcome.weights[name].shape == weights.shape, name
        difference = (outcome.weights[name].double() - weights.double()).abs()
        close += int((difference <= 1e-5).sum())
        total += weights.numel()
    return Deviation(
        _largest(outcome.losses, reference.losses), _largest(outcome.grad_norms, reference.grad_norms), close / total
    )


def _largest(values: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(value / other - 1) for value, other in zip(values, expected, strict=True))


def forget(save: Path) -> None:
    """Remove a run and the records beside it."""
    shutil.rmtree(save, ignore_errors=True)
    shutil.rmtree(save.parent / f"{save.name}.ranks", ignore_errors=True)
