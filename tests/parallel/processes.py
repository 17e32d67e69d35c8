"""Run a function on several Gloo processes, from a fork server that has torch loaded already."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 120.0


def run(
    world_size: int, function: Callable[..., Any], *arguments: Any, time_limit_s: float = TIME_LIMIT_S
) -> list[Any]:
    """What `function(*arguments)` returns on each of `world_size` ranks, by rank.

    `function` is defined at the top of a module; torch.distributed is initialised with Gloo on loopback when
    it is called, and ended after it. The first exception of a rank fails the test with its traceback. No
    process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.pipelining", "transformers"])
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_one_rank, args=(rank, world_size, store, pipes[rank][1], function, arguments), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            for _, sending in pipes:
                sending.close()
            return _collect([receiving for receiving, _ in pipes], processes, time_limit_s)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.join(timeout=5)
                    if process.is_alive():
                        process.kill()
                        process.join()


def _collect(pipes: list[Connection], processes: list[Any], time_limit_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline_s = time.monotonic() + time_limit_s
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(deadline_s - time.monotonic(), 0))
        assert ready, f"ranks {sorted(waiting.values())} did not end within {time_limit_s:g} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                error, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(timeout=5)
                raise AssertionError(f"rank {rank} died with status {processes[rank].exitcode}") from None
            assert error is None, f"rank {rank} of {len(pipes)} failed:\n{error}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _one_rank(
    rank: int, world_size: int, store: str, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, world_size), rank=rank, world_size=world_size,
        timeout=timedelta(seconds=TIME_LIMIT_S),
    )  # fmt: skip
    try:
        value = function(*arguments)
    except BaseException:  # noqa: BLE001 - told to the test, which fails with it
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))
        pipe.close()
        return
    # By value: a tensor that multiprocessing sends lives in this process, which may have ended when it is fetched.
    pipe.send_bytes(pickle.dumps((None, value)))
    # Gloo aborts where a rank leaves while another is still in a group.
    distributed.barrier()
    distributed.destroy_process_group()
