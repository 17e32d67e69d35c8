"""Batch sizes and the length of a run against megatron-core's calculator."""

from __future__ import annotations

from typing import Any

import pytest

from tessel.config.run import Batch
from tessel.errors import UsageError
from tessel.train.batch_size import BatchSize, batch_size_of, train_iters_for

_RAMPS = [
    (12, 2, (4, 4, 60)),  # 30 samples a step
    (32, 4, (8, 8, 100)),  # 33.3 samples a step
    (96, 1, (5, 7, 1000)),
    (16, 4, (12, 4, 7)),
    (8, 4, (4, 4, 60)),  # an update begins at the very last sample of the ramp
]


@pytest.fixture(scope="module")
def calculator() -> Any:
    """megatron-core's module of batch sizes."""
    module = pytest.importorskip("megatron.core.num_microbatches_calculator", reason="megatron-core is not installed")
    if not hasattr(module, "RampupBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("this megatron-core has no --rampup-batch-size any more")
    return module


@pytest.mark.parametrize(("global_batch_size", "multiple", "ramp"), _RAMPS)
def test_a_ramp_equals_megatrons_at_every_sample(
    calculator: Any, global_batch_size: int, multiple: int, ramp: tuple[int, int, int]
) -> None:
    reference = calculator.RampupBatchsizeNumMicroBatchesCalculator(
        global_batch_size, multiple, 1, False, 1, ramp[0], ramp[1], ramp[2]
    )
    batch_size = BatchSize(global_batch_size, multiple, ramp)
    sizes = set()
    for consumed_samples in range(ramp[2] + 50):
        reference.update(consumed_samples, consistency_check=True)
        assert batch_size.at(consumed_samples) == reference.get_current_global_batch_size()
        sizes.add(batch_size.at(consumed_samples))
    assert sizes == set(range(ramp[0], global_batch_size + 1, ramp[1]))


@pytest.mark.parametrize(("global_batch_size", "multiple", "ramp"), _RAMPS)
@pytest.mark.parametrize("train_samples", [3, 59, 60, 240, 1234])
def test_the_length_of_a_run_by_samples_is_megatrons(
    calculator: Any, global_batch_size: int, multiple: int, ramp: tuple[int, int, int], train_samples: int
) -> None:
    reference = calculator.RampupBatchsizeNumMicroBatchesCalculator(
        global_batch_size, multiple, 1, False, 1, ramp[0], ramp[1], ramp[2]
    )
    # Megatron-LM's update_train_iters, over its own calculator.
    iterations = consumed = 0
    while consumed <= ramp[2] and consumed <= train_samples:
        reference.update(consumed, consistency_check=False)
        consumed += reference.get_current_global_batch_size()
        iterations += 1
    if train_samples > consumed:
        iterations += (train_samples - consumed) // global_batch_size
    assert train_iters_for(train_samples, BatchSize(global_batch_size, multiple, ramp)) == iterations


def test_a_known_run_of_megatron() -> None:
    batch_size = batch_size_of(
        Batch(micro_batch_size=2, global_batch_size=12, rampup_batch_size=(4, 4, 60), train_samples=240)
    )
    assert train_iters_for(240, batch_size) == 26
    assert [batch_size.at(samples) for samples in (0, 4, 28, 32, 60, 64)] == [4, 4, 4, 8, 12, 12]


def test_a_constant_batch_drops_the_last_partial_one() -> None:
    batch_size = batch_size_of(Batch(micro_batch_size=2, global_batch_size=8), data_parallel_size=2)
    assert (batch_size.at(0), batch_size.at(10**9), batch_size.multiple) == (8, 8, 4)
    assert train_iters_for(39, batch_size) == 4


def test_the_global_batch_defaults_to_one_micro_batch_a_replica() -> None:
    assert batch_size_of(Batch(micro_batch_size=3), data_parallel_size=2).global_batch_size == 6


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"micro_batch_size": 3, "global_batch_size": 8}, "--global-batch-size 8 must be a positive multiple"),
        ({"micro_batch_size": 0, "global_batch_size": 8}, "--micro-batch-size 0"),
        ({"global_batch_size": 8, "rampup_batch_size": (0, 4, 60)}, "must be positive"),
        ({"global_batch_size": 8, "rampup_batch_size": (8, 4, 60)}, "START must be smaller"),
        ({"global_batch_size": 8, "rampup_batch_size": (2, 4, 60)}, "does not lead to --global-batch-size 8"),
        ({"micro_batch_size": 4, "global_batch_size": 8, "rampup_batch_size": (2, 2, 60)}, "must be multiples"),
        ({"global_batch_size": 8, "rampup_batch_size": (4, 4)}, "takes START INCREMENT SAMPLES"),
        ({"global_batch_size": 8, "rampup_batch_size": (4, 4, 60), "train_iters": 5}, "needs --train-samples"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        batch_size_of(Batch(**batch))
