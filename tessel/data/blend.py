"""Several datasets as one: the forms of --data-path, and Megatron's BlendedDataset.

Source: megatron-core's core/datasets/blended_dataset.py, helpers.cpp and
blended_megatron_dataset_builder.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tessel.data.cache import IndexCache
from tessel.data.instruct.samples import DialogueDataset, PairSample
from tessel.data.interleave import interleave
from tessel.data.samples import GPTDataset, Sample
from tessel.errors import TesselError, UsageError

Part = GPTDataset | DialogueDataset
MAX_DATASETS = 32767  # dataset numbers are stored as i16


class Blend(NamedTuple):
    """Paths and, where given, their weights as they were written."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(items: Sequence[str], flag: str) -> Blend:
    """One path, paths, or WEIGHT PATH pairs (an even number of items, every first one a number).

    Raises:
        UsageError: some of the would-be weights are numbers and some are not, or a weight is not positive.
    """
    if len(items) % 2 == 1:
        return Blend(tuple(item.strip() for item in items), None)
    weights = [_number(item) for item in items[::2]]
    if all(weight is None for weight in weights):
        return Blend(tuple(item.strip() for item in items), None)
    for item, weight in zip(items[::2], weights, strict=True):
        if weight is None or not weight > 0 or math.isinf(weight):
            raise UsageError(
                f"{flag}: {item} stands where a positive weight is expected; give WEIGHT PATH WEIGHT PATH ..., "
                "or paths alone."
            )
    return Blend(tuple(item.strip() for item in items[1::2]), tuple(weight for weight in weights if weight is not None))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, in float64."""
    vector = np.array(weights, dtype=np.float64)
    return (vector / np.sum(vector)).tolist()


def share_sizes(weights: Sequence[float], size: int, surplus: float = 0.0) -> list[int]:
    """Samples of each dataset in a blend of `size`, weights summing to 1: ceil(ceil(size * weight) * (1 + surplus))."""
    return [math.ceil(math.ceil(size * weight) * (1 + surplus)) for weight in weights]


class BlendedDataset:
    """Samples of several datasets, interleaved so that each prefix holds them in proportion to the weights.

    `size` None: weights are the datasets' numbers of samples, and each is drawn exactly once.
    Attributes: dataset_index i16[n] and dataset_sample_index i64[n], the dataset and its sample of each sample.

    Raises:
        TesselError: a weight is 0, or a dataset is asked for more samples than it holds.
    """

    def __init__(
        self,
        datasets: Sequence[Part],
        weights: Sequence[float],
        size: int | None,
        *,
        name: str = "train",
        cache: IndexCache | None = None,
    ) -> None:
        if len(datasets) >= MAX_DATASETS:
            raise UsageError(f"--data-path: {len(datasets)} datasets; fewer than {MAX_DATASETS} can be blended.")
        for dataset, weight in zip(datasets, weights, strict=True):
            if weight <= 0:
                raise TesselError(
                    f"{dataset.indexed.prefix}: its {name} split holds not one sample of {dataset.config.seq_length} "
                    "tokens, so it cannot be blended. Leave it out, change --split or lower --seq-length."
                )
        self.datasets = list(datasets)
        self.name = name
        self.weights = list(weights) if size is None else normalize(weights)
        self.size = size

        def build() -> tuple[np.ndarray, ...]:
            if size is None:
                return exhaustive_indices([int(weight) for weight in weights])
            return blending_indices(self.weights, size)

        key: dict[str, Any] = {"class": "BlendedDataset", "split": name, "weights": self.weights, "size": size}
        arrays = build() if cache is None else cache.get(key, ("dataset_index", "dataset_sample_index"), build)
        self.dataset_index, self.dataset_sample_index = arrays
        self._check_counts()

    def _check_counts(self) -> None:
        counts = np.bincount(self.dataset_index, minlength=len(self.datasets))
        for dataset, count in zip(self.datasets, counts.tolist(), strict=True):
            if count > len(dataset):
                raise TesselError(
                    f"{dataset.indexed.prefix}: the {self.name} blend takes {count} samples, and it holds "
                    f"{len(dataset)}. Raise --mid-level-dataset-surplus two- or tenfold."
                )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, i: int) -> Sample | PairSample:
        dataset, sample = self.locate(i)
        return self.datasets[dataset][sample]

    def locate(self, i: int) -> tuple[int, int]:
        """The number of the dataset, and the sample in it, that sample i is."""
        return int(self.dataset_index[i]), int(self.dataset_sample_index[i])


def blending_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """i16[size] dataset and i64[size] its sample: at step i, the dataset furthest behind weight * max(i, 1).

    In float64, the first of equals (helpers.cpp, build_blending_indices).
    """
    return interleave(np.array(weights, np.float64), size, None)


def exhaustive_indices(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """As `blending_indices`, weights in proportion to `sizes`, until every dataset has given all its samples.

    A dataset that has given all takes no more part (helpers.cpp, build_exhaustive_blending_indices).
    """
    limits = np.array(sizes, np.float64)
    return interleave(limits / float(sum(sizes)), sum(sizes), limits)
