"""Tokenizers: text to ids and back, with the two ids that training needs to know.

Ids are those of Megatron-LM's HuggingFaceTokenizer with its defaults: `tokenizer(text).input_ids`,
the tokenizer's own special tokens included (Llama's begin-of-sequence, for one), and special
tokens spelled out in the text read as such.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tessel.config.run import Tokenizer as TokenizerSection
from tessel.errors import TesselError, UsageError
from tessel.runtime.files import require_path

if TYPE_CHECKING:
    import tokenizers

NO_PAD = -1
NULL = "NullTokenizer"
# Files that hold a vocabulary: a folder with none of them has no tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Files that decide ids, beside a vocabulary.
_OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_NAMED_SPECIALS = ("bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id")


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

    def batch_encoder(self) -> BatchEncoder:
        """`encode` over many texts, for another process."""


def load_tokenizer(
    section: TokenizerSection, default_folder: str | Path | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer that the flags name, or the one in `default_folder` (--load).

    `vocab_size` is --vocab-size, which NullTokenizer needs. Remote code is never run, and nothing
    is downloaded.

    Raises:
        UsageError: no tokenizer is named, or two are.
        TesselError: the path holds none, or a damaged one.
    """
    if section.tokenizer_type == NULL:
        if vocab_size is None:
            raise UsageError("--tokenizer-type NullTokenizer needs --vocab-size V: ids 0 to V-1, end of document V.")
        return NullTokenizer(vocab_size, section)
    path = _named_path(section) or default_folder
    if path is None:
        raise UsageError(
            "No tokenizer is named: give --tokenizer-name-or-path FOLDER (or --tokenizer-type NullTokenizer "
            "--vocab-size V for text that is already ids)."
        )
    flag = "--tokenizer-name-or-path" if _named_path(section) else "the tokenizer in --load"
    return HuggingFaceTokenizer(require_path(path, flag), section)


def _named_path(section: TokenizerSection) -> str | None:
    by_name, by_model = section.tokenizer_name_or_path, section.tokenizer_model
    if by_name and by_model and Path(by_name).resolve() != Path(by_model).resolve():
        raise UsageError(
            f"--tokenizer-name-or-path {by_name} and --tokenizer-model {by_model} name two tokenizers; give one."
        )
    return by_name or by_model


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary."""
    return any((Path(folder) / name).is_file() for name in VOCABULARY_FILES)


def check_fits(tokenizer: Tokenizer, num_rows: int) -> None:
    """Every id of the tokenizer has a row in the model's embedding.

    Raises:
        TesselError: the embedding has fewer rows.
    """
    highest = max(tokenizer.max_id, tokenizer.eod or 0)
    if highest < num_rows:
        return
    what = tokenizer.source if tokenizer.source is not None else tokenizer.identity
    raise TesselError(
        f"The tokenizer {what} gives ids up to {highest}, and the model has only {num_rows} rows (vocab_size). "
        "Name the model's own tokenizer with --tokenizer-name-or-path, or a model with at least "
        f"{highest + 1} rows (--vocab-size {highest + 1}, for a random start)."
    )


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

    def batch_encoder(self) -> BatchEncoder:
        """`encode` over many texts, for another process."""
        return _EachText(self)


class _EachText:
    """Ids of one text after another."""

    def __init__(self, tokenizer: NullTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokenizer.encode(text) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _flat(self(texts))


def _flat(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum(dtype=np.int64))), lengths


class HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder, or of a single tokenizer.json.

    Special tokens and the pipeline are taken from AutoTokenizer; encoding goes to the `tokenizers`
    library directly where it has one, and to the slow Python tokenizer otherwise.
    """

    def __init__(self, path: Path, section: TokenizerSection | None = None) -> None:
        section = section if section is not None else TokenizerSection()
        self.source: Path | None = path
        self._hf = _open(path, use_fast=not section.tokenizer_not_use_fast)
        self._backend: tokenizers.Tokenizer | None = getattr(self._hf, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = bool(getattr(self._hf, "split_special_tokens", False))
        self.vocab_size = len(self._hf)
        self.max_id = max([self.vocab_size - 1, *self._hf.added_tokens_decoder])
        self.eod = _eod_id(self._hf, section)
        self.pad = _pad_id(self._hf, self.eod, section)
        self.identity = f"{type(self._hf).__name__}:{_digest(path)}"

    @property
    def hf(self) -> Any:
        """The transformers tokenizer behind it, for chat templates and special tokens; not to be changed."""
        return self._hf

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the tokenizer's own special tokens."""
        return self.batch_encoder()([text])[0]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; an id outside the vocabulary gives nothing."""
        known = [int(i) for i in ids if 0 <= i <= self.max_id]
        text = self._hf.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    def batch_encoder(self) -> BatchEncoder:
        """`encode` over many texts, for another process; it holds no transformers object if it can."""
        return _FastEncoder(self._backend) if self._backend is not None else _SlowEncoder(self._hf)


class _FastEncoder:
    """Ids by the `tokenizers` library alone, so that a worker need not import transformers."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=True)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _flat(self(texts))

    def __getstate__(self) -> dict[str, Any]:
        # This switch is not part of a pickled tokenizer.
        return {"backend": self._backend, "encode_special_tokens": self._backend.encode_special_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._backend = state["backend"]
        self._backend.encode_special_tokens = state["encode_special_tokens"]


class _SlowEncoder:
    """Ids by a tokenizer written in Python."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self._tokenizer(text).input_ids) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _flat(self(texts))


def _open(path: Path, use_fast: bool) -> Any:
    """The transformers tokenizer of a folder or a .json file."""
    if path.is_dir() and not has_tokenizer(path):
        raise TesselError(
            f"{path} holds no tokenizer: looked for {', '.join(VOCABULARY_FILES)}. "
            "Name a folder that has one with --tokenizer-name-or-path."
        )
    if path.is_file() and path.suffix != ".json" and path.name not in VOCABULARY_FILES:
        raise TesselError(
            f"{path} is no tokenizer: a folder or a tokenizer.json is expected. Give the folder that holds it."
        )
    if path.is_file() and path.suffix == ".json":
        _check_json(path)
    elif (path / "tokenizer.json").is_file():
        _check_json(path / "tokenizer.json")
    import transformers

    # Anything but a file with its usual name has no folder of settings around it.
    alone = path.is_file() and path.name not in VOCABULARY_FILES
    folder = path.parent if path.is_file() else path
    try:
        with _quiet():
            if alone:
                return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
            return transformers.AutoTokenizer.from_pretrained(
                str(folder), use_fast=use_fast, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:
        # tokenizers raises bare Exception, and transformers nearly anything, for a file they cannot use.
        raise TesselError(
            f"The tokenizer {path} cannot be opened: {_first_line(error)}. "
            "Check its files against the original, or name another with --tokenizer-name-or-path."
        ) from error


def _check_json(path: Path) -> None:
    """A tokenizer.json is JSON and of that format: transformers' own message names no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TesselError(f"The tokenizer {path} is damaged: {error}. Copy it again from its source.") from error
    if not isinstance(content, dict) or "model" not in content:
        raise TesselError(
            f'{path} is no tokenizer.json: it has no "model". Give the folder of a Hugging Face tokenizer.'
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on config.json, which do not concern its tokenizer."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _eod_id(tokenizer: Any, section: TokenizerSection) -> int | None:
    """--eod-id, or the end-of-sequence id; Megatron takes the separator where there is none."""
    if section.eod_id is not None:
        return section.eod_id
    for name in ("eos_token_id", "sep_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return None


def _pad_id(tokenizer: Any, eod: int | None, section: TokenizerSection) -> int:
    """--pad-id, or the tokenizer's; none (-1) where real text holds that id too, being another special id.

    Rule of megatron-core's megatron_dataset.py from 0.16 on; --allow-ambiguous-pad-tokens keeps the id.
    """
    pad = section.pad_id if section.pad_id is not None else getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return NO_PAD
    others = {eod} | {getattr(tokenizer, name, None) for name in _NAMED_SPECIALS}
    return NO_PAD if pad in others and not section.allow_ambiguous_pad_tokens else int(pad)


def _digest(path: Path) -> str:
    """sha256 over the names and contents of the files that decide ids."""
    digest = hashlib.sha256()
    folder = path.parent if path.is_file() else path
    alone = path.is_file() and path.name not in VOCABULARY_FILES
    files = [path] if alone else [folder / name for name in (*VOCABULARY_FILES, *_OTHER_FILES)]
    for file in files:
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{file.name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:32]
