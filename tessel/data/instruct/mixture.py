"""Data sets of a registry to one dataset: each encoded for itself, then one after another or interleaved.

The order is that of `datasets.interleave_datasets` (Hugging Face), which MindSpeed-LLM mixes with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from tessel.config.preprocess import PreprocessConfig
from tessel.config.preprocess_rules import REGISTRY_HANDLER, probabilities_of
from tessel.data.finishing import KeepAll
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.data.instruct.detect import first_rows
from tessel.data.instruct.registry import DataSet
from tessel.data.rewrite import copy_all
from tessel.data.task import Task, copy_rows, task_of
from tessel.data.tokenizer import Tokenizer
from tessel.errors import TesselError
from tessel.runtime.files import scratch_folder
from tessel.runtime.log import log

# Draws at a time of `datasets`: others would be other numbers of the same generator.
_DRAWS_AT_ONCE = 1000
_BEGINNING = "first.jsonl"
Encode = Callable[[Task, Sequence[Path], Path], Sequence[str]]
"""Writes what a task makes of files under a prefix; gives the prefixes of its outputs."""


@dataclass(frozen=True)
class Mixture:
    """Data sets, and how they become one.

    Attributes:
        encode: writes one data set.
        task: of the whole; its encoder is that of the first.
        probabilities: of each set to be drawn; None for turns.
    """

    cfg: PreprocessConfig
    sets: Sequence[DataSet]
    tokenizer: Tokenizer
    encode: Encode
    task: Task
    probabilities: Sequence[float] | None

    def write(self, prefixes: Mapping[str, Path], before_end: Callable[[], None]) -> None:
        """Write the mixed samples; `before_end` is called before the datasets appear.

        Raises:
            TesselError: a data set cannot be read or encoded, or holds no sample.
        """
        first = next(iter(prefixes.values()))
        with scratch_folder(first.parent, f".{first.name}.") as scratch:
            parts = [self._encoded(i, scratch) for i in range(len(self.sets))]
            wholes = {output: scratch / output for output in prefixes}
            for output, whole in wholes.items():
                with IndexedDatasetWriter(whole, self.task.dtype) as writer:
                    for part in parts:
                        copy_all(IndexedDataset(part[output]), writer)
            lengths = [IndexedDataset(next(iter(part.values()))).num_documents for part in parts]
            order = mixed_order(lengths, self.cfg.mix_strategy, self.probabilities, self.cfg.seed)
            counts = ", ".join(f"{one.name} {length:,}" for one, length in zip(self.sets, lengths, strict=True))
            if len(self.sets) > 1:
                log(f"{self.cfg.mix_strategy}: {len(order):,} samples of {counts}")
            rules = self.task.finish()
            with ExitStack() as stack:
                writers = [
                    stack.enter_context(IndexedDatasetWriter(prefixes[name], self.task.dtype)) for name in wholes
                ]
                copy_rows([IndexedDataset(whole) for whole in wholes.values()], order, rules, writers)
                before_end()
        if rules.num_long:
            log(f"{rules.num_long:,} were left out, being longer than --seq-length allows")

    def _encoded(self, index: int, scratch: Path) -> dict[str, Path]:
        """The samples of one data set in the order of its rows, nothing left out for its length: prefixes by output."""
        one, folder = self.sets[index], scratch / str(index)
        task = replace(task_of(one.cfg, self.tokenizer), finish=KeepAll, rearrange=None)
        folder.mkdir()
        files = one.files if self.cfg.max_samples is None else [_beginning(one, self.cfg.max_samples, task, folder)]
        try:
            written = self.encode(task, files, folder / "set")
        except TesselError as error:
            # What was written here is gone when this is read.
            raise TesselError(str(error).replace(str(folder / _BEGINNING), f"the data set {one.name}")) from error
        return {output: Path(prefix) for output, prefix in zip(task.encoder.outputs, written, strict=True)}


def mixture_of(cfg: PreprocessConfig, sets: Sequence[DataSet], tokenizer: Tokenizer, encode: Encode) -> Mixture:
    """The mixture that --mix-strategy asks for.

    Raises:
        UsageError, TesselError: see `probabilities_of` and `task_of`.
    """
    probabilities = probabilities_of(cfg, len(sets))
    task = task_of(sets[0].cfg, tokenizer)
    asked = {
        "handler_name": REGISTRY_HANDLER,
        "data_sets": [one.name for one in sets],
        "mix_strategy": cfg.mix_strategy,
        "interleave_probs": cfg.interleave_probs,
        "max_samples": cfg.max_samples,
        "seed": cfg.seed,
    }
    options = {**task.options, **{name: value for name, value in asked.items() if value is not None}}
    return Mixture(cfg, sets, tokenizer, encode, replace(task, options=options), probabilities)


def mixed_order(lengths: Sequence[int], strategy: str, probabilities: Sequence[float] | None, seed: int) -> np.ndarray:
    """i64[N]: which samples, in order, of data sets of `lengths` laid after one another.

    concat takes all. interleave_under takes one of each in turn, or one of a drawn set, until a first is used up;
    interleave_over until all are, beginning again with those that are.
    """
    if strategy == "concat" or len(lengths) == 1:
        return np.arange(sum(lengths))
    is_over = strategy == "interleave_over"
    sizes = np.array(lengths, np.int64)
    starts = np.cumsum(sizes) - sizes
    if probabilities is None:
        num_turns = int(sizes.max() if is_over else sizes.min())
        return (np.arange(num_turns)[:, None] % sizes + starts).reshape(-1)
    draws = _draws(sizes, probabilities, seed, is_over)
    order = np.empty(len(draws), np.int64)
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        own = np.flatnonzero(draws == i)
        order[own] = np.arange(len(own)) % size + start
    return order


def _draws(sizes: np.ndarray, probabilities: Sequence[float], seed: int, is_over: bool) -> np.ndarray:
    """Which set each sample is of, up to the one with which the first or the last set is used up."""
    rng = np.random.default_rng(seed)
    blocks: list[np.ndarray] = []
    counts = np.zeros(len(sizes), np.int64)
    is_done = np.all if is_over else np.any
    while not is_done(counts >= sizes):
        blocks.append(rng.choice(len(sizes), size=_DRAWS_AT_ONCE, p=probabilities))
        counts += np.bincount(blocks[-1], minlength=len(sizes))
    draws = np.concatenate(blocks)
    ends = [int(np.flatnonzero(draws == i)[size - 1]) for i, size in enumerate(sizes) if counts[i] >= size]
    return draws[: (max(ends) if is_over else min(ends)) + 1]


def _beginning(one: DataSet, num_rows: int, task: Task, folder: Path) -> Path:
    """A file of the first rows of a data set, those columns that are read."""
    columns = task.encoder.columns
    path = folder / _BEGINNING
    with open(path, "w", encoding="utf-8") as file:
        for row in islice(first_rows(one.cfg, columns), num_rows):
            values = {name: value for name, value in row.values.items() if columns is None or name in columns}
            file.write(json.dumps(values) + "\n")
    return path
