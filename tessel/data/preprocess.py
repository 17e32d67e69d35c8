"""From text files to .bin/.idx, with the bytes of Megatron-LM's tools/preprocess_data.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tessel
from tessel.data.encoding import BlockEncoder, Encoded, encode_blocks
from tessel.data.indexed import IndexedDatasetWriter, optimal_dtype
from tessel.data.metadata import metadata_path, write_metadata
from tessel.data.readers import Block, check_inputs, read_blocks
from tessel.data.tokenizer import Tokenizer, load_tokenizer
from tessel.errors import TesselError, UsageError
from tessel.runtime.log import log, progress

if TYPE_CHECKING:
    from tessel.config.preprocess import PreprocessConfig

# Small enough that the last blocks keep all workers busy, large enough that a hand-over costs nothing.
_BLOCK_BYTES = 1 << 19


class Written(NamedTuple):
    """One dataset: its prefix, and what it holds."""

    prefix: str
    num_documents: int
    num_sequences: int
    num_tokens: int


def preprocess(cfg: PreprocessConfig) -> list[Written]:
    """`tessel preprocess`: write a dataset for each of --json-keys, and say what was written.

    Raises:
        UsageError, TesselError: see `preprocess_files` and `load_tokenizer`.
    """
    tokenizer = load_tokenizer(cfg.tokenizer, None, cfg.vocab_size)
    start_s = time.monotonic()
    with _terminated_as_exit():
        written = preprocess_files(
            cfg.input, cfg.output_prefix, tokenizer, cfg.json_keys, append_eod=cfg.append_eod, num_workers=cfg.workers
        )
    elapsed_s = max(time.monotonic() - start_s, 1e-9)
    dtype = optimal_dtype(tokenizer.vocab_size)
    for one in written:
        log(
            f"wrote {one.prefix}.bin and .idx: {one.num_documents:,} documents, {one.num_tokens:,} tokens "
            f"({dtype.name}, {one.num_tokens * dtype.itemsize / 1e6:,.1f} MB)"
        )
    num_documents, num_tokens = written[0].num_documents, sum(one.num_tokens for one in written)
    log(f"{elapsed_s:,.1f} s: {num_documents / elapsed_s:,.0f} documents/s, {num_tokens / elapsed_s:,.0f} tokens/s")
    return written


def preprocess_files(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    json_keys: Sequence[str],
    *,
    append_eod: bool,
    num_workers: int = 1,
) -> list[Written]:
    """Tokenize the files one after another into `{output_prefix}_{key}_document.bin/.idx`.

    A document of no tokens leaves an entry in the document index and no sequence; end of document
    is appended to the others alone. Tokens are u16 where the vocabulary is under 65,500, else i32.
    Nothing is seen under these names until all is written, and what was there is then replaced.

    Raises:
        UsageError: workers, keys or the end-of-document id cannot be.
        TesselError: an input cannot be read or holds no document (names file and line), or the output not be written.
    """
    if num_workers < 1:
        raise UsageError(f"--workers {num_workers}: at least 1 is needed.")
    files = check_inputs(inputs, json_keys)
    encoder = BlockEncoder(tokenizer.batch_encoder(), tuple(json_keys), _eod(tokenizer) if append_eod else None)
    prefixes = [f"{output_prefix}_{key}_document" for key in json_keys]
    _make_folder(Path(output_prefix).parent)
    documents_of: Counter[str] = Counter()
    dtype = optimal_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(prefix, dtype)) for prefix in prefixes]
        bar = stack.enter_context(progress("tokenizing (bytes)", sum(file.stat().st_size for file in files)))
        results = stack.enter_context(closing(encode_blocks(_all_blocks(files), encoder, num_workers)))
        counts = [Counter[str]() for _ in writers]
        for block, encoded in results:
            for writer, part, count in zip(writers, encoded, counts, strict=True):
                _write(writer, part)
                count.update(sequences=len(part.lengths), tokens=len(part.tokens))
            documents_of[block.path] += len(encoded[0].sequences_per_document)
            bar.advance(len(block.data))
        _check_documents(files, documents_of)
        for prefix in prefixes:
            metadata_path(prefix).unlink(missing_ok=True)  # it describes what is about to be replaced
    num_documents = documents_of.total()
    written = [
        Written(prefix, num_documents, count["sequences"], count["tokens"])
        for prefix, count in zip(prefixes, counts, strict=True)
    ]
    for key, one in zip(json_keys, written, strict=True):
        _note(one, key, files, tokenizer, append_eod)
    return written


def _eod(tokenizer: Tokenizer) -> int:
    if tokenizer.eod is None:
        raise UsageError(
            f"The tokenizer {tokenizer.source} has no end-of-sequence token to end documents with; "
            "give its id with --eod-id."
        )
    if not 0 <= tokenizer.eod <= tokenizer.max_id:
        raise UsageError(f"--eod-id {tokenizer.eod}: the tokenizer's ids are 0 to {tokenizer.max_id}.")
    return tokenizer.eod


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise TesselError(f"--output-prefix: the folder {folder} cannot be made or written to; choose another.")


def _all_blocks(files: Sequence[Path]) -> Iterator[Block]:
    for file in files:
        yield from read_blocks(file, _BLOCK_BYTES)


def _write(writer: IndexedDatasetWriter, part: Encoded) -> None:
    if (part.sequences_per_document == 1).all():
        writer.add_documents(part.tokens, part.lengths)
        return
    token, sequence = 0, 0
    for num_sequences in part.sequences_per_document.tolist():
        lengths = part.lengths[sequence : sequence + num_sequences].tolist()
        writer.add_document(part.tokens[token : token + sum(lengths)], lengths)
        token += sum(lengths)
        sequence += num_sequences


def _check_documents(files: Sequence[Path], documents_of: Counter[str]) -> None:
    for file in files:
        if not documents_of[str(file)]:
            raise TesselError(f"The input {file} holds no document: all its lines are empty.")


def _note(written: Written, key: str, files: Sequence[Path], tokenizer: Tokenizer, append_eod: bool) -> None:
    values = {
        "tessel": tessel.__version__,
        "tokenizer": {
            "identity": tokenizer.identity,
            "source": str(tokenizer.source.absolute()) if tokenizer.source is not None else None,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "inputs": [str(file) for file in files],
        "key": key,
        "append_eod": append_eod,
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
