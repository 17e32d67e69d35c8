"""Blocks of text to arrays of ids, in this process or in several, in the order of the input."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import NamedTuple, Protocol

import numpy as np

from tessel.data.readers import Block, Document, parse_block
from tessel.data.rows import Row
from tessel.data.tokenizer import BatchEncoder
from tessel.errors import TesselError

_WAIT_S = 5.0


class Encoded(NamedTuple):
    """One key of a block's documents.

    tokens i32[N]; lengths i32[S], tokens of each sequence; sequences_per_document i32[D], 0 for an empty document.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sequences_per_document: np.ndarray


class RowError(TesselError):
    """A row that cannot be encoded: its number, as in `Row`, and why (a sentence that names no file)."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number = number
        self.reason = reason

    def __str__(self) -> str:
        return f"row {self.number}: {self.reason}"


class RowEncoder(Protocol):
    """Rows to ids. Can be pickled, since workers are other processes.

    Attributes:
        outputs: keys of the datasets written, each `{prefix}_{key}_document`.
        columns: the columns that it reads; None for all.
    """

    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def columns(self) -> tuple[str, ...] | None: ...

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """One `Encoded` an output, all of `rows` in order; `where` names their file.

        Raises:
            RowError: a row cannot be encoded.
        """


@dataclass(frozen=True)
class BlockEncoder:
    """Encodes the values of `keys`; `eod` None appends nothing. Can be sent to another process."""

    encode_batch: BatchEncoder
    keys: tuple[str, ...]
    eod: int | None

    def __call__(self, block: Block) -> tuple[Encoded, ...]:
        """One result a key.

        Raises:
            TesselError: a line is not what it should be; names file and line.
        """
        documents = parse_block(block, self.keys)
        return tuple(self._encode_key(block.path, documents, i) for i in range(len(self.keys)))

    def _encode_key(self, path: str, documents: Sequence[Document], key: int) -> Encoded:
        """Each sentence is a sequence, and the last ends with `eod`; empty ones and empty documents have none.

        As Megatron-LM's tools/preprocess_data.py.
        """
        sentences = [_sentences(document, key) for document in documents]
        ids = iter(self._encode_all(path, documents, sentences))
        kept: list[list[int]] = []
        sequences_per_document = []
        for own in sentences:
            sequences = [sequence for _, sequence in zip(own, ids, strict=False) if sequence]
            if sequences and self.eod is not None:
                sequences[-1] = [*sequences[-1], self.eod]
            kept.extend(sequences)
            sequences_per_document.append(len(sequences))
        lengths = np.array([len(sequence) for sequence in kept], np.int32)
        tokens = np.fromiter(chain.from_iterable(kept), np.int32, int(lengths.sum(dtype=np.int64)))
        return Encoded(tokens, lengths, np.array(sequences_per_document, np.int32))

    def _encode_all(self, path: str, documents: Sequence[Document], sentences: list[list[str]]) -> list[list[int]]:
        try:
            return self.encode_batch([sentence for own in sentences for sentence in own])
        except TesselError:
            # The tokenizer does not know of lines: find the one it refuses.
            for document, own in zip(documents, sentences, strict=True):
                try:
                    self.encode_batch(own)
                except TesselError as error:
                    raise TesselError(f"{path}, line {document.line}: {error}") from error
            raise


def _sentences(document: Document, key: int) -> list[str]:
    text = document.texts[key]
    return text if isinstance(text, list) else [text]


def encode_blocks(
    blocks: Iterable[Block], encoder: BlockEncoder, num_workers: int
) -> Generator[tuple[Block, tuple[Encoded, ...]], None, None]:
    """Each block and its result, in order. With one worker in this process, otherwise in `num_workers` others.

    Holds a few blocks a worker, whatever the size of the input. The others end when this process
    does, however it ends, and when the iterator is closed.

    Raises:
        TesselError: an error of `BlockEncoder`, or a worker died.
    """
    if num_workers == 1:
        for block in blocks:
            yield block, encoder(block)
        return
    # Processes made by fork alone would inherit the locks of this one's threads.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    threads = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")
    workers: list[_Worker] = []
    try:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(num_workers):
            workers.append(_Worker(multiprocessing.get_context(method), encoder))
            idle.put(workers[-1])

        def encode(block: Block) -> tuple[Encoded, ...]:
            worker = idle.get()
            try:
                return worker.encode(block)
            finally:
                idle.put(worker)

        waiting: deque[tuple[Block, Future[tuple[Encoded, ...]]]] = deque()
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


class _Worker:
    """A process that encodes one block after another; it ends when its pipe closes."""

    def __init__(self, context: BaseContext, encoder: BlockEncoder) -> None:
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(encoder, theirs), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()

    def encode(self, block: Block) -> tuple[Encoded, ...]:
        try:
            self._connection.send(block)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_WAIT_S)
            raise TesselError(
                f"A worker process ended with exit code {self._process.exitcode} while encoding {block.path} near "
                f"line {block.first_line}. If it was killed for memory (-9), use fewer --workers."
            ) from error
        if isinstance(answer, TesselError):
            raise answer
        encoded: tuple[Encoded, ...] = answer
        return encoded

    def stop(self) -> None:
        self._process.terminate()
        self._process.join(_WAIT_S)

    def close(self) -> None:
        self._connection.close()


def _serve(encoder: BlockEncoder, connection: Connection) -> None:
    """Main function of a worker process."""
    # Ctrl-C reaches the whole group; the parent is the one to end it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread a worker: the tokenizers library would take every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            block = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[Encoded, ...] | TesselError = encoder(block)
        except TesselError as error:
            answer = TesselError(str(error))
        try:
            connection.send(answer)
        except BrokenPipeError:
            return
