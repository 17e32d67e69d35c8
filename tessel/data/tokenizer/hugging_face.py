"""The tokenizer of a Hugging Face folder.

Ids are those of Megatron-LM's HuggingFaceTokenizer with its defaults: `tokenizer(text).input_ids`,
the tokenizer's own special tokens included (Llama's begin-of-sequence, for one), and special
tokens spelled out in the text read as such.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessel.config.tokenizer import Tokenizer as TokenizerSection
from tessel.data.tokenizer.base import NO_PAD, BatchEncoder
from tessel.data.tokenizer.encoders import FastEncoder, ReferenceEncoder, SlowEncoder, prove_fast
from tessel.errors import TesselError

if TYPE_CHECKING:
    import tokenizers

# Files that hold a vocabulary: a folder with none of them has no tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Files that decide ids, beside a vocabulary.
_OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
GPT2 = "GPT2BPETokenizer"
_END = "<|endoftext|>"
_NAMED_SPECIALS = ("bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary."""
    return any((Path(folder) / name).is_file() for name in VOCABULARY_FILES)


class HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder, or of a single tokenizer.json.

    `fast` is the fast encoder once it is proved (`speed_up`), otherwise None.

    Special tokens and the pipeline are taken from AutoTokenizer; encoding goes to the `tokenizers`
    library directly where it has one, and to the slow Python tokenizer otherwise.
    """

    def __init__(self, path: Path, section: TokenizerSection | None = None, hf: Any = None) -> None:
        """`hf` is the transformers tokenizer of `path`, if it is open already."""
        section = section if section is not None else TokenizerSection()
        self.source: Path | None = path
        self._hf = hf if hf is not None else _open(path, use_fast=not section.tokenizer_not_use_fast)
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
        self._adds_special_tokens = not section.tokenizer_hf_no_include_special_tokens
        self.fast: FastEncoder | None = None

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

    def batch_encoder(self, add_special_tokens: bool = True) -> BatchEncoder:
        """`encode` over many texts, for another process; it holds no transformers object if it can."""
        add_special_tokens = add_special_tokens and self._adds_special_tokens
        if self._backend is None:
            return SlowEncoder(self._hf, add_special_tokens)
        if self.fast is not None:
            return self.fast.adding(add_special_tokens)
        return ReferenceEncoder(self._backend, add_special_tokens)

    def speed_up(self, sample: Sequence[str]) -> str | None:
        """See `Tokenizer`: fastokens instead of tokenizers, where their ids are equal."""
        if self._backend is None:
            return None
        proved = prove_fast(ReferenceEncoder(self._backend, self._adds_special_tokens), sample)
        if isinstance(proved, str):
            return f"tokenizing with tokenizers (slower): {proved}"
        self.fast = proved
        return "tokenizing with fastokens, seen to give the ids of tokenizers"


def gpt2_tokenizer(vocab_file: Path, merge_file: Path, section: TokenizerSection) -> HuggingFaceTokenizer:
    """GPT-2's byte-level BPE from its two files; end of document is `<|endoftext|>`.

    Raises:
        TesselError: a file is no vocabulary or no list of merges, or one does not fit the other.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    try:
        vocab = json.loads(vocab_file.read_bytes())
        lines = merge_file.read_text(encoding="utf-8").split("\n")
        merges = [
            (first, second)
            for first, _, second in (line.partition(" ") for line in lines if line and not line.startswith("#version"))
        ]
        if _END not in vocab:
            raise ValueError(f"{vocab_file.name} has no {_END}")
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    except Exception as error:
        # tokenizers raises bare Exception for merges that it cannot use.
        raise TesselError(
            f"{vocab_file} and {merge_file} are no GPT-2 tokenizer: {_first_line(error)}. Give the vocab.json and the "
            "merges.txt of one tokenizer."
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        split_special_tokens=section.legacy_tokenizer,
        clean_up_tokenization_spaces=False,
        **names,
    )
    tokenizer = HuggingFaceTokenizer(vocab_file, section, hf)
    digest = hashlib.sha256(vocab_file.read_bytes() + merge_file.read_bytes()).hexdigest()[:32]
    tokenizer.identity = f"{GPT2}{'-legacy' if section.legacy_tokenizer else ''}:{digest}"
    return tokenizer


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
