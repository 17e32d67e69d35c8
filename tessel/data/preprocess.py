"""From files of text or dialogues to .bin/.idx, with the bytes of the suites' own tools."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tessel
from tessel.config.preprocess_rules import REGISTRY_HANDLER, is_instructions, shard_of
from tessel.data.encoding import BlockEncoder, Encoded
from tessel.data.encoding_log import encoding_log
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.data.metadata import metadata_path, write_metadata
from tessel.data.readers import check_inputs, has_spans, parse_rows, read_blocks, read_spans
from tessel.data.rows import BadRow
from tessel.data.shards import Piece, shard_blocks
from tessel.data.task import Task, required_columns, task_of, text_task
from tessel.data.tokenizer import NULL, Tokenizer, load_fast, load_tokenizer
from tessel.data.workers import encode_blocks
from tessel.errors import TesselError, UsageError
from tessel.runtime.files import scratch_folder
from tessel.runtime.log import log

if TYPE_CHECKING:
    from tessel.config.preprocess import PreprocessConfig

# Small enough that the last blocks keep all workers busy, large enough that a hand-over costs nothing.
_BLOCK_BYTES = 1 << 19
_SAMPLE_BYTES = 1 << 18


class Work(NamedTuple):
    """How it is done: processes, which part (from 0) of how many, and documents between lines of progress."""

    num_workers: int = 1
    shard: tuple[int, int] = (0, 1)
    log_interval: int | None = None


class Written(NamedTuple):
    """One dataset: its prefix, and what it holds."""

    prefix: str
    num_documents: int
    num_sequences: int
    num_tokens: int


def preprocess(cfg: PreprocessConfig) -> list[Written]:
    """`tessel preprocess`: write a dataset for each output, and say what was written.

    Raises:
        UsageError, TesselError: see `run_task`, `task_of` and `load_tokenizer`.
    """
    if is_instructions(cfg) and cfg.handler_name is None:
        from tessel.data.instruct.detect import with_handler

        cfg = with_handler(cfg)
    task, write = _job(cfg)
    start_s = time.monotonic()
    with _terminated_as_exit():
        written = write()
    elapsed_s = max(time.monotonic() - start_s, 1e-9)
    for one in written:
        num_bytes = one.num_tokens * task.dtype.itemsize
        log(
            f"wrote {one.prefix}.bin and .idx: {one.num_documents:,} documents, {one.num_tokens:,} tokens "
            f"({task.dtype.name}, {num_bytes / 1e6:,.1f} MB)"
        )
    num_documents, num_tokens = written[0].num_documents, sum(one.num_tokens for one in written)
    log(f"{elapsed_s:,.1f} s: {num_documents / elapsed_s:,.0f} documents/s, {num_tokens / elapsed_s:,.0f} tokens/s")
    return written


def _job(cfg: PreprocessConfig) -> tuple[Task, Callable[[], list[Written]]]:
    """What is to be done, and what does it."""
    work = Work(cfg.workers, shard_of(cfg), cfg.log_interval)
    if cfg.handler_name == REGISTRY_HANDLER:
        from tessel.data.instruct.mixture import mixture_of
        from tessel.data.instruct.registry import data_sets

        sets = data_sets(cfg)
        files = [file for one in sets for file in one.files]
        tokenizer = _tokenizer(cfg, files)

        def encode(task: Task, files: Sequence[Path], prefix: Path) -> list[str]:
            return [one.prefix for one in run_task(task, files, prefix, tokenizer, work)]

        mixture = mixture_of(cfg, sets, tokenizer, encode)
        return mixture.task, partial(_run, mixture.task, files, cfg.output_prefix, tokenizer, mixture.write)
    files = check_inputs(cfg.input, required_columns(cfg), cfg.compatible, may_skip=cfg.on_error == "skip")
    tokenizer = _tokenizer(cfg, files)
    task = task_of(cfg, tokenizer)
    return task, partial(run_task, task, files, cfg.output_prefix, tokenizer, work)


def preprocess_files(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    json_keys: Sequence[str],
    *,
    append_eod: bool,
    num_workers: int = 1,
) -> list[Written]:
    """Tokenize the files one after another into `{output_prefix}_{key}_document.bin/.idx`, as Megatron-LM's tool.

    A document of no tokens leaves an entry in the document index and no sequence; end of document
    is appended to the others alone. Tokens are u16 where the vocabulary is under 65,500, else i32.

    Raises:
        UsageError: workers, keys or the end-of-document id cannot be.
        TesselError: see `run_task`.
    """
    files = check_inputs(inputs, json_keys)
    _speed_up(tokenizer, files)
    task = text_task(tokenizer, tuple(json_keys), append_eod)
    return run_task(task, files, output_prefix, tokenizer, Work(num_workers))


def run_task(
    task: Task, files: Sequence[Path], output_prefix: str | Path, tokenizer: Tokenizer, work: Work
) -> list[Written]:
    """Write `{output_prefix}_{output}_{level}.bin/.idx` for each output of the task.

    Nothing is seen under these names until all is written, and what was there is then replaced.

    Raises:
        UsageError: too few workers.
        TesselError: an input cannot be read or holds no document (names file and line or row), or the output not be
            written.
    """
    if work.num_workers < 1:
        raise UsageError(f"--workers {work.num_workers}: at least 1 is needed.")
    return _run(task, files, output_prefix, tokenizer, partial(_write, task, files, work))


def _run(
    task: Task,
    files: Sequence[Path],
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    write: Callable[[Mapping[str, Path], Callable[[], None]], None],
) -> list[Written]:
    """What `write` makes of the input, rearranged as the task asks, and noted. See `run_task`."""
    outputs = task.encoder.outputs
    prefixes = {output: Path(f"{output_prefix}_{output}_{task.level}") for output in outputs}
    folder = Path(output_prefix).parent
    _make_folder(folder)
    if task.rearrange is None:
        write(prefixes, lambda: _forget_metadata(prefixes))
    else:
        with scratch_folder(folder, f".{Path(output_prefix).name}.") as scratch:
            first = {output: scratch / output for output in outputs}
            write(first, lambda: None)
            _forget_metadata(prefixes)
            task.rearrange(first, prefixes)
    written = [_written(prefix) for prefix in prefixes.values()]
    for output, one in zip(outputs, written, strict=True):
        _note(one, output, files, tokenizer, task)
    return written


def _write(
    task: Task,
    files: Sequence[Path],
    work: Work,
    prefixes: Mapping[str, Path],
    before_end: Callable[[], None],
) -> None:
    """Encode the files into datasets in the order of the input; `before_end` is called before they appear."""
    encoder = BlockEncoder(task.encoder, task.skip, task.lists)
    documents_of: Counter[str] = Counter()
    damaged: dict[Path, list[BadRow]] = {}
    finisher = task.finish()

    def read(file: Path) -> Iterator[Piece]:
        bad = damaged.setdefault(file, []) if task.skip else None
        if bad:
            bad.clear()  # noted when its blocks were counted
        if has_spans(file):
            return read_spans(file, _BLOCK_BYTES, bad)
        return read_blocks(file, _BLOCK_BYTES, task.encoder.columns, bad=bad, null_words=task.null_words)

    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(prefix, task.dtype)) for prefix in prefixes.values()]
        total_bytes = sum(file.stat().st_size for file in files) // work.shard[1]
        said = stack.enter_context(encoding_log(total_bytes, work.log_interval))
        blocks = shard_blocks(files, read, *work.shard)
        for block, result in stack.enter_context(closing(encode_blocks(blocks, encoder, work.num_workers))):
            for row in result.bad:
                said.skip(block.where(row.number), row.reason)
            for row in result.noted:
                said.note(block.where(row.number), row.reason)
            documents_of[block.path] += len(result.encoded[0].sequences_per_document)
            for parts in finisher.add(result.encoded):
                _append(writers, parts)
            said.advance(block.num_bytes, result.encoded)
        for parts in finisher.end():
            _append(writers, parts)
        for file, rows in damaged.items():
            for row in rows:
                said.skip(f"{file}, row {row.number}", row.reason)
        if work.shard[1] == 1:
            _check_documents(files, documents_of)
        said.end(finisher.num_long)
        before_end()


def _tokenizer(cfg: PreprocessConfig, files: Sequence[Path]) -> Tokenizer:
    """The tokenizer, with its fast way if it is proved. Text needs no more of it; dialogues need its template, too."""
    if is_instructions(cfg) or cfg.compatible in ("pai", "pai-sft"):
        tokenizer = load_tokenizer(cfg.tokenizer, None, cfg.vocab_size)
        _speed_up(tokenizer, files)
        return tokenizer
    vocab_size = cfg.vocab_size
    if cfg.compatible == "megatron" and vocab_size is not None and cfg.tokenizer.tokenizer_type == NULL:
        vocab_size -= 1  # Megatron-LM's tool counts the end of document in; megatron-core 0.16 did not
    tokenizer, said = load_fast(cfg.tokenizer, vocab_size, _first_texts(files))
    if said is not None:
        log(said)
    return tokenizer


def _speed_up(tokenizer: Tokenizer, files: Sequence[Path]) -> None:
    said = tokenizer.speed_up(_first_texts(files))
    if said is not None:
        log(said)


def _first_texts(files: Sequence[Path]) -> list[str]:
    """Of the first rows of the input, what is text: a sample to prove the fast way on."""
    texts: list[str] = []
    for file in files[:1]:
        # What is wrong with the file is said when it is read.
        with suppress(TesselError, StopIteration):
            rows = parse_rows(next(read_blocks(file, _SAMPLE_BYTES)), None, [], lists=True)
            texts = [value for row in rows for value in row.values.values() if isinstance(value, str)]
    return texts


def _append(writers: Sequence[IndexedDatasetWriter], parts: Sequence[Encoded]) -> None:
    for writer, part in zip(writers, parts, strict=True):
        writer.add_documents(*part)


def _written(prefix: Path) -> Written:
    dataset = IndexedDataset(prefix)
    return Written(str(prefix), dataset.num_documents, len(dataset), dataset.total_tokens)


def _forget_metadata(prefixes: Mapping[str, Path]) -> None:
    """It describes what is about to be replaced."""
    for prefix in prefixes.values():
        metadata_path(prefix).unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise TesselError(f"--output-prefix: the folder {folder} cannot be made or written to; choose another.")


def _check_documents(files: Sequence[Path], documents_of: Counter[str]) -> None:
    for file in files:
        if not documents_of[str(file)]:
            raise TesselError(f"The input {file} holds no document: all its lines are empty.")


def _note(written: Written, output: str, files: Sequence[Path], tokenizer: Tokenizer, task: Task) -> None:
    values = {
        "tessel": tessel.__version__,
        "tokenizer": {
            "identity": tokenizer.identity,
            "source": str(tokenizer.source.absolute()) if tokenizer.source is not None else None,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "inputs": [str(file) for file in files],
        "key": output,
        **task.options,
        "documents": written.num_documents,
        "sequences": written.num_sequences,
        "tokens": written.num_tokens,
    }
    write_metadata(written.prefix, values)


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that temporary files go; only the main thread can take signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
