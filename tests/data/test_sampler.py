from __future__ import annotations

import pytest
import torch

from tessel.data.sampler import SampleOrder, sample_ids
from tessel.errors import TesselError


def megatron_order(
    total: int, consumed: int, micro_batch_size: int, ranks: int, rank: int, sharding: bool, num_batches: int
) -> list[int]:
    """Cyclic order, epoch after epoch, after Megatron-LM's MegatronPretrainingRandomSampler."""
    group = micro_batch_size * ranks
    active = total - total % group
    ids: list[int] = []
    while len(ids) < num_batches * micro_batch_size:
        generator = torch.Generator()
        generator.manual_seed(consumed // active)
        offset = consumed % active
        if sharding:
            bucket = total // group * micro_batch_size
            permuted = torch.randperm(bucket, generator=generator).tolist()
            own = [rank * bucket + x for x in permuted[offset // ranks :]]
        else:
            permuted = torch.randperm(total // micro_batch_size * micro_batch_size, generator=generator).tolist()
            own = permuted[offset:][rank::ranks]
        own = own[: len(own) // micro_batch_size * micro_batch_size]
        ids += own
        consumed += len(own) * ranks
    return ids[: num_batches * micro_batch_size]


def test_single_goes_on_in_order() -> None:
    assert sample_ids(100, 12, 8, 2).tolist() == list(range(12, 20))


def test_single_shares_groups_between_ranks() -> None:
    first = sample_ids(100, 4, 12, 2, SampleOrder(num_ranks=3, rank=0))
    last = sample_ids(100, 4, 12, 2, SampleOrder(num_ranks=3, rank=2))
    assert first.tolist() == [4, 5, 10, 11]
    assert last.tolist() == [8, 9, 14, 15]


def test_single_ends() -> None:
    assert sample_ids(20, 16, 4, 2).tolist() == [16, 17, 18, 19]
    with pytest.raises(TesselError, match="used up: it has 20 samples, and samples 16 to 24 are needed"):
        sample_ids(20, 16, 8, 2)


@pytest.mark.parametrize("sharding", [True, False])
@pytest.mark.parametrize(("total", "micro_batch_size", "ranks"), [(23, 2, 1), (40, 2, 2), (37, 3, 2)])
def test_cyclic_is_megatrons(total: int, micro_batch_size: int, ranks: int, sharding: bool) -> None:
    group = micro_batch_size * ranks
    for rank in range(ranks):
        order = SampleOrder("cyclic", sharding, ranks, rank)
        for consumed in (0, 2 * group, (total // group) * group * 3 + group):
            ours = sample_ids(total, consumed, 20 * group, micro_batch_size, order)
            assert ours.tolist() == megatron_order(total, consumed, micro_batch_size, ranks, rank, sharding, 20)


def test_cyclic_golden() -> None:
    """Numbers of torch's generator, which a change of torch must not move."""
    assert sample_ids(6, 0, 12, 1, SampleOrder("cyclic")).tolist() == [2, 5, 3, 0, 1, 4, 1, 5, 2, 0, 3, 4]
    assert sample_ids(8, 0, 8, 2, SampleOrder("cyclic", True, 2, 1)).tolist() == [4, 5, 7, 6]


def test_ranks_take_different_samples_of_an_epoch() -> None:
    for sharding in (True, False):
        taken = [sample_ids(37, 0, 36, 3, SampleOrder("cyclic", sharding, 2, rank)).tolist() for rank in range(2)]
        assert len(set(taken[0] + taken[1])) == 36


def test_steps_cut_anywhere_give_the_same_samples() -> None:
    order = SampleOrder("cyclic")
    whole = sample_ids(22, 0, 60, 2, order).tolist()
    parts = [sample_ids(22, start, 10, 2, order).tolist() for start in range(0, 60, 10)]
    assert [i for part in parts for i in part] == whole


def test_contradictions_are_errors() -> None:
    with pytest.raises(TesselError, match="--global-batch-size must be a multiple"):
        sample_ids(100, 0, 5, 2)
    with pytest.raises(TesselError, match="cannot go on after 3 samples"):
        sample_ids(100, 3, 4, 2, SampleOrder("cyclic"))
    with pytest.raises(TesselError, match="fewer than one micro-batch"):
        sample_ids(3, 0, 4, 4, SampleOrder("cyclic"))
