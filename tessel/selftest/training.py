"""Short runs of `tessel pretrain` itself: the same losses as plain kernels on the CPU, and a resume that is bitwise."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tessel.checkpoint.huggingface import export
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.config.validate import validate
from tessel.data.indexed import IndexedDatasetWriter
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.transformer import Transformer
from tessel.runtime.log import muted
from tessel.selftest.result import Check, WrongError, check
from tessel.train.pretrain import pretrain
from tessel.train.sinks import TRAIN, read_metrics

PART = "training"
STEPS, HALF = 20, 10
# Largest relative difference of a loss. bf16 rounds to 8 bits, and 20 steps carry that on.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "mixture": {
        "model_type": "qwen3_moe", "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "norm_topk_prob": True,
    },
}  # fmt: skip
_SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def run(device: torch.device) -> Iterator[Check]:
    """Every family in fp32, the dense one in bf16 too; then a run in two halves."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_data(folder / "data")
        for family, raw in FAMILIES.items():
            _write_model(folder / family, raw)
        for family, dtype in (("dense", "fp32"), ("dense", "bf16"), ("mixture", "fp32")):
            name = f"{STEPS} steps as plain kernels on the CPU, {family}, {dtype}"
            yield check(PART, name, lambda f=family, d=dtype: _parity(folder, device, f, d))  # type: ignore[misc]
        yield check(PART, "save and resume, bitwise", lambda: _resume(folder, device))


def _write_data(prefix: Path) -> None:
    """Documents that a model can learn: steps of a constant size around the vocabulary."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for start in range(200):
            writer.add_document(((start + (1 + start % 5) * np.arange(90)) % 255).astype(np.uint16))


def _write_model(folder: Path, raw: dict[str, Any]) -> None:
    config = ModelConfig.from_hf({**_SHAPE, **raw})
    model = Transformer(config)
    initialize_(model, config, 0.05, seed=1)
    export(model.named_parameters(), config, folder, torch.float32)


def _parity(folder: Path, device: torch.device, family: str, dtype: str) -> str:
    flags = [f"--{dtype}"]
    ours = _losses(folder, f"{family}-{dtype}", family, device.type, flags)
    plain = _losses(folder, f"{family}-{dtype}-plain", family, "cpu", [*flags, "--attention-backend", "unfused"])
    worst = max(abs(a - b) / b for a, b in zip(ours, plain, strict=True))
    text = f"loss {ours[0]:.4f} to {ours[-1]:.4f}, largest difference {worst:.1e}"
    if not (worst <= TOLERANCES[dtype] and ours[-1] < ours[0]):
        raise WrongError(f"{text}; {plain[-1]:.4f} on the CPU")
    return text


def _resume(folder: Path, device: torch.device) -> str:
    """A run that ends half way and goes on, against one that does not."""
    flags = ["--bf16", "--save-interval", str(HALF), "--deterministic-mode"]
    whole = _losses(folder, "whole", "dense", device.type, flags)
    _losses(folder, "halves", "dense", device.type, [*flags, "--exit-interval", str(HALF)])
    halves = _losses(folder, "halves", "dense", device.type, flags)
    if whole != halves:
        first = next(step for step, pair in enumerate(zip(whole, halves, strict=False), 1) if pair[0] != pair[1])
        raise WrongError(f"the loss of step {first} differs after resuming at {HALF}")
    weights = [(folder / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "halves")]
    if weights[0] != weights[1]:
        raise WrongError("losses are alike, and the last weights differ")
    return f"ended at {HALF}, went on to {STEPS}: losses and weights are the same bits"


def _losses(folder: Path, name: str, family: str, device: str, more: list[str]) -> list[float]:
    """The loss of every step of a run in `folder / name`, which goes on where it holds one."""
    flags = (
        f"--load {folder / family} --data-path {folder / 'data'} --save {folder / name} --split 100,0,0 "
        "--tokenizer-type NullTokenizer --vocab-size 255 --seq-length 64 --micro-batch-size 2 --global-batch-size 4 "
        f"--lr 3e-3 --lr-decay-style constant --lr-warmup-iters 2 --train-iters {STEPS} --eval-iters 0 "
        f"--log-interval 1 --data-cache-path {folder / 'cache'} --device {device}"
    ).split()
    parsed = parse(RunConfig, [*flags, *more], "tessel pretrain")
    with muted():
        pretrain(validate(parsed.value), parsed.given)
    rows = [row for row in read_metrics(folder / name / "metrics.jsonl") if row["kind"] == TRAIN]
    return [float(row["lm_loss"]) for row in rows]
