"""Which samples a micro-batch holds: Megatron's `single` and `cyclic` order.

Source: Megatron-LM's data_samplers.py. A sample's place depends on the number of samples consumed
before it, never on workers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from tessel.errors import TesselError


@dataclass(frozen=True)
class SampleOrder:
    """How samples are ordered and shared out.

    `dataloader_type` is `single` (in order, once) or `cyclic` (shuffled anew each epoch, without end).
    `data_sharding` lets cyclic shuffle within each rank's share. Ranks are data-parallel.
    """

    dataloader_type: str = "single"
    data_sharding: bool = True
    num_ranks: int = 1
    rank: int = 0


def sample_ids(
    num_samples: int, consumed_samples: int, count: int, micro_batch_size: int, order: SampleOrder = SampleOrder()
) -> np.ndarray:
    """i64[count / ranks]: the samples that this rank takes of the `count` that follow `consumed_samples`.

    `num_samples` is the length of the dataset; consecutive runs of `micro_batch_size` are micro-batches.

    Raises:
        TesselError: the data ends before `count` samples (single), holds not one group of
            micro-batches (cyclic), or the counts are no multiples of micro-batch size x ranks.
    """
    group = micro_batch_size * order.num_ranks
    if count % group:
        raise TesselError(
            f"a step of {count} samples cannot be cut into micro-batches of {micro_batch_size} on {order.num_ranks} "
            "processes: --global-batch-size must be a multiple of --micro-batch-size times them."
        )
    if order.dataloader_type == "single":
        return _single(num_samples, consumed_samples, count, micro_batch_size, order)
    return _cyclic(num_samples, consumed_samples, count, micro_batch_size, order)


def _single(num_samples: int, consumed: int, count: int, micro_batch_size: int, order: SampleOrder) -> np.ndarray:
    if consumed + count > num_samples:
        raise TesselError(
            f"The data is used up: it has {num_samples:,} samples, and samples {consumed:,} to {consumed + count:,} "
            "are needed. Lower --train-iters or --train-samples, give more data, or repeat it with "
            "--dataloader-type cyclic."
        )
    ids = np.arange(consumed, consumed + count, dtype=np.int64)
    return ids.reshape(-1, order.num_ranks, micro_batch_size)[:, order.rank].reshape(-1)


def _cyclic(num_samples: int, consumed: int, count: int, micro_batch_size: int, order: SampleOrder) -> np.ndarray:
    group = micro_batch_size * order.num_ranks
    per_epoch = num_samples - num_samples % group  # over all ranks
    if not per_epoch:
        raise TesselError(
            f"The data has {num_samples} samples, fewer than one micro-batch of every process ({group}). "
            "Lower --micro-batch-size or give more data."
        )
    if consumed % per_epoch % group:
        raise TesselError(
            f"--dataloader-type cyclic cannot go on after {consumed} samples with --micro-batch-size "
            f"{micro_batch_size} on {order.num_ranks} processes: an epoch of {per_epoch} is read in groups "
            f"of {group}. Keep the micro-batch size of the run."
        )
    chunks = []
    end = consumed + count
    while consumed < end:
        epoch, offset = divmod(consumed, per_epoch)
        take = min(per_epoch - offset, end - consumed)
        ids = _epoch_order(epoch, num_samples, micro_batch_size, order)
        chunks.append(ids[offset // order.num_ranks : (offset + take) // order.num_ranks])
        consumed += take
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


@functools.lru_cache(maxsize=4)
def _epoch_order(epoch: int, num_samples: int, micro_batch_size: int, order: SampleOrder) -> np.ndarray:
    """i64: all that one rank takes of an epoch, in order. The run's seed plays no part.

    Without sharding, ranks take turns; where they don't come out even, Megatron lets the first ranks
    run ahead, and here every rank stops after the same number.
    """
    import torch

    generator = torch.Generator()
    generator.manual_seed(epoch)
    per_rank = num_samples // (micro_batch_size * order.num_ranks) * micro_batch_size
    if order.data_sharding:
        return torch.randperm(per_rank, generator=generator).numpy() + order.rank * per_rank
    total = num_samples // micro_batch_size * micro_batch_size
    return torch.randperm(total, generator=generator).numpy()[order.rank :: order.num_ranks][:per_rank]
