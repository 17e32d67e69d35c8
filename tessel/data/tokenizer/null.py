"""Text that is ids already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tessel.config.tokenizer import Tokenizer as TokenizerSection
from tessel.data.tokenizer.base import NO_PAD, BatchEncoder, EachText
from tessel.errors import TesselError, UsageError

NULL = "NullTokenizer"


class NullTokenizer:
    """Ids written as numbers between spaces; `vocab_size` V gives ids 0 to V-1 and V as end of document.

    Megatron's NullTokenizer: the vocabulary is V + 1, and there is no padding id.
    """

    def __init__(self, vocab_size: int, section: TokenizerSection | None = None) -> None:
        section = section if section is not None else TokenizerSection()
        if vocab_size < 1:
            raise UsageError(f"--vocab-size {vocab_size}: NullTokenizer needs at least 1.")
        self.vocab_size = vocab_size + 1
        self.max_id = vocab_size
        self.eod: int | None = section.eod_id if section.eod_id is not None else vocab_size
        self.pad = section.pad_id if section.pad_id is not None else NO_PAD
        if self.pad == self.eod and not section.allow_ambiguous_pad_tokens:
            self.pad = NO_PAD
        self.source: Path | None = None
        self.identity = f"{NULL}:{vocab_size}"

    def encode(self, text: str) -> list[int]:
        """The numbers in `text`.

        Raises:
            TesselError: a word is no number, or outside the vocabulary.
        """
        ids = []
        for word in text.split():
            # int() would take "1_000", "+1" and digits of other scripts as well.
            if not (word.isascii() and word.isdigit()) or int(word) > self.max_id:
                raise TesselError(
                    f"NullTokenizer: {word[:40]!r} is not an id from 0 to {self.max_id}; the text must be ids "
                    "between spaces. Give a real tokenizer with --tokenizer-name-or-path for prose."
                )
            ids.append(int(word))
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The ids as numbers between spaces."""
        return " ".join(str(int(i)) for i in ids if not (skip_special_tokens and i == self.eod))

    def batch_encoder(self, add_special_tokens: bool = True) -> BatchEncoder:
        """`encode` over many texts, for another process; there are no special tokens of its own."""
        return EachText(self.encode)

    def speed_up(self, sample: Sequence[str]) -> str | None:
        """There is one way to read numbers."""
        return None
