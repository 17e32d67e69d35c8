"""Blocks to results in this process or in several, in the order of the input."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

from tessel.data.readers import Block, Span
from tessel.errors import TesselError

_WAIT_S = 5.0
Item = TypeVar("Item", Block, Span, Block | Span)
Result = TypeVar("Result")


def encode_blocks(
    blocks: Iterable[Item], encoder: Callable[[Item], Result], num_workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """Each block and its result, in order. With one worker in this process, otherwise in `num_workers` others.

    Holds a few blocks a worker, whatever the size of the input. The others end when this process
    does, however it ends, and when the iterator is closed.

    Raises:
        TesselError: an error of `encoder`, or a worker died.
    """
    if num_workers == 1:
        for block in blocks:
            yield block, encoder(block)
        return
    # Processes made by fork alone would inherit the locks of this one's threads.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    threads = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")
    workers: list[_Worker[Result]] = []
    try:
        idle: queue.SimpleQueue[_Worker[Result]] = queue.SimpleQueue()
        for _ in range(num_workers):
            workers.append(_Worker(multiprocessing.get_context(method), encoder))
            idle.put(workers[-1])

        def encode(block: Item) -> Result:
            worker = idle.get()
            try:
                return worker.encode(block)
            finally:
                idle.put(worker)

        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for block in blocks:
            waiting.append((block, threads.submit(encode, block)))
            if len(waiting) > 2 * num_workers:
                done, result = waiting.popleft()
                yield done, result.result()
        for done, result in waiting:
            yield done, result.result()
    finally:
        # A thread waits for its worker: end those first, and close pipes when no thread uses them.
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.stop()
        threads.shutdown()
        for worker in workers:
            worker.close()


class _Worker(Generic[Result]):
    """A process that encodes one block after another; it ends when its pipe closes."""

    def __init__(self, context: BaseContext, encoder: Callable[[Any], Result]) -> None:
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(encoder, theirs), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()

    def encode(self, block: Block | Span) -> Result:
        try:
            self._connection.send(block)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_WAIT_S)
            raise TesselError(
                f"A worker process ended with exit code {self._process.exitcode} while encoding {_place(block)}. "
                "If it was killed for memory (-9), use fewer --workers."
            ) from error
        if isinstance(answer, TesselError):
            raise answer
        encoded: Result = answer
        return encoded

    def stop(self) -> None:
        self._process.terminate()
        self._process.join(_WAIT_S)

    def close(self) -> None:
        self._connection.close()


def _place(block: Block | Span) -> str:
    at = f"byte {block.start:,}" if isinstance(block, Span) else f"{block.unit} {block.first_line}"
    return f"{block.path} near {at}"


def _serve(encoder: Callable[[Any], Result], connection: Connection) -> None:
    """Main function of a worker process."""
    # Ctrl-C reaches the whole group; the parent is the one to end it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread a worker: the tokenizers library would take every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            block = connection.recv()
        except (EOFError, OSError):  # the other process has ended
            return
        try:
            answer: Result | TesselError = encoder(block)
        except TesselError as error:
            answer = TesselError(str(error))
        try:
            connection.send(answer)
        except OSError:
            return
