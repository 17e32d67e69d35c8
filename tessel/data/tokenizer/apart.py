"""Opening and proving a tokenizer in a process of its own, which ends with all that it had to import.

transformers brings PyTorch with it, a few hundred megabytes that preprocessing of text has no use for
once the fast encoder is proved.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tessel.config.tokenizer import Tokenizer as TokenizerSection
from tessel.data.tokenizer.base import BatchEncoder, Tokenizer
from tessel.data.tokenizer.encoders import FastEncoder
from tessel.data.tokenizer.hugging_face import HuggingFaceTokenizer
from tessel.data.tokenizer.load import load_tokenizer
from tessel.errors import TesselError

_OTHER_LIBRARIES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")


class ProvedTokenizer:
    """What encoding needs of a `HuggingFaceTokenizer` whose fast encoder is proved."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, fast: FastEncoder, section: TokenizerSection) -> None:
        self.eod = tokenizer.eod
        self.pad = tokenizer.pad
        self.vocab_size = tokenizer.vocab_size
        self.max_id = tokenizer.max_id
        self.source: Path | None = tokenizer.source
        self.identity = tokenizer.identity
        self._fast = fast
        self._adds_special_tokens = not section.tokenizer_hf_no_include_special_tokens
        self._section = section

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the tokenizer's own special tokens."""
        return self._fast([text])[0]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """See `HuggingFaceTokenizer`, which is opened for it."""
        return load_tokenizer(self._section).decode(ids, skip_special_tokens)

    def batch_encoder(self, add_special_tokens: bool = True) -> BatchEncoder:
        """See `Tokenizer`."""
        return self._fast.adding(add_special_tokens and self._adds_special_tokens)

    def speed_up(self, sample: Sequence[str]) -> str | None:
        """It is the fast one already."""
        return None


def load_fast(section: TokenizerSection, vocab_size: int | None, sample: Sequence[str]) -> tuple[Tokenizer, str | None]:
    """The tokenizer that the flags name, sped up if that is proved on `sample`, and what to say of it.

    Raises:
        UsageError, TesselError: see `load_tokenizer`.
    """
    # Where transformers is imported already, nothing is saved; the other libraries are small.
    if "transformers" not in sys.modules and section.tokenizer_type not in (*_OTHER_LIBRARIES, "NullTokenizer"):
        answer = _ask_process(section, sample)
        if isinstance(answer, TesselError):
            raise answer
        if answer is not None:
            return answer
    tokenizer = load_tokenizer(section, None, vocab_size)
    return tokenizer, tokenizer.speed_up(sample)


def _ask_process(section: TokenizerSection, sample: Sequence[str]) -> tuple[Tokenizer, str] | TesselError | None:
    """What `_load` gives in another process; None if there is no fast encoder, or the process died."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process: Any = context.Process(target=_load, args=(section, list(sample), theirs), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        answer: tuple[Tokenizer, str] | TesselError | None = ours.recv()
    except EOFError:
        answer = None
    finally:
        ours.close()
        process.terminate()
        process.join()
    return answer


def _load(section: TokenizerSection, sample: Sequence[str], connection: Connection) -> None:
    """Main function of the other process."""
    answer: tuple[ProvedTokenizer, str] | TesselError | None = None
    try:
        tokenizer = load_tokenizer(section)
        said = tokenizer.speed_up(sample)
        if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.fast is not None:
            answer = ProvedTokenizer(tokenizer, tokenizer.fast, section), str(said)
    except TesselError as error:
        answer = type(error)(str(error))
    connection.send(answer)
