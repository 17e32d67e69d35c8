"""Global batch size and length of a run, as functions of the samples consumed.

The rules are Megatron-LM's (num_microbatches_calculator, update_train_iters).
"""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.run import Batch
from tessel.errors import UsageError


@dataclass(frozen=True)
class BatchSize:
    """The global batch size (sequences per update): constant, or grown by --rampup-batch-size.

    With a ramp of START INCREMENT SAMPLES, the first SAMPLES samples are divided evenly between the
    steps from START to `global_batch_size` (exclusive), by INCREMENT each. `multiple` is the micro-batch
    size times the data-parallel size, which every size on the way must be a multiple of.

    Raises:
        UsageError: sizes that are not positive, not divisible, or do not meet.
    """

    global_batch_size: int
    multiple: int = 1
    ramp: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.multiple <= 0:
            raise UsageError(f"--micro-batch-size {self.multiple} must be positive.")
        if self.global_batch_size <= 0 or self.global_batch_size % self.multiple:
            raise UsageError(
                f"--global-batch-size {self.global_batch_size} must be a positive multiple of the micro-batch size "
                f"times the number of data-parallel replicas, {self.multiple}."
            )
        if self.ramp is not None:
            self._check_ramp(*self.ramp)

    def _check_ramp(self, start: int, increment: int, samples: int) -> None:
        given = f"--rampup-batch-size {start} {increment} {samples}"
        if start <= 0 or increment <= 0 or samples <= 0:
            raise UsageError(f"{given}: START, INCREMENT and SAMPLES must be positive.")
        growth = self.global_batch_size - start
        if growth <= 0 or growth % increment:
            raise UsageError(
                f"{given} does not lead to --global-batch-size {self.global_batch_size}: START must be smaller, by a "
                "multiple of INCREMENT."
            )
        if start % self.multiple or increment % self.multiple:
            raise UsageError(
                f"{given}: START and INCREMENT must be multiples of the micro-batch size times the number of "
                f"data-parallel replicas, {self.multiple}."
            )

    def at(self, consumed_samples: int) -> int:
        """Sequences in the update that follows `consumed_samples`."""
        if self.ramp is None or consumed_samples > self.ramp[2]:
            return self.global_batch_size
        start, increment, samples = self.ramp
        num_increments = (self.global_batch_size - start) // increment
        # Megatron divides by a float; so must this, to step up at the same sample.
        return start + int(consumed_samples / (samples / num_increments)) * increment


def batch_size_of(batch: Batch, data_parallel_size: int = 1) -> BatchSize:
    """The batch sizes of a run; --global-batch-size defaults to one micro-batch on each replica.

    Raises:
        UsageError: see `BatchSize`; or a ramp in a run whose length is given in iterations.
    """
    multiple = batch.micro_batch_size * data_parallel_size
    ramp = batch.rampup_batch_size
    if ramp is None:
        return BatchSize(batch.global_batch_size or multiple, multiple)
    if batch.train_iters:
        raise UsageError(
            "--rampup-batch-size needs --train-samples instead of --train-iters: iterations are of different sizes."
        )
    if len(ramp) != 3:
        raise UsageError(f"--rampup-batch-size takes START INCREMENT SAMPLES, and {len(ramp)} values are given.")
    return BatchSize(batch.global_batch_size or multiple, multiple, (ramp[0], ramp[1], ramp[2]))


def train_iters_for(train_samples: int, batch_size: BatchSize) -> int:
    """Updates in `train_samples` samples; a last batch that is not full is dropped."""
    if batch_size.ramp is None:
        return train_samples // batch_size.global_batch_size
    num_iters = 0
    consumed_samples = 0
    # As in Megatron, the ramp's last update may reach beyond train_samples.
    while consumed_samples <= batch_size.ramp[2] and consumed_samples <= train_samples:
        consumed_samples += batch_size.at(consumed_samples)
        num_iters += 1
    return num_iters + max(0, train_samples - consumed_samples) // batch_size.global_batch_size
