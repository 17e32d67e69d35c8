"""Vocabularies in Megatron-LM's JSON form of tiktoken's ranks."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tessel.config.tokenizer import Tokenizer as TokenizerSection
from tessel.data.tokenizer.base import NO_PAD, BatchEncoder, check_unicode, flat
from tessel.errors import TesselError, UsageError

if TYPE_CHECKING:
    import tiktoken

TIKTOKEN = "TikTokenizer"
_NUM_IDS = 1 << 17
_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_LEGACY_SPECIAL_TOKENS = _SPECIAL_TOKENS[:3]
# Patterns are part of the format: --tiktoken-pattern names one of these.
_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": "|".join(
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}*{_LETTERS[1]}+",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}+{_LETTERS[1]}*",
            r"\p{N}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
}


class TikTokenizer:
    """Byte-level BPE by ranks: the first ids are special tokens, the rest follow in the order of the ranks.

    --vocab-size V (131,072) counts both. Special tokens spelled out in text are read as such; with
    --legacy-tokenizer, as megatron-core 0.12, they are plain text. End of document is `</s>`.
    """

    def __init__(self, path: Path, section: TokenizerSection, vocab_size: int | None = None) -> None:
        self.source: Path | None = path
        self.vocab_size = vocab_size if vocab_size is not None else _NUM_IDS
        self.max_id = self.vocab_size - 1
        specials = _special_tokens(section, self.vocab_size)
        ranks = _ranks(path, section.tiktoken_num_special_tokens, self.vocab_size)
        self._encoding = _encoding(_PATTERNS[section.tiktoken_pattern], ranks, specials)
        self.eod: int | None = section.eod_id if section.eod_id is not None else specials["</s>"]
        self.pad = section.pad_id if section.pad_id is not None else specials.get("<pad>", NO_PAD)
        others = {self.eod} | {id for token, id in specials.items() if token in _SPECIAL_TOKENS and token != "<pad>"}
        if self.pad in others and not section.allow_ambiguous_pad_tokens:
            self.pad = NO_PAD
        self._reads_special = not section.legacy_tokenizer
        settings = [self.vocab_size, section.tiktoken_pattern, self._reads_special, *specials]
        digest = hashlib.sha256(path.read_bytes() + json.dumps(settings).encode())
        self.identity = f"{TIKTOKEN}:{digest.hexdigest()[:32]}"

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        return self.batch_encoder()([text])[0]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, an id outside the vocabulary gives nothing."""
        first = len(self._encoding.special_tokens_set) if skip_special_tokens else 0
        return self._encoding.decode([int(i) for i in ids if first <= i <= self.max_id])

    def batch_encoder(self, add_special_tokens: bool = True) -> BatchEncoder:
        """See `Tokenizer`; there are no special tokens that it adds by itself."""
        return _RankEncoder(self._encoding, self._reads_special)

    def speed_up(self, sample: Sequence[str]) -> str | None:
        """tiktoken is what defines these ids."""
        return None


class _RankEncoder:
    """Ids by the tiktoken library."""

    def __init__(self, encoding: tiktoken.Encoding, reads_special: bool) -> None:
        self._encoding = encoding
        self._reads_special = reads_special

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """See `BatchEncoder`."""
        check_unicode(texts)
        if self._reads_special:
            return [self._encoding.encode(text, allowed_special="all") for text in texts]
        return [self._encoding.encode_ordinary(text) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `BatchEncoder`."""
        return flat(self(texts))

    def __getstate__(self) -> dict[str, Any]:
        # tiktoken pickles encodings by their name alone, and this one is not in its register.
        encoding = self._encoding
        return {
            "reads_special": self._reads_special,
            "encoding": (encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reads_special = state["reads_special"]
        self._encoding = _encoding(*state["encoding"])


def _encoding(pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> tiktoken.Encoding:
    try:
        import tiktoken
    except ImportError as error:
        raise UsageError(f"--tokenizer-type {TIKTOKEN} needs tiktoken: pip install 'tessel[tiktoken]'.") from error
    return tiktoken.Encoding("megatron", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def _special_tokens(section: TokenizerSection, vocab_size: int) -> dict[str, int]:
    """Their ids: those that are named come first, and numbered ones fill the rest."""
    needed = _LEGACY_SPECIAL_TOKENS if section.legacy_tokenizer else _SPECIAL_TOKENS
    named = section.tokenizer_special_tokens or needed
    num_special = section.tiktoken_num_special_tokens
    if len(set(named)) != len(named):
        raise UsageError("--tokenizer-special-tokens names one twice; each has an id of its own.")
    if missing := [token for token in needed if token not in named]:
        raise UsageError(f"--tokenizer-special-tokens lacks {' '.join(missing)}, which every {TIKTOKEN} has; add them.")
    if not len(named) <= num_special < vocab_size:
        raise UsageError(
            f"--tiktoken-num-special-tokens {num_special}: at least the {len(named)} that are named and fewer than "
            f"--vocab-size {vocab_size} are needed."
        )
    tokens = [*named, *(f"<SPECIAL_{i}>" for i in range(len(named), num_special))]
    return {token: i for i, token in enumerate(tokens)}


def _ranks(path: Path, num_special: int, vocab_size: int) -> dict[bytes, int]:
    """Id of each token, from a list of {"rank", "token_bytes" in base64, "token_str"} in the order of ranks."""
    try:
        entries = json.loads(path.read_bytes())[: vocab_size - num_special]
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): entry["rank"] for entry in entries}
    except OSError as error:
        raise TesselError(f"The tokenizer {path} cannot be read: {error.strerror}. Give its .json file.") from error
    except (ValueError, TypeError, KeyError, binascii.Error) as error:
        raise TesselError(
            f"The tokenizer {path} is no vocabulary of a {TIKTOKEN}: a JSON list of rank, token_bytes and token_str "
            "is expected. For a tokenizer.json leave --tokenizer-type out."
        ) from error
    if list(ranks.values()) != list(range(len(entries))) or list(ranks)[:256] != [bytes([i]) for i in range(256)]:
        raise TesselError(
            f"The tokenizer {path} is damaged: ranks count from 0, no token is listed twice, and the first 256 are the "
            "single bytes. Copy it again from its source."
        )
    if len(ranks) < vocab_size - num_special:
        raise TesselError(
            f"The tokenizer {path} has {len(ranks)} tokens; with --tiktoken-num-special-tokens {num_special} that is "
            f"not the {vocab_size} of the vocabulary. Give --vocab-size {len(ranks) + num_special}."
        )
    return {token: rank + num_special for token, rank in ranks.items()}
