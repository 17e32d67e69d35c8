"""What a command line of `tessel preprocess` comes to: how rows are encoded, finished and arranged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tessel.config.preprocess import PreprocessConfig
from tessel.config.preprocess_rules import is_instructions
from tessel.data.encoding import Encoded, RowEncoder, join
from tessel.data.finishing import DropLongRows, KeepAll, MindSpeedRows
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter, optimal_dtype
from tessel.data.rewrite import copy_documents, read_documents
from tessel.data.sentences import MEGATRON_PIECE_CHARS, SentenceSplitter
from tessel.data.text_encoder import GENERAL, TextEncoder, TextRules
from tessel.data.tokenizer import Tokenizer
from tessel.errors import UsageError
from tessel.runtime.log import log

# Rows in memory of a second pass by rows.
_ROWS_AT_ONCE = 10_000

Rearrange = Callable[[Mapping[str, Path], Mapping[str, Path]], None]
"""A second pass: from the datasets written first to the final ones, prefixes by output."""


@dataclass(frozen=True)
class Task:
    """One run of preprocessing.

    Attributes:
        encoder: rows to ids.
        dtype: of the stored tokens.
        level: last part of the datasets' names: document, or sentence.
        finish: makes what is done with encoded rows before they are written.
        rearrange: a second pass over what was written; None for none.
        options: what is noted beside the datasets.
    """

    encoder: RowEncoder
    dtype: np.dtype[Any]
    level: str = "document"
    skip: bool = False
    lists: bool = False
    null_words: bool = False
    finish: Callable[[], KeepAll] = KeepAll
    rearrange: Rearrange | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def text_task(tokenizer: Tokenizer, json_keys: tuple[str, ...], append_eod: bool) -> Task:
    """Plain text of some columns, by the rules of Megatron-LM's tool.

    Raises:
        UsageError: the tokenizer has no id to end documents with.
    """
    eod = eod_of(tokenizer) if append_eod else None
    encoder = TextEncoder(tokenizer.batch_encoder(), json_keys, eod)
    options = {"append_eod": append_eod}
    return Task(encoder, optimal_dtype(tokenizer.vocab_size), options=options)


def required_columns(cfg: PreprocessConfig) -> tuple[str, ...] | None:
    """Columns that every file must have; None where rows differ."""
    is_plain = cfg.compatible != "pai-sft" and not is_instructions(cfg) and (cfg.handler_name or GENERAL) == GENERAL
    return cfg.json_keys if is_plain else None


def task_of(cfg: PreprocessConfig, tokenizer: Tokenizer) -> Task:
    """The task that the flags ask for.

    Raises:
        UsageError: no handler of that name, or the tokenizer has no id to end documents with.
    """
    common: dict[str, Any] = {
        "skip": cfg.on_error == "skip",
        "null_words": cfg.compatible == "mindspeed",
        "options": _options(cfg),
    }
    if cfg.compatible == "pai-sft":
        return _pai_sft_task(cfg, tokenizer, common)
    if is_instructions(cfg):
        return _instruction_task(cfg, tokenizer, common)
    return _text_task(cfg, tokenizer, common)


def eod_of(tokenizer: Tokenizer) -> int:
    """The id that ends a document.

    Raises:
        UsageError: there is none, or it is outside the vocabulary.
    """
    if tokenizer.eod is None:
        raise UsageError(
            f"The tokenizer {tokenizer.source} has no end-of-sequence token to end documents with; "
            "give its id with --eod-id."
        )
    if not 0 <= tokenizer.eod <= tokenizer.max_id:
        raise UsageError(f"--eod-id {tokenizer.eod}: the tokenizer's ids are 0 to {tokenizer.max_id}.")
    return tokenizer.eod


def _text_task(cfg: PreprocessConfig, tokenizer: Tokenizer, common: dict[str, Any]) -> Task:
    rules, vocab_size, adds_special_tokens = TextRules(), tokenizer.vocab_size, True
    finish: Callable[[], KeepAll] = KeepAll
    if cfg.compatible == "mindspeed":
        rules = TextRules(by_text=True, pad_id=vocab_size, multiple=cfg.pad_to_multiple_of)
        finish = KeepAll if _counts_by_subset(cfg) else partial(MindSpeedRows, cfg.seq_length)
    elif cfg.compatible == "pai":
        vocab_size, adds_special_tokens = pai_vocab_size(cfg, tokenizer), False
        rules = TextRules(vocab_size=vocab_size)
    splitter = None
    if cfg.split_sentences:
        pieces = None if cfg.compatible == "mindspeed" else MEGATRON_PIECE_CHARS
        splitter = SentenceSplitter(cfg.lang, cfg.keep_newlines and cfg.compatible != "pai", pieces)
        splitter.check()
    encoder = TextEncoder(
        tokenizer.batch_encoder(add_special_tokens=adds_special_tokens),
        cfg.json_keys,
        eod_of(tokenizer) if cfg.append_eod else None,
        rules,
        cfg.handler_name or GENERAL,
        splitter,
    )
    return Task(
        encoder,
        optimal_dtype(None if cfg.compatible == "mindspeed" else vocab_size),
        level="sentence" if cfg.split_sentences else "document",
        finish=finish,
        rearrange=_drop_by_subset(cfg) if _counts_by_subset(cfg) else _order(cfg),
        **common,
    )


def pai_vocab_size(cfg: PreprocessConfig, tokenizer: Tokenizer) -> int:
    """The vocabulary as Pai's tool counts it, by the kind of tokenizer: ids from it on are not text.

    That of Qwen's tokenizers is the one before added tokens, and --extra-vocab-size or --padded-vocab-size
    makes room for those; DeepSeek's, two less than all. Without --patch-tokenizer-type, all ids are text.
    """
    base = int(getattr(getattr(tokenizer, "hf", None), "vocab_size", tokenizer.vocab_size))
    kind, extra = cfg.patch_tokenizer_type, cfg.extra_vocab_size
    if kind in ("Qwen2Tokenizer", "Qwen3Tokenizer"):
        return cfg.padded_vocab_size or base + extra
    if kind == "DeepSeekV2Tokenizer":
        return tokenizer.vocab_size - 2 + (cfg.padded_vocab_size - base if cfg.padded_vocab_size else extra)
    return tokenizer.vocab_size if kind is None else base


def _instruction_task(cfg: PreprocessConfig, tokenizer: Tokenizer, common: dict[str, Any]) -> Task:
    from tessel.data.instruct.handlers import instruction_encoder

    encoder = instruction_encoder(cfg, tokenizer)
    if cfg.pack:
        # The second pass sees to what is too long.
        vocabulary = getattr(encoder, "vocabulary", tokenizer)
        return Task(encoder, optimal_dtype(None), rearrange=_pack(cfg, vocabulary.pad), **common)
    finish: Callable[[], KeepAll] = KeepAll
    if cfg.compatible == "mindspeed":
        finish = partial(MindSpeedRows, cfg.seq_length)
    elif cfg.seq_length is not None:
        finish = partial(DropLongRows, cfg.seq_length)
    return Task(encoder, optimal_dtype(None), finish=finish, rearrange=_order(cfg), **common)


def _pai_sft_task(cfg: PreprocessConfig, tokenizer: Tokenizer, common: dict[str, Any]) -> Task:
    from tessel.data.instruct.pai import PackRecords, pai_encoder

    encoder = pai_encoder(cfg, tokenizer)
    finish: Callable[[], KeepAll] = KeepAll
    if cfg.sequence_packing:
        finish = partial(PackRecords, encoder.seq_length, encoder.pad_id)
    return Task(encoder, optimal_dtype(None), lists=True, finish=finish, rearrange=_order(cfg), **common)


def _options(cfg: PreprocessConfig) -> dict[str, Any]:
    """What is worth noting beside a dataset, of what was asked for."""
    names = (
        "append_eod", "compatible", "seq_length", "pad_to_multiple_of", "handler_name", "prompt_type", "pack",
        "enable_thinking", "neat_pack", "sequence_packing", "train_on_prompt", "mask_history", "shard",
        "split_sentences",
    )  # fmt: skip
    values = {name: getattr(cfg, name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if name == "append_eod" or value is True or value not in (None, False, "none", 1)
    }


def _counts_by_subset(cfg: PreprocessConfig) -> bool:
    """Whether --n-subs decides which rows MindSpeed-LLM's tool leaves out: it counts them from each subset's start."""
    return cfg.n_subs > 1 and cfg.seq_length is not None and len(cfg.json_keys) > 1 and not cfg.shuffle


def _drop_by_subset(cfg: PreprocessConfig) -> Rearrange:
    """The pass that leaves long rows out, subset by subset; how long subsets are is known when all is read."""

    def rearrange(sources: Mapping[str, Path], targets: Mapping[str, Path]) -> None:
        datasets = [IndexedDataset(prefix) for prefix in sources.values()]
        num_rows = datasets[0].num_documents
        size = max(num_rows // cfg.n_subs, 1)
        with ExitStack() as stack:
            writers = [stack.enter_context(IndexedDatasetWriter(targets[name], np.int32)) for name in sources]
            for start in range(0, num_rows, size):
                order = np.arange(start, min(start + size, num_rows))
                copy_rows(datasets, order, MindSpeedRows(cfg.seq_length), writers)

    return rearrange


def copy_rows(
    datasets: Sequence[IndexedDataset], order: np.ndarray, rules: KeepAll, writers: Sequence[IndexedDatasetWriter]
) -> None:
    """Write the rows `order` [any integers] of datasets that belong together, but for those that `rules` leave out."""
    for first in range(0, len(order), _ROWS_AT_ONCE):
        rows = order[first : first + _ROWS_AT_ONCE]
        _write_parts(writers, rules.add(tuple(_rows_of(dataset, rows) for dataset in datasets)))
    _write_parts(writers, rules.end())


def _rows_of(dataset: IndexedDataset, order: np.ndarray) -> Encoded:
    pieces = [Encoded(*documents[:3]) for documents in read_documents(dataset, order)]
    return join([(piece,) for piece in pieces])[0]


def _write_parts(writers: Sequence[IndexedDatasetWriter], ready: Iterable[tuple[Encoded, ...]]) -> None:
    for parts in ready:
        for writer, part in zip(writers, parts, strict=True):
            writer.add_documents(*part)


def _order(cfg: PreprocessConfig) -> Rearrange | None:
    """The pass that puts documents into an order of their own; None where they stay in that of the input."""
    dealt = cfg.partitions > 1 and cfg.compatible in ("megatron", "pai", "pai-sft") and not cfg.keep_sequential_samples
    if not dealt and not cfg.shuffle:
        return None

    def order(num_documents: int) -> np.ndarray:
        if cfg.shuffle:
            return np.random.RandomState(cfg.seed).permutation(num_documents)
        return np.concatenate([np.arange(start, num_documents, cfg.partitions) for start in range(cfg.partitions)])

    def rearrange(sources: Mapping[str, Path], targets: Mapping[str, Path]) -> None:
        for name, prefix in sources.items():
            source = IndexedDataset(prefix)
            with IndexedDatasetWriter(targets[name], source.dtype) as writer:
                copy_documents(source, order(source.num_documents), writer)

    return rearrange


def _pack(cfg: PreprocessConfig, pad_id: int) -> Rearrange:
    """The pass that joins samples into packs."""
    from tessel.data.instruct.pack import pack_dataset

    seq_length = cfg.seq_length or 0
    mode = "neat" if cfg.neat_pack else "mindspeed" if cfg.compatible == "mindspeed" else "best"
    num_blocks = cfg.n_subs if cfg.compatible == "mindspeed" else 1

    def rearrange(sources: Mapping[str, Path], targets: Mapping[str, Path]) -> None:
        log(pack_dataset(sources, targets, seq_length, pad_id, mode, num_blocks).describe())

    return rearrange
