"""Small dialogue data for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tessel.data.indexed import IndexedDatasetWriter
from tessel.data.instruct.shorten import IGNORED

KEYS = ("input_ids", "attention_mask", "labels")
EOS = 62
VOCAB_SIZE = 64


def prefixes(base: Path) -> dict[str, Path]:
    """The three files of instructions by their keys."""
    return {key: Path(f"{base}_packed_{key}_document") for key in KEYS}


def dialogue(rng: np.random.Generator, length: int, num_turns: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of random turns; each answer ends with EOS."""
    edges = np.sort(rng.choice(np.arange(1, length), 2 * num_turns - 1, replace=False))
    ids = rng.integers(0, EOS, length)
    labels = np.full(length, IGNORED)
    for first, end in zip(edges[::2], [*edges[1::2], length], strict=True):
        ids[end - 1] = EOS
        labels[first:end] = ids[first:end]
    return ids, labels


def write_dialogues(base: Path, lengths: Sequence[int], seed: int = 0, num_turns: int = 1) -> Path:
    """Random dialogues of these lengths; returns `base`, as --data-path takes it."""
    rng = np.random.default_rng(seed)
    rows = [dialogue(rng, length, num_turns) for length in lengths]
    for key, prefix in prefixes(base).items():
        with IndexedDatasetWriter(prefix, np.int32) as writer:
            for ids, labels in rows:
                writer.add_document({"input_ids": ids, "labels": labels}.get(key, np.ones(len(ids), np.int32)))
    return base


def write_pairs(base: Path, number: int, seed: int = 0) -> Path:
    """Random pairs of two answers to one question; returns `base`, as --data-path takes it."""
    rng = np.random.default_rng(seed)
    keys = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
    rows = []
    for _ in range(number):
        prompt = rng.integers(0, EOS, int(rng.integers(3, 9)))
        row: list[np.ndarray] = []
        for _ in range(2):
            answer = np.append(rng.integers(0, EOS, int(rng.integers(2, 12))), EOS)
            row += [np.concatenate((prompt, answer)), np.concatenate((np.full(len(prompt), IGNORED), answer))]
        rows.append(row)
    for number_of_key, key in enumerate(keys):
        with IndexedDatasetWriter(f"{base}_packed_{key}_document", np.int32) as writer:
            for row in rows:
                writer.add_document(row[number_of_key])
    return base
