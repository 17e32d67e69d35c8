"""SentencePiece models (Llama 2's tokenizer.model, for one), by the sentencepiece library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tessel.config.tokenizer import Tokenizer as TokenizerSection
from tessel.data.tokenizer.base import NO_PAD, BatchEncoder, check_unicode, flat
from tessel.errors import TesselError, UsageError

if TYPE_CHECKING:
    import sentencepiece

LLAMA2 = "Llama2Tokenizer"
SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", LLAMA2)


class SentencePieceTokenizer:
    """The ids of a SentencePiece model, nothing before or after them, as Megatron-LM's three types since 0.13.

    Control tokens spelled out in text are plain text. With --legacy-tokenizer a Llama2Tokenizer begins
    each text with the model's begin-of-sequence, as megatron-core 0.12 does. End of document is the
    model's end-of-sequence.
    """

    def __init__(self, path: Path, section: TokenizerSection) -> None:
        if section.legacy_tokenizer and section.tokenizer_type == SENTENCEPIECE_TYPES[0]:
            raise UsageError(
                "--legacy-tokenizer: SentencePieceTokenizer added tokens of its own to the vocabulary in megatron-core "
                "0.12, which is not done here; use --tokenizer-type GPTSentencePieceTokenizer."
            )
        if path.is_dir():
            path = path / "tokenizer.model"
        self.source: Path | None = path
        content = _read(path)
        self._processor = _processor(content, path)
        self.vocab_size = int(self._processor.get_piece_size())
        self.max_id = self.vocab_size - 1
        eos, pad = int(self._processor.eos_id()), int(self._processor.pad_id())
        self.eod: int | None = section.eod_id if section.eod_id is not None else (eos if eos >= 0 else None)
        self.pad = section.pad_id if section.pad_id is not None else pad
        others = {self.eod, eos, self._processor.bos_id(), self._processor.unk_id()}
        if self.pad in others and not section.allow_ambiguous_pad_tokens:
            self.pad = NO_PAD
        begins = section.legacy_tokenizer and section.tokenizer_type == LLAMA2
        self._bos = int(self._processor.bos_id()) if begins else None
        digest = hashlib.sha256(content).hexdigest()[:32]
        self.identity = f"sentencepiece{'+bos' if begins else ''}:{digest}"

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        return self.batch_encoder()([text])[0]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`, in which control tokens have none; an id outside the vocabulary gives nothing."""
        return str(self._processor.decode([int(i) for i in ids if 0 <= i <= self.max_id]))

    def batch_encoder(self, add_special_tokens: bool = True) -> BatchEncoder:
        """See `Tokenizer`."""
        return _PieceEncoder(self._processor, self._bos if add_special_tokens else None)

    def speed_up(self, sample: Sequence[str]) -> str | None:
        """sentencepiece is what defines these ids."""
        return None


class _PieceEncoder:
    """Ids by the sentencepiece library."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, bos: int | None) -> None:
        self._processor = processor
        self._bos = bos

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """See `BatchEncoder`."""
        check_unicode(texts)
        ids: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return ids if self._bos is None else [[self._bos, *own] for own in ids]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `BatchEncoder`."""
        return flat(self(texts))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TesselError(
            f"The tokenizer {path} cannot be read: {error.strerror}. Give the .model file of a SentencePiece "
            "tokenizer with --tokenizer-model."
        ) from error


def _processor(content: bytes, path: Path) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UsageError(
            "This --tokenizer-type needs the sentencepiece library: pip install 'tessel[sentencepiece]'."
        ) from error
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise TesselError(
            f"The tokenizer {path} is no SentencePiece model, or is damaged. Copy it again from its source; for a "
            "tokenizer.json leave --tokenizer-type out."
        ) from error
