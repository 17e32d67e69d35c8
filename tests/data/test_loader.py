from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tessel.config.run import Data, RunConfig
from tessel.data.blend import BlendedDataset
from tessel.data.loader import Loader, MicroBatch
from tessel.data.samples import GPTDataset, SampleOptions
from tessel.errors import TesselError

from .datasets import EOD, open_random


@pytest.fixture
def dataset(tmp_path: Path) -> GPTDataset:
    indexed = open_random(tmp_path / "data", [23] * 30)
    options = SampleOptions(8, eod_id=EOD, reset_attention_mask=True, eod_mask_loss=True)
    return GPTDataset(indexed, np.arange(30, dtype=np.int32), 80, options)


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
