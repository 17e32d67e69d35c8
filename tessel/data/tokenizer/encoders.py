"""Texts to ids by the libraries that read a tokenizer.json, and the proof that the fast one may be used.

`tokenizers` is what ids are defined by. `fastokens` reads the same files and gives the same ids many
times faster; whether it does for the tokenizer at hand is found out before it is used.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tessel.data.tokenizer.base import check_unicode, flat
from tessel.data.tokenizer.nasty import nasty_texts
from tessel.errors import TesselError

if TYPE_CHECKING:
    import fastokens
    import tokenizers

# The sample of the input that is compared: tokenizers takes about 0.1 s for so many characters.
_SAMPLE_CHARS = 200_000


class ReferenceEncoder:
    """Ids by the `tokenizers` library alone, so that a worker need not import transformers."""

    def __init__(self, backend: tokenizers.Tokenizer, add_special_tokens: bool = True) -> None:
        self.backend = backend
        self.add_special_tokens = add_special_tokens

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """See `BatchEncoder`."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=self.add_special_tokens)
        except TypeError:
            check_unicode(texts)
            raise
        return [encoding.ids for encoding in encodings]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `BatchEncoder`."""
        return flat(self(texts))

    def __getstate__(self) -> dict[str, Any]:
        # This switch is not part of a pickled tokenizer.
        return {**self.__dict__, "encode_special_tokens": self.backend.encode_special_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        encode_special_tokens = state.pop("encode_special_tokens")
        self.__dict__.update(state)
        self.backend.encode_special_tokens = encode_special_tokens


class SlowEncoder:
    """Ids by a tokenizer written in Python."""

    def __init__(self, tokenizer: Any, add_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """See `BatchEncoder`."""
        check_unicode(texts)
        return [list(self._tokenizer(text, add_special_tokens=self._add_special_tokens).input_ids) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `BatchEncoder`."""
        return flat(self(texts))


class FastEncoder:
    """Ids by the `fastokens` library, from the contents of a tokenizer.json.

    The vocabulary is read by the process that first encodes: a copy that is only passed on stays small.
    """

    def __init__(self, content: str, add_special_tokens: bool, split_special_tokens: bool) -> None:
        self.content = content
        self.add_special_tokens = add_special_tokens
        self._split_special_tokens = split_special_tokens
        self._tokenizer: fastokens.Tokenizer | None = None

    @classmethod
    def of(cls, reference: ReferenceEncoder) -> FastEncoder:
        """The fast encoder with the vocabulary and the settings of `reference`."""
        backend = reference.backend
        return cls(backend.to_str(), reference.add_special_tokens, backend.encode_special_tokens)

    def adding(self, add_special_tokens: bool) -> FastEncoder:
        """The same with or without special tokens of the tokenizer's own."""
        other = FastEncoder(self.content, add_special_tokens, self._split_special_tokens)
        other._tokenizer = self._tokenizer
        return other

    def unread(self) -> FastEncoder:
        """The same without the vocabulary in memory."""
        return FastEncoder(self.content, self.add_special_tokens, self._split_special_tokens)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """See `BatchEncoder`."""
        tokens, lengths = self.encode_flat(texts)
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        ids: list[int] = tokens.tolist()
        return [ids[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `BatchEncoder`."""
        if self._tokenizer is None:
            self._tokenizer = _read_fast(self.content)
        try:
            tokens, offsets = self._tokenizer.encode_batch_flat(
                list(texts), self.add_special_tokens, self._split_special_tokens
            )
        except UnicodeEncodeError:
            check_unicode(texts)
            raise
        lengths = np.diff(np.frombuffer(offsets, np.uint64)).astype(np.int32)
        return np.frombuffer(tokens, np.uint32).astype(np.int32), lengths

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}


def _read_fast(content: str) -> fastokens.Tokenizer:
    # A worker has one core, and each further thread would keep a cache of its own.
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
    import fastokens

    tokenizer = fastokens.Tokenizer.from_json_str(content)
    _give_back_memory()
    return tokenizer


def _give_back_memory() -> None:
    """Return freed memory to the system: reading a vocabulary leaves as much unused as it needs."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def prove_fast(reference: ReferenceEncoder, sample: Sequence[str]) -> FastEncoder | str:
    """A `FastEncoder` that may stand in for `reference`, or why there is none.

    Both encode `nasty_texts` and the first of `sample`.
    """
    try:
        import fastokens  # noqa: F401
    except ImportError:
        return "fastokens is not installed (pip install fastokens)"
    fast = FastEncoder.of(reference)
    nasty = nasty_texts(reference.backend)
    try:
        reason = _difference(reference, fast, [*nasty, *_first(sample)])
        if reason is None and reference.add_special_tokens:
            reason = _difference(ReferenceEncoder(reference.backend, False), fast.adding(False), nasty)
    except ValueError as error:
        return f"fastokens does not read this tokenizer ({str(error).splitlines()[0].rstrip('.')})"
    return reason if reason is not None else fast


def _difference(slow: ReferenceEncoder, fast: FastEncoder, texts: Sequence[str]) -> str | None:
    for text, expected, given in zip(texts, slow(texts), fast(texts), strict=True):
        if given != expected:
            return f"fastokens reads {text[:40]!r} otherwise"
    try:
        fast(["a\ud800b"])
    except TesselError:
        return None
    return "fastokens takes half of a surrogate pair for a character"


def _first(sample: Sequence[str]) -> Iterator[str]:
    left = _SAMPLE_CHARS
    for text in sample:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)
