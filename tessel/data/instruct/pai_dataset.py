"""Pai-Megatron-Patch's dialogues for training: records of 2L numbers, tokens and then labels that are shifted.

Its `--dataset MMAP` reads them as plain text of 2L tokens a sample. A token that ends a dialogue is stored as
-1 - id.
"""

from __future__ import annotations

import numpy as np

from tessel.data.cache import IndexCache
from tessel.data.check import out_of_range
from tessel.data.indexed import IndexedDataset, strip_suffix
from tessel.data.instruct.samples import DialogueDataset, DialogueOptions, finished
from tessel.data.samples import GPTDataset, Sample, SampleOptions
from tessel.data.split import SPLITS, split_bounds
from tessel.errors import TesselError


def open_records(path: str, seq_length: int) -> IndexedDataset:
    """The records of `path`.

    Raises:
        TesselError: a sequence is not as long as two samples.
    """
    indexed = IndexedDataset(strip_suffix(path))
    wrong = np.flatnonzero(indexed.lengths != 2 * seq_length)
    if len(wrong) or not len(indexed):
        holds = f"{int(indexed.lengths[wrong[0]])} numbers in sequence {wrong[0]}" if len(wrong) else "no sequence"
        raise TesselError(
            f"{indexed.prefix}: --dataset MMAP reads records of 2 x --seq-length {seq_length} = {2 * seq_length} "
            f"numbers, and there are {holds}. Give the --seq-length that the data was made with; "
            "--train-mode pretrain reads plain text."
        )
    return indexed


def record_dataset(
    records: IndexedDataset, split: str | None, i: int, size: int | None, options: DialogueOptions, cache: IndexCache
) -> DialogueDataset | None:
    """Split number `i` of records; None where it is empty. `split` None: all of them."""
    bounds = (0, len(records)) if split is None else split_bounds(split, len(records))[i]
    if bounds is None or bounds[0] == bounds[1]:
        return None
    plain = SampleOptions(seq_length=2 * options.seq_length, seed=options.seed)
    # A sample draws one number more than a record has, so that the last record of all epochs is never read.
    if bounds[1] - bounds[0] < 2 and (size is None or size < 2):
        size = 2
    text = GPTDataset(records, np.arange(*bounds, dtype=np.int32), size, plain, name=SPLITS[i], cache=cache)
    return RecordDataset(text, options) if len(text) else None


class RecordDataset(DialogueDataset):
    """Samples in the order of plain text of 2L tokens a sample: each is a record."""

    def __init__(self, text: GPTDataset, config: DialogueOptions) -> None:
        self._text = text
        self.indexed = text.indexed
        self.files = (text.indexed,)
        self.config = config
        self.name = text.name
        self.sequence_ids = text.sequence_ids
        self.num_epochs = text.num_epochs
        self.tokens_per_epoch = text.tokens_per_epoch

    def __len__(self) -> int:
        return len(self._text)

    def sequence_of(self, i: int) -> int:
        """See `DialogueDataset`."""
        return self._text.pieces(i)[0].document

    def epochs_of(self, i: int) -> tuple[int, int]:
        """See `DialogueDataset`."""
        return self._text.epochs_of(i)[0], self._text.epochs_of(i)[0]

    def __getitem__(self, i: int) -> Sample:
        """Sample i in training order; arrays of [L].

        Negative tokens end a dialogue. With segments, the dialogues of a record don't see each other.
        """
        length = self.config.seq_length
        stored, labels = self._record(self.sequence_of(i))
        segments, positions = None, np.arange(length, dtype=np.int64)
        if self.config.segments != "none":
            begins = np.concatenate(([True], stored[:-1] < 0))
            segments = np.cumsum(begins, dtype=np.int32)
            positions = positions - np.maximum.accumulate(np.where(begins, positions, 0))
        tokens = np.where(stored < 0, -1 - stored, stored)
        return finished(tokens, labels, positions, segments, self.config.per_sequence)

    def _record(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens i64[L] as stored, and labels i64[L]. What follows the last dialogue is padded anew.

        The data's own padding is a token that the model may lack.
        """
        length = self.config.seq_length
        record = self.indexed.get(sequence).astype(np.int64)
        tokens, labels = record[:length], record[length:]
        ends = np.flatnonzero(tokens < 0)
        if len(ends):
            tokens[int(ends[-1]) + 1 :] = self.config.padding.pad_id
        return tokens, labels

    def check_ids(self, vocab_size: int, most_tokens: int) -> None:
        """See `DialogueDataset`."""
        if self.indexed.total_tokens > most_tokens:
            return
        for sequence in range(len(self.indexed)):
            stored, _ = self._record(sequence)
            ids = np.where(stored < 0, -1 - stored, stored)
            if out_of_range(ids, vocab_size):
                raise TesselError(
                    f"{self.indexed.prefix}: record {sequence} holds the id {int(ids.max())}, and the model's "
                    f"vocabulary has {vocab_size} rows (ids 0 to {vocab_size - 1}): the data was made with another "
                    "tokenizer. Preprocess it with the model's own."
                )
