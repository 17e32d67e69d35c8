"""What the rest of tessel knows of tokenizers, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from tessel.errors import TesselError

NO_PAD = -1


class BatchEncoder(Protocol):
    """`Tokenizer.encode` over many texts. Can be pickled and sent to another process."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """tokens i32[N], the ids of all texts one after another, and lengths i32[S], how many each text has."""


class Tokenizer(Protocol):
    """What the rest of tessel knows of a tokenizer.

    Attributes:
        eod: id that ends a document; None where the tokenizer has no end-of-sequence token.
        pad: padding id as training uses it; -1 for none.
        vocab_size: number of entries, added tokens included; decides the type of stored tokens.
        max_id: highest id it can give.
        source: folder or file it was read from; None for NullTokenizer.
        identity: class and digest of the tokenizer's files; equal identities give equal ids.
    """

    @property
    def eod(self) -> int | None: ...
    @property
    def pad(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_id(self) -> int: ...
    @property
    def source(self) -> Path | None: ...
    @property
    def identity(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the tokenizer's own special tokens."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""

    def batch_encoder(self, add_special_tokens: bool = True) -> BatchEncoder:
        """`encode` over many texts, for another process; or without the tokenizer's own special tokens."""

    def speed_up(self, sample: Sequence[str]) -> str | None:
        """From now on `batch_encoder` may give a faster encoder, proved to give the same ids on `sample` and on
        strings that are hard to get right. Returns what is used and why, to be shown; None if there is no choice.
        """


class EachText:
    """A batch encoder from a function of one text, which must be possible to pickle."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """See `BatchEncoder`."""
        return [self._encode(text) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `BatchEncoder`."""
        return flat(self(texts))


def flat(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts one after another, i32[N], and how many each text has, i32[S]."""
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum(dtype=np.int64))), lengths


def check_unicode(texts: Sequence[str]) -> None:
    """Texts that can be written as UTF-8.

    Raises:
        TesselError: one holds half of a surrogate pair, which is no character; no tokenizer takes it.
    """
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TesselError(
                f"the text holds half of a surrogate pair (\\u{ord(text[error.start]):04x} at character "
                f"{error.start}), which is no character. Mend it or leave it out."
            ) from error
