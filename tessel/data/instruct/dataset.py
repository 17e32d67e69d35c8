"""Instruction data for training: MindSpeed-LLM's `{prefix}_packed_*_document` files, in its order and with its cuts.

Source of the rules: MindSpeed-LLM's DecoderPackedMTFDataset.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tessel.data.cache import IndexCache
from tessel.data.check import check_token_ids
from tessel.data.indexed import IndexedDataset
from tessel.data.instruct.samples import DialogueDataset, DialogueOptions, PairSample, sample_of
from tessel.data.instruct.shorten import IGNORED, kept_by_turns, pair_shares
from tessel.data.samples import Sample
from tessel.errors import TesselError

INSTRUCTION_KEYS = ("input_ids", "attention_mask", "labels")
PAIR_KEYS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def open_fields(prefix: str, keys: Sequence[str]) -> dict[str, IndexedDataset]:
    """`{prefix}_packed_{key}_document` of each key.

    Raises:
        TesselError: a file is missing or damaged, or they differ in their lengths.
    """
    fields = {key: IndexedDataset(f"{prefix}_packed_{key}_document") for key in keys}
    for key, dataset in fields.items():
        first = fields[keys[0] if not key.startswith("rejected") else "rejected_input_ids"]
        if len(dataset) != len(fields[keys[0]]) or not np.array_equal(dataset.lengths, first.lengths):
            raise TesselError(
                f"{dataset.prefix} and {first.prefix} differ in their lengths: they do not belong together. "
                "Write the data anew."
            )
    return fields


def build_order(
    first: int, num_sequences: int, num_samples: int | None, options: DialogueOptions, shuffled_before: Sequence[int]
) -> np.ndarray:
    """i64[epochs * per epoch]: sequence numbers in training order, of whole epochs, at least `num_samples` of them.

    Sequences are [first, first + num_sequences). An epoch that is filled up takes the first sequences of all, not of
    the split. `shuffled_before` are the lengths of the orders of earlier splits: shuffling all epochs together draws
    from Python's own generator, one after another.
    """
    epoch = np.arange(first, first + num_sequences, dtype=np.int64)
    missing = -num_sequences % options.round_to
    epoch = np.concatenate((epoch, np.arange(missing, dtype=np.int64)))
    num_epochs = max(1, -(-(num_samples if num_samples is not None else 1) // len(epoch)))
    order = np.tile(epoch, num_epochs)
    if not options.in_order:
        rng = np.random.RandomState(options.seed)
        for start in range(0, len(order), len(epoch)):
            rng.shuffle(order[start : start + len(epoch)])
    if options.shuffle_all:
        generator = random.Random(options.seed)
        for length in shuffled_before:
            generator.shuffle([0] * length)
        numbers = order.tolist()
        generator.shuffle(numbers)
        order = np.array(numbers, np.int64)
    return order


class _OrderedDataset(DialogueDataset):
    """Samples [first, end) of `fields` in training order, as many as `num_samples` asks for (None: one epoch).

    Attributes: shuffle_index i64[len]: dataset index -> sequence number.
    """

    def __init__(
        self,
        fields: Mapping[str, IndexedDataset],
        bounds: tuple[int, int],
        num_samples: int | None,
        config: DialogueOptions,
        *,
        name: str = "train",
        cache: IndexCache | None = None,
        shuffled_before: Sequence[int] = (),
    ) -> None:
        first, end = bounds
        self.fields = dict(fields)
        self.files = tuple(fields.values())
        self.indexed = self.files[0]
        self.config = config
        self.name = name
        self.sequence_ids = np.arange(first, end, dtype=np.int32)
        self.tokens_per_epoch = int(self.indexed.lengths[first:end].sum(dtype=np.int64))
        if not end > first:
            raise TesselError(f"{self.indexed.prefix}: the {name} split holds no sample of {len(self.indexed)}.")

        def build() -> tuple[np.ndarray, ...]:
            return (build_order(first, end - first, num_samples, config, shuffled_before),)

        if cache is None:
            (self.shuffle_index,) = build()
        else:
            key: dict[str, Any] = {
                "class": type(self).__name__,
                "split": name,
                "bounds": [first, end],
                "num_samples": num_samples,
                "seed": config.seed,
                "in_order": config.in_order,
                "round_to": config.round_to,
                "shuffle_all": list(shuffled_before) if config.shuffle_all else None,
            }
            beside = Path(self.indexed.prefix) / "cache" / "dialogue_indices"
            (self.shuffle_index,) = cache.get(
                key, ("shuffle_index",), build, beside=beside, num_entries=max(num_samples or 0, end - first)
            )
        per_epoch = end - first + -(end - first) % config.round_to
        self.num_epochs = len(self.shuffle_index) // per_epoch

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def sequence_of(self, i: int) -> int:
        """See `DialogueDataset`."""
        return int(self.shuffle_index[i])

    def check_ids(self, vocab_size: int, most_tokens: int) -> None:
        """See `DialogueDataset`."""
        for key, dataset in self.fields.items():
            if key.endswith("input_ids") and dataset.total_tokens <= most_tokens:
                check_token_ids(dataset, vocab_size)


class InstructionDataset(_OrderedDataset):
    """Samples of INSTRUCTION_KEYS. A sample that is longer than --seq-length is cut, as `config.cut` says."""

    def __getitem__(self, i: int) -> Sample:
        """Sample i in training order; arrays of [n], see `Sample` for the dtypes."""
        config, sequence = self.config, self.sequence_of(i)
        ids, labels = (self.fields[key].get(sequence) for key in ("input_ids", "labels"))
        numbers = self.fields["attention_mask"].get(sequence) if config.segments == "stored" else None
        if len(ids) > config.seq_length and config.cut != "never":
            if config.cut == "turns" and config.segments == "none":
                kept: Any = kept_by_turns(labels, config.seq_length, config.ends_with_eos)
            else:
                kept = slice(config.seq_length)
            ids, labels = ids[kept], labels[kept]
            numbers = numbers[kept] if numbers is not None else None
        if config.segments == "eos":
            numbers = np.zeros(len(ids), np.int32)
            np.cumsum(ids[:-1] == config.eos_id, out=numbers[1:])
        return sample_of(ids, labels, numbers, config.per_sequence)


class PairDataset(_OrderedDataset):
    """Samples of PAIR_KEYS: two answers to one question, which are cut alike."""

    def __getitem__(self, i: int) -> PairSample:
        """Pair i in training order."""
        config, sequence = self.config, self.sequence_of(i)
        arrays = {key: dataset.get(sequence) for key, dataset in self.fields.items()}
        num_chosen, num_rejected = len(arrays["chosen_input_ids"]), len(arrays["rejected_input_ids"])
        room = config.seq_length if config.cut != "never" else max(num_chosen, num_rejected)
        num_prompt, kept_prompt, kept_answer = pair_shares(arrays["chosen_labels"], num_chosen, num_rejected, room)
        halves = []
        for side in ("chosen", "rejected"):
            # The rejected row begins with the chosen one's prompt.
            prompt = arrays["chosen_input_ids"][:kept_prompt]
            answer = arrays[f"{side}_input_ids"][num_prompt : num_prompt + kept_answer]
            labels = np.concatenate((np.full(len(prompt), IGNORED), answer))
            halves.append(sample_of(np.concatenate((prompt, answer)), labels))
        return PairSample(*halves)
