"""What the engine builds for a Hugging Face folder, in this process, and the batches to feed it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.config.validate import validate
from tessel.data.loader import MicroBatch
from tessel.model.config import ModelConfig
from tessel.train.learner import Learner
from tessel.train.source import find_source

SEQ_LENGTH = 24


def build(folder: Path, *flags: str) -> Learner:
    """The learner of one process."""
    from tessel.mindspore_engine import engine, start

    argv = f"--load {folder} --seq-length {SEQ_LENGTH} --train-iters 1 --lr 1e-3 --data-path x --device cpu".split()
    cfg = validate(parse(RunConfig, [*argv, *flags], "tessel pretrain").value)
    start.begin(cfg)
    source = find_source(cfg.checkpoint, cfg.model)
    with contextlib.ExitStack() as stack:
        config = ModelConfig.from_folder(folder)
        return engine.build_learner(cfg, config, source, torch.device("cpu"), None, stack)


def batch(seed: int = 0, vocab_size: int = 307, segments: bool = False) -> MicroBatch:
    """Two rows of random tokens, some of them without a loss; with `segments`, of two documents each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (2, SEQ_LENGTH + 1), generator=generator)
    positions = torch.arange(SEQ_LENGTH).expand(2, -1).contiguous()
    of_document = (positions >= SEQ_LENGTH // 3).int() if segments else None
    mask = (torch.rand((2, SEQ_LENGTH), generator=generator) < 0.8).float()
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, positions, of_document)
