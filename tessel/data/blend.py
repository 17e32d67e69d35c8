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
from tessel.data.samples import GPTDataset, Sample
from tessel.errors import TesselError, UsageError

Part = GPTDataset | DialogueDataset
MAX_DATASETS = 32767  # dataset numbers are stored as i16
# Parts that are assigned side by side, and the steps that each takes before its own, to forget its guessed start.
_PART_STEPS = 2048
_MIN_WARM_STEPS = 64
_WARM_STEPS_PER_DATASET = 8
_MAX_STATE_ENTRIES = 1 << 17


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
    choices = _assign(np.array(weights, np.float64), size, None)
    return choices, _count_before(choices, len(weights))


def exhaustive_indices(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """As `blending_indices`, weights in proportion to `sizes`, until every dataset has given all its samples.

    A dataset that has given all takes no more part (helpers.cpp, build_exhaustive_blending_indices).
    """
    limits = np.array(sizes, np.float64)
    choices = _assign(limits / float(sum(sizes)), sum(sizes), limits)
    return choices, _count_before(choices, len(sizes))


def _count_before(choices: np.ndarray, num_datasets: int) -> np.ndarray:
    """i64[n]: how often choices[i] was chosen before step i."""
    order = np.argsort(choices, kind="stable")
    counts = np.bincount(choices, minlength=num_datasets)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    before = np.empty(len(choices), np.int64)
    before[order] = np.arange(len(choices)) - firsts
    return before


def _assign(weights: np.ndarray, size: int, limits: np.ndarray | None) -> np.ndarray:
    """i16[size]: the greedy choice at each step, for weights f64[D] that sum to 1; limits f64[D]: most of each.

    Choices depend on all choices before, so the steps are cut into parts that run side by side, each
    from a guessed state: the rule corrects itself, and after some steps the guess is forgotten. A
    part is kept only if it began in the very state in which the part before it ended; the others
    run again from that state. What is returned is thus what step after step would give.
    Legend: P parts, D datasets.
    """
    part_steps = min(max(_PART_STEPS, -(-size * len(weights) // _MAX_STATE_ENTRIES)), max(size, 1))
    starts_P = np.arange(0, max(size, 1), part_steps)
    warm_steps = min(part_steps, max(_MIN_WARM_STEPS, _WARM_STEPS_PER_DATASET * len(weights)))
    guesses_PD = np.stack([_guess(weights, int(step) - warm_steps, limits) for step in starts_P])
    begun_PD, _ = _run(guesses_PD, starts_P - warm_steps, warm_steps, weights, limits)
    begun_PD[0] = 0
    choices_PS = np.zeros((len(starts_P), part_steps), np.int16)
    ended_PD = np.empty_like(begun_PD)
    todo = np.arange(len(starts_P))
    while len(todo):
        ended_PD[todo], choices_PS[todo] = _run(begun_PD[todo], starts_P[todo], part_steps, weights, limits)
        todo = np.flatnonzero((begun_PD[1:] != ended_PD[:-1]).any(axis=1)) + 1
        begun_PD[todo] = ended_PD[todo - 1]
    return choices_PS.reshape(-1)[:size]


def _guess(weights: np.ndarray, step: int, limits: np.ndarray | None) -> np.ndarray:
    """f64[D]: how many of each dataset have probably been taken before `step`; they sum to it."""
    shares = weights * max(step, 0)
    taken = np.floor(shares)
    if limits is not None:
        taken = np.minimum(taken, limits)
    missing = max(0, round(max(step, 0) - float(taken.sum())))
    taken[np.argsort(taken - shares, kind="stable")[:missing]] += 1
    return taken


def _run(
    taken_PD: np.ndarray, starts_P: np.ndarray, num_steps: int, weights: np.ndarray, limits: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """`num_steps` greedy steps of every part: the counts f64[P, D] after them, and the choices i16[P, num_steps]."""
    taken_PD = taken_PD.copy()
    flat = taken_PD.reshape(-1)
    rows_P = np.arange(len(starts_P)) * len(weights)
    errors_PD = np.empty_like(taken_PD)
    choices_SP = np.empty((num_steps, len(starts_P)), np.int16)
    for step in range(num_steps):
        np.multiply(weights, np.maximum(starts_P + step, 1.0)[:, None], out=errors_PD)
        errors_PD -= taken_PD
        if limits is not None:
            errors_PD[taken_PD >= limits] = -np.inf
        choice_P = errors_PD.argmax(axis=1)
        flat[rows_P + choice_P] += 1
        choices_SP[step] = choice_P
    return taken_PD, choices_SP.T
