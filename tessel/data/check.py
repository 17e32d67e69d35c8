"""Token ids that the model has no row for: found before they index past the embedding."""

from __future__ import annotations

import numpy as np

from tessel.data.blend import BlendedDataset, Part
from tessel.data.indexed import IndexedDataset
from tessel.data.metadata import read_metadata
from tessel.data.samples import GPTDataset
from tessel.data.tokenizer import Tokenizer
from tessel.errors import TesselError
from tessel.runtime.log import warn_once

# Scanned at the start up to here; larger data is checked batch by batch.
SCAN_LIMIT_TOKENS = 20_000_000
_CHUNK_SEQUENCES = 4096


def check_dataset(dataset: Part | BlendedDataset | None, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
    """Check every file of a dataset that is small enough to be read at the start; see `check_token_ids`.

    Of larger ones, and with `tokenizer`, the run's own, what is noted beside them; see `check_metadata`.
    """
    if dataset is None:
        return
    parts = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]
    for part in parts:
        if not isinstance(part, GPTDataset):
            part.check_ids(vocab_size, SCAN_LIMIT_TOKENS)
    parts = [part for part in parts if isinstance(part, GPTDataset)]
    for indexed in {part.indexed.prefix: part.indexed for part in parts}.values():
        if indexed.dtype.kind == "f":
            raise TesselError(
                f"{indexed.prefix} holds {indexed.dtype.name} numbers, not token ids. "
                "Make the dataset with `tessel preprocess`."
            )
        if indexed.total_tokens <= SCAN_LIMIT_TOKENS:
            check_token_ids(indexed, vocab_size)
            check_metadata(indexed.prefix, None, tokenizer)
        else:
            check_metadata(indexed.prefix, vocab_size, tokenizer)


def check_metadata(prefix: str, vocab_size: int | None, tokenizer: Tokenizer | None) -> None:
    """Compare what is noted beside a dataset with the model's vocabulary and the run's tokenizer, where given.

    A tokenizer of another size, or another end of documents where documents end so, is warned of.

    Raises:
        TesselError: the tokenizer that made the data gives ids that the model has no row for.
    """
    metadata = read_metadata(prefix)
    noted = metadata.get("tokenizer") if metadata is not None else None
    if metadata is None or not isinstance(noted, dict) or not isinstance(noted.get("vocab_size"), int):
        return
    made_by = f"{prefix} was made with the tokenizer {noted.get('source') or noted.get('identity')}"
    if vocab_size is not None and noted["vocab_size"] > vocab_size:
        raise TesselError(
            f"{made_by}, which has {noted['vocab_size']} entries, and the model has {vocab_size} rows. "
            "Preprocess the data with the model's own tokenizer, or name a model with more rows."
        )
    if tokenizer is None or noted.get("identity") == tokenizer.identity:
        return
    ends = metadata.get("append_eod") and noted.get("eod") != tokenizer.eod
    if noted["vocab_size"] != tokenizer.vocab_size or ends:
        warn_once(
            f"{made_by} ({noted['vocab_size']} entries, end of document {noted.get('eod')}), and this run has "
            f"{tokenizer.source or tokenizer.identity} ({tokenizer.vocab_size} entries, end of document "
            f"{tokenizer.eod}): ids may mean other words, and documents may end elsewhere"
        )


def check_token_ids(indexed: IndexedDataset, vocab_size: int) -> None:
    """Read all tokens of a file and compare them with the vocabulary.

    Raises:
        TesselError: an id is negative, or the vocabulary size or more; names the first such sequence.
    """
    itemsize = indexed.dtype.itemsize
    if indexed.dtype.kind == "u" and np.iinfo(indexed.dtype).max < vocab_size:
        return
    for start in range(0, len(indexed), _CHUNK_SEQUENCES):
        lengths = indexed.lengths[start : start + _CHUNK_SEQUENCES].astype(np.int64)
        pointers = indexed.pointers[start : start + _CHUNK_SEQUENCES]
        contiguous = bool((pointers[1:] == pointers[:-1] + lengths[:-1] * itemsize).all())
        if contiguous and not out_of_range(indexed.span(start, int(lengths.sum())), vocab_size):
            continue
        for sequence in range(start, start + len(lengths)):
            refuse_token_ids(indexed, sequence, vocab_size)


def out_of_range(tokens: np.ndarray, vocab_size: int) -> bool:
    """Whether any id is not in [0, vocab_size)."""
    return len(tokens) > 0 and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0)


def refuse_token_ids(indexed: IndexedDataset, sequence: int, vocab_size: int) -> None:
    """Raise the error if sequence number `sequence` holds an id that the vocabulary has not.

    Raises:
        TesselError: it does.
    """
    tokens = indexed.get(sequence)
    if not out_of_range(tokens, vocab_size):
        return
    at = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
    raise TesselError(
        f"{indexed.prefix}: token {at} of document {sequence} is id {int(tokens[at])}, and the model's vocabulary has "
        f"{vocab_size} rows (ids 0 to {vocab_size - 1}): the data was made with another tokenizer. "
        "Preprocess it with the model's own."
    )
