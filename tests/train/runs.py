"""Small training runs for tests: data, flags, and ways to start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tessel.data.indexed import IndexedDatasetWriter

REPOSITORY = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 64
SHAPE = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --max-position-embeddings 64 --position-embedding-type rope --normalization RMSNorm "
    "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 1"
).split()
NULL_TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE - 1)]
TRAINING = (
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine "
    "--lr-warmup-iters 1 --split 80,10,10 --eval-interval 5 --eval-iters 1 --log-interval 1 --device cpu"
).split()


def write_data(prefix: Path, num_documents: int = 40, seed: int = 0) -> Path:
    """Documents of 5 to 60 random tokens, each ended by the NullTokenizer's end-of-document id."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(num_documents):
            tokens = rng.integers(0, VOCAB_SIZE - 1, size=rng.integers(5, 60))
            writer.add_document(np.append(tokens, VOCAB_SIZE - 1).astype(np.uint16))
    return prefix


def write_pattern(prefix: Path) -> Path:
    """Documents that count upwards: text that a model learns at once."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for start in range(40):
            writer.add_document((np.arange(start, start + 50) % (VOCAB_SIZE - 1)).astype(np.uint16))
    return prefix


def flags(data: Path, save: Path | None, train_iters: int, *more: str) -> list[str]:
    """A whole command line after `tessel`, of a random start from shape flags."""
    return ["pretrain", *SHAPE, *_rest(data, save, train_iters), *more]


def loading(load: Path, data: Path, save: Path | None, train_iters: int, *more: str) -> list[str]:
    """The same, starting from `load`."""
    return ["pretrain", "--load", str(load), *_rest(data, save, train_iters), *more]


def _rest(data: Path, save: Path | None, train_iters: int) -> list[str]:
    where = ["--save", str(save)] if save is not None else []
    return [*NULL_TOKENIZER, *TRAINING, "--data-path", str(data), "--train-iters", str(train_iters), *where]


def environment() -> dict[str, str]:
    """One thread, this checkout's package."""
    return dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1")


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """`tessel ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "tessel", *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tessel(arguments: Sequence[str], expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `tessel ARGUMENTS` to its end."""
    command = [sys.executable, "-m", "tessel", *arguments]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == expect, result.stdout[-2000:] + result.stderr[-2000:]
    return result


def metrics(save: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of one kind of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def losses(save: Path) -> list[float]:
    """The training loss of every iteration."""
    return [row["lm_loss"] for row in metrics(save)]


def weight_bytes(save: Path) -> bytes:
    """The exported weights, as they lie on disk."""
    return (save / "hf" / "model.safetensors").read_bytes()
