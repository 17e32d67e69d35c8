from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from tessel.config.run import Data, RunConfig
from tessel.data.blend import BlendedDataset
from tessel.data.instruct.samples import PairSample
from tessel.data.loader import Loader, MicroBatch
from tessel.data.samples import GPTDataset, Sample, SampleOptions
from tessel.errors import TesselError

from .datasets import EOD, open_random, random_lengths


@pytest.fixture
def dataset(tmp_path: Path) -> GPTDataset:
    indexed = open_random(tmp_path / "data", [23] * 30)
    options = SampleOptions(8, eod_id=EOD, reset_attention_mask=True, eod_mask_loss=True)
    return GPTDataset(indexed, np.arange(30, dtype=np.int32), 80, options)


OPTIONS = (
    SampleOptions(8),
    SampleOptions(8, add_extra_token=False, pad_id=3),
    SampleOptions(8, eod_id=EOD, eod_mask_loss=True, reset_position_ids=True),
    SampleOptions(8, eod_id=EOD, reset_attention_mask=True),
    SampleOptions(8, inter_document_masking=True, pad_id=9),
)


def config(num_workers: int = 0, **data: object) -> RunConfig:
    return RunConfig(data=Data(num_workers=num_workers, **data))  # type: ignore[arg-type]


def read_run(dataset: GPTDataset, cfg: RunConfig, ahead: bool) -> list[MicroBatch]:
    """Five steps of six samples."""
    batches = []
    with Loader(dataset, cfg) as loader:
        for start in range(0, 30, 6):
            batches += loader.fetch(start, 6, 2)
            if ahead:
                loader.prefetch(start + 6, 6, 2)
    return batches


@pytest.mark.parametrize("dataloader_type", ["single", "cyclic"])
def test_order_does_not_depend_on_workers(dataset: GPTDataset, dataloader_type: str) -> None:
    expected = read_run(dataset, config(0, dataloader_type=dataloader_type), ahead=False)
    assert len(expected) == 15
    for num_workers in (1, 4):
        batches = read_run(dataset, config(num_workers, dataloader_type=dataloader_type), ahead=True)
        assert [batch.sample_ids for batch in batches] == [batch.sample_ids for batch in expected]
        for ours, theirs in zip(batches, expected, strict=True):
            assert torch.equal(ours.tokens_BS, theirs.tokens_BS)
            assert torch.equal(ours.loss_mask_BS, theirs.loss_mask_BS)


def test_a_micro_batch_is_its_samples(dataset: GPTDataset) -> None:
    with Loader(dataset, config()) as loader:
        batch = loader.fetch(4, 4, 2)[1]
        assert len(loader) == len(dataset)
    assert batch.sample_ids == (6, 7)
    types = [t.dtype for t in (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.loss_mask_BS)]
    assert types == [torch.int64] * 3 + [torch.float32]
    for row, i in enumerate((6, 7)):
        assert batch.tokens_BS[row].tolist() == dataset[i]["tokens"].tolist()
        assert batch.labels_BS[row].tolist() == dataset[i]["labels"].tolist()
        assert batch.loss_mask_BS[row].tolist() == dataset[i]["loss_mask"].tolist()
        assert batch.positions_BS[row].tolist() == dataset[i]["position_ids"].tolist()
        assert batch.segments_BS is not None
        assert batch.segments_BS[row].tolist() == list(dataset[i]["segments"])  # type: ignore[arg-type]
    moved = batch.to(torch.device("meta"))
    assert moved.tokens_BS.is_meta
    assert moved.sample_ids == (6, 7)


def test_without_masks_there_are_no_segments(tmp_path: Path) -> None:
    indexed = open_random(tmp_path / "data", [23] * 30)
    plain = GPTDataset(indexed, np.arange(30, dtype=np.int32), 8, SampleOptions(8))
    with Loader(plain, config()) as loader:
        assert loader.fetch(0, 2, 2)[0].segments_BS is None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_are_the_samples(tmp_path: Path, options: SampleOptions) -> None:
    """Written into the tensors of a batch, they are what the datasets give one by one."""
    indexed = [open_random(tmp_path / name, random_lengths(seed, 30), seed) for seed, name in enumerate("ab")]
    parts = [GPTDataset(part, np.arange(30, dtype=np.int32), 25, options, drop_last=False) for part in indexed]
    blend = BlendedDataset(parts, [2, 1], 30)
    with Loader(blend, config(2)) as loader:
        batches = loader.fetch(0, 30, 3)
    for batch in batches:
        for row, i in enumerate(batch.sample_ids):
            sample = blend[i]
            assert not isinstance(sample, PairSample)
            assert batch.tokens_BS[row].tolist() == sample["tokens"].tolist()
            assert batch.labels_BS[row].tolist() == sample["labels"].tolist()
            assert batch.loss_mask_BS[row].tolist() == sample["loss_mask"].tolist()
            assert batch.positions_BS[row].tolist() == sample["position_ids"].tolist()
            assert (batch.segments_BS is None) == (sample["segments"] is None)
            if batch.segments_BS is not None and sample["segments"] is not None:
                assert batch.segments_BS[row].tolist() == sample["segments"].tolist()


class EndlessDataset(GPTDataset):
    """A dataset of 3 * 10^9 samples that counts which of them are read."""

    def __init__(self, small: GPTDataset) -> None:
        self.__dict__.update(small.__dict__)
        self.read: list[int] = []

    def __len__(self) -> int:
        return 3 * 10**9

    def write(self, i: int, rows: Sample) -> None:
        self.read.append(i)
        super().write(i % 50, rows)


def test_going_on_far_into_the_data_reads_what_it_trains_on_and_no_more(dataset: GPTDataset) -> None:
    endless = EndlessDataset(dataset)
    tracemalloc.start()
    with Loader(endless, config(2), rank=1, num_ranks=2) as loader:
        batches = loader.fetch(10**9, 16, 4)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    ids = [*range(10**9 + 4, 10**9 + 8), *range(10**9 + 12, 10**9 + 16)]
    assert [i for batch in batches for i in batch.sample_ids] == ids
    assert sorted(endless.read) == ids
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(1, 1), (1, 6), (2, 3), (3, 2), (6, 1)])
def test_a_run_goes_on_with_the_same_samples_in_another_layout(
    dataset: GPTDataset, num_ranks: int, micro_batch_size: int
) -> None:
    """The position is a number of samples, so that the next step holds the same ones however it is dealt out."""
    ids = []
    for rank in range(num_ranks):
        with Loader(dataset, config(), rank=rank, num_ranks=num_ranks) as loader:
            ids += [i for batch in loader.fetch(18, 6, micro_batch_size) for i in batch.sample_ids]
    assert sorted(ids) == list(range(18, 24))


def test_another_request_than_the_one_read_ahead(dataset: GPTDataset) -> None:
    with Loader(dataset, config(2)) as loader:
        loader.prefetch(12, 4, 2)
        assert [batch.sample_ids for batch in loader.fetch(20, 4, 4)] == [(20, 21, 22, 23)]
        assert loader.stall_s > 0


def test_reading_ahead_past_the_end_fails_only_when_asked_for(dataset: GPTDataset) -> None:
    with Loader(dataset, config(2)) as loader:
        loader.prefetch(len(dataset), 4, 2)
        with pytest.raises(TesselError, match="used up"):
            loader.fetch(len(dataset), 4, 2)
        assert loader.fetch(0, 2, 2)[0].sample_ids == (0, 1)


def test_ranks_share_a_step(dataset: GPTDataset) -> None:
    ids = []
    for rank in range(2):
        with Loader(dataset, config(), rank=rank, num_ranks=2) as loader:
            ids.append([batch.sample_ids for batch in loader.fetch(0, 8, 2)])
    assert ids == [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]


def test_threads_end(dataset: GPTDataset) -> None:
    before = threading.active_count()
    loader = Loader(dataset, config(3))
    loader.prefetch(0, 12, 2)
    loader.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_id_past_the_vocabulary_names_its_document(tmp_path: Path, num_workers: int) -> None:
    good = open_random(tmp_path / "good", [23] * 10, vocab_size=40)
    bad = open_random(tmp_path / "bad", [23] * 10, vocab_size=50)
    parts = [GPTDataset(part, np.arange(10, dtype=np.int32), 20, SampleOptions(8)) for part in (good, bad)]
    with (
        Loader(BlendedDataset(parts, [1, 1], 20), config(num_workers), vocab_size=40) as loader,
        pytest.raises(TesselError, match=r"bad: token \d+ of document \d+ is id 4\d, .* 40 rows"),
    ):
        loader.fetch(0, 20, 2)
    with Loader(parts[0], config(num_workers), vocab_size=40) as loader:
        assert len(loader.fetch(0, 8, 2)) == 4
