"""Datasets after one another in one, and the documents of one dealt out to several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tessel.config.preprocess import MergeConfig, SplitConfig
from tessel.config.preprocess_rules import shares
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter, strip_suffix
from tessel.data.metadata import metadata_path, read_metadata, write_metadata
from tessel.data.rewrite import copy_all, copy_documents
from tessel.errors import TesselError, UsageError
from tessel.runtime.log import log, warn_once

PARTS = ("train", "valid", "test")
_INSTRUCTION_MARK = "_packed_"


def merge_datasets(cfg: MergeConfig) -> list[str]:
    """`tessel merge-datasets`: write the datasets of a folder, sorted by name, or some prefixes, as one.

    With --merge-group-keys, one for each key, of those whose names hold it. Returns the prefixes written.

    Raises:
        UsageError: nothing to merge, or the output is one of the inputs.
        TesselError: a file lacks its other half, or the datasets are of different kinds.
    """
    prefixes = [prefix for given in cfg.input for prefix in _prefixes_of(given)]
    groups = {cfg.output_prefix: prefixes}
    if cfg.merge_group_keys:
        groups = {
            f"{cfg.output_prefix}_{key}": [prefix for prefix in prefixes if key in Path(prefix).name]
            for key in cfg.merge_group_keys
        }
    for output, inputs in groups.items():
        if not inputs:
            key = output.removeprefix(f"{cfg.output_prefix}_")
            what = f"holds {key!r} in its name" if cfg.merge_group_keys else "is there"
            raise UsageError(f"--input {' '.join(cfg.input)}: no dataset (.bin and .idx) {what}.")
        if any(_same(output, prefix) for prefix in inputs):
            raise UsageError(f"--output-prefix: {output} is one of the datasets to merge; write it to another folder.")
    for output, inputs in groups.items():
        merge(inputs, output, cfg.multimodal)
    return list(groups)


def merge(inputs: Sequence[str], output: str, multimodal: bool = False) -> None:
    """Write the documents of `inputs`, one dataset after the other, to `output`.

    Raises:
        TesselError: their token types differ, or some have modes and others not; or the disk is full.
    """
    sources = [IndexedDataset(prefix) for prefix in inputs]
    first = sources[0]
    for source in sources:
        if source.dtype != first.dtype:
            raise TesselError(
                f"{first.prefix} holds {first.dtype.name} and {source.prefix} {source.dtype.name}: datasets of one "
                "type alone can be merged. Preprocess one of them again with the other's tokenizer."
            )
    # A dataset of no sequence is of either kind.
    with_modes = {source.modes is not None: source.prefix for source in sources if len(source)}
    if len(with_modes) == 2:
        raise TesselError(f"{with_modes[True]} has a mode for each sequence and {with_modes[False]} has none.")
    has_modes = True in with_modes
    if multimodal and with_modes and not has_modes:
        raise TesselError(f"--multimodal: {with_modes[False]} has no modes; leave --multimodal out.")
    with IndexedDatasetWriter(output, first.dtype, multimodal=has_modes) as writer:
        for source in sources:
            copy_all(source, writer)
        metadata_path(output).unlink(missing_ok=True)
    merged = IndexedDataset(output)
    _note_merged(merged, sources)
    log(
        f"merged {len(sources)} datasets into {output}.bin and .idx: {merged.num_documents:,} documents, "
        f"{merged.total_tokens:,} tokens ({merged.dtype.name})"
    )


def split_dataset(cfg: SplitConfig) -> list[str]:
    """`tessel split`: deal the documents of a dataset out to `PREFIX_train`, `_valid`, `_test`.

    Shares are of documents, and cut as --split of a run cuts them; more parts than three, or fewer than two,
    are numbered. In the order of the data, or drawn with --seed. The datasets of instructions
    (`PREFIX_packed_*`) are cut alike, into `PREFIX_train_packed_*`. Returns the prefixes written.

    Raises:
        UsageError, TesselError: the shares are none, the dataset is not there, or a part would be empty.
    """
    fractions = shares(cfg.split)
    names = PARTS[: len(fractions)] if len(fractions) <= len(PARTS) else tuple(map(str, range(1, len(fractions) + 1)))
    prefix = strip_suffix(cfg.prefix)
    output = cfg.output_prefix or prefix
    written = []
    for ending in _endings(prefix):
        source = IndexedDataset(prefix + ending)
        order = np.arange(source.num_documents)
        if cfg.seed is not None:
            order = np.random.RandomState(cfg.seed).permutation(order)
        for name, documents in _dealt(order, fractions, names, source.prefix, cfg.split).items():
            part = f"{output}_{name}{ending}"
            with IndexedDatasetWriter(part, source.dtype, multimodal=source.modes is not None) as writer:
                copy_documents(source, documents, writer)
                metadata_path(part).unlink(missing_ok=True)
            made = IndexedDataset(part)
            _note_merged(made, [source])
            log(f"wrote {part}.bin and .idx: {made.num_documents:,} documents, {made.total_tokens:,} tokens")
            written.append(part)
    return written


def _dealt(
    order: np.ndarray, fractions: Sequence[float], names: Sequence[str], prefix: str, shown: str
) -> dict[str, np.ndarray]:
    """The documents of each part that has a share, in the order of the data, which is fast to read."""
    cuts = [round(cut * len(order)) for cut in np.cumsum([0.0, *fractions])]
    parts = {}
    for name, share, start, stop in zip(names, fractions, cuts[:-1], cuts[1:], strict=True):
        if share and start == stop:
            raise TesselError(
                f"--split {shown} leaves no document for {name}: {prefix} has {len(order)}. "
                "Give that part a larger share, or 0."
            )
        if share:
            parts[name] = np.sort(order[start:stop])
    return parts


def _prefixes_of(given: str) -> list[str]:
    """The datasets of a folder, sorted by name, or the one of that prefix."""
    path = Path(given)
    if not path.is_dir():
        return [strip_suffix(given)]
    names = {entry.name for entry in path.iterdir() if entry.is_file() and not entry.name.startswith(".")}
    found = []
    for name in sorted(names):
        prefix, ending = os.path.splitext(name)
        other = {".bin": ".idx", ".idx": ".bin"}.get(ending)
        if other is None:
            continue
        if prefix + other not in names:
            raise TesselError(
                f"{path / name} has no {other} beside it: it is not whole. Write it anew, or move it out of the folder."
            )
        if ending == ".idx":
            found.append(str(path / prefix))
    return found


def _same(one: str, other: str) -> bool:
    return os.path.realpath(f"{one}.idx") == os.path.realpath(f"{other}.idx")


def _endings(prefix: str) -> list[str]:
    """What follows `prefix` in the names of the datasets that are split alike: nothing, or those of instructions."""
    if os.path.exists(f"{prefix}.idx"):
        return [""]
    path = Path(prefix)
    start = f"{path.name}{_INSTRUCTION_MARK}"
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [name[len(path.name) : -4] for name in names if name.startswith(start) and name.endswith(".idx")] or [""]


def _note_merged(dataset: IndexedDataset, sources: Sequence[IndexedDataset]) -> None:
    """Keep what is known of the sources, where they agree on the tokenizer."""
    notes = [read_metadata(source.prefix) for source in sources if source.num_documents]
    known: list[dict[str, Any]] = [note for note in notes if note is not None]
    identities = {note.get("tokenizer", {}).get("identity") for note in known}
    if len(identities) > 1:
        warn_once(f"{dataset.prefix}: the datasets were made with different tokenizers")
    if len(identities) != 1 or len(known) != len(notes):
        return
    values = {name: value for name, value in known[0].items() if name not in ("format", "shard")}
    inputs = list(dict.fromkeys(file for note in known for file in note.get("inputs", ())))
    counts = {"documents": dataset.num_documents, "sequences": len(dataset), "tokens": dataset.total_tokens}
    write_metadata(dataset.prefix, values | {"inputs": inputs} | counts)
