"""Which sequences of a dataset each split gets, and how many samples a run needs of each."""

from __future__ import annotations

import re

import numpy as np

from tessel.config.run import RunConfig
from tessel.errors import UsageError

SPLITS = ("train", "valid", "test")
DEFAULT_SPLIT = "969,30,1"


def split_bounds(split: str, num_sequences: int) -> list[tuple[int, int] | None]:
    """[begin, end) of the sequences of train, valid and test; None where the split gives no share.

    Megatron's arithmetic (parse_and_normalize_split, convert_split_vector_to_split_matrix): every
    run of digits and dots is a share, missing ones are 0, the bounds are cumulated float64 shares
    rounded half to even.

    Raises:
        UsageError: not one to three numbers with a positive sum.
    """
    try:
        shares = [float(text) for text in re.findall(r"[.0-9]+", split)]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= len(SPLITS) or sum(shares) <= 0:
        raise UsageError(f"--split {split}: one to three shares with a positive sum are needed, as in {DEFAULT_SPLIT}.")
    vector = np.array(shares + [0.0] * (len(SPLITS) - len(shares)), dtype=np.float64)
    edges = [0.0]
    for share in (vector / np.sum(vector)).tolist():
        edges.append(edges[-1] + share)
    return [
        None if high <= low else (int(round(low * float(num_sequences))), int(round(high * float(num_sequences))))
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]


def num_samples_for(cfg: RunConfig, train_iters: int | None) -> tuple[int | None, int | None, int | None]:
    """Samples of train, valid and test that a run of `train_iters` iterations asks for; None is one epoch.

    Megatron's get_train_valid_test_num_samples. A global batch size that was not given is the
    micro batch size; without --eval-interval there is one evaluation.
    """
    batch, evaluation = cfg.batch, cfg.evaluation
    global_batch_size = batch.global_batch_size or batch.micro_batch_size
    train = batch.train_samples or (train_iters or 0) * global_batch_size
    num_evaluations = 1
    if not batch.skip_train and evaluation.eval_interval:
        num_evaluations += (train_iters or 0) // evaluation.eval_interval
    eval_iters = evaluation.eval_iters or 0
    valid = None if evaluation.full_validation else num_evaluations * eval_iters * global_batch_size
    return train, valid, eval_iters * global_batch_size
