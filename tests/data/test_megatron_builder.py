"""Whole sets of splits against megatron-core's own builder, on random small data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tessel.config.run import Data
from tessel.config.tokenizer import Tokenizer
from tessel.data.blend import BlendedDataset, parse_blend
from tessel.data.build import build_splits, sample_options

from .datasets import EOD, random_lengths, write_random

SPLITS = ("train", "valid", "test")


def their_splits(blends: list[Any], split: str | None, sizes: tuple[int | None, ...], seed: int) -> list[Any]:
    """What BlendedMegatronDatasetBuilder builds; `blends` is one, or three with split None."""
    gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    config = gpt_dataset.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=11,
        blend=blends[0] if split is not None else None,
        blend_per_split=blends if split is None else None,
        split=split,
        tokenizer=SimpleNamespace(eod=EOD, pad=-1, vocab_size=100, unique_identifiers={}),
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    return BlendedMegatronDatasetBuilder(gpt_dataset.GPTDataset, list(sizes), lambda: True, config).build()


def assert_same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    if isinstance(ours, BlendedDataset):
        assert np.array_equal(ours.dataset_index, theirs.dataset_index)
        assert np.array_equal(ours.dataset_sample_index, theirs.dataset_sample_index)
        for mine, other in zip(ours.datasets, theirs.datasets, strict=True):
            assert mine.num_samples == other.num_samples
            assert_same(mine, other)
    else:
        assert type(theirs).__name__ == "GPTDataset"
        assert np.array_equal(ours.shuffle_index, theirs.shuffle_index)
    for i in range(0, len(ours), 7):
        sample, expected = ours[i], theirs[i]
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            assert np.array_equal(sample[key], expected[key].numpy())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(5))
def test_one_source_for_all_splits(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [
        write_random(tmp_path / f"d{i}", random_lengths(10 * seed + i, int(rng.integers(80, 160))), i) for i in range(3)
    ]
    weighted = [word for name in names for word in (f"{rng.random() + 0.1:.3f}", name)]
    forms = [[names[0]], names, ["1.0", names[1]], weighted]
    for words in forms:
        for sizes in ((90, 9, 5), (700, 20, 0), (None, None, None)):
            blend = parse_blend(words, "--data-path")
            if None in sizes and blend.weights is not None:
                continue
            split = str(rng.choice(["80,15,5", "90,10,0", "60,20,20"]))
            data = Data(data_path=tuple(words), split=split, eod_mask_loss=True, reset_position_ids=True)
            options = sample_options(data, Tokenizer(eod_id=EOD), None, 11, seed)
            theirs = their_splits([(list(blend.paths), blend.weights)], split, sizes, seed)
            for ours, other in zip(build_splits(data, options, None, sizes), theirs, strict=True):  # type: ignore[arg-type]
                assert (ours is None) == (other is None)
                if ours is not None:
                    assert_same(ours, other)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(3))
def test_a_source_for_each_split(tmp_path: Path, seed: int) -> None:
    names = [write_random(tmp_path / f"d{i}", random_lengths(10 * seed + i, 60), i) for i in range(3)]
    words = (["3", names[0], "1", names[1]], [names[2]], names[:2])
    data = Data(
        train_data_path=tuple(words[0]),
        valid_data_path=tuple(words[1]),
        test_data_path=tuple(words[2]),
        eod_mask_loss=True,
        reset_position_ids=True,
    )
    options = sample_options(data, Tokenizer(eod_id=EOD), None, 11, seed)
    blends = [parse_blend(some, "") for some in words]
    theirs = their_splits([(list(blend.paths), blend.weights) for blend in blends], None, (300, 20, 40), seed)
    for ours, other in zip(build_splits(data, options, None, (300, 20, 40)), theirs, strict=True):
        assert_same(ours, other)
