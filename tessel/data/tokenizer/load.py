"""The tokenizer that the flags name."""

from __future__ import annotations

from pathlib import Path

from tessel.config.tokenizer import Tokenizer as TokenizerSection
from tessel.data.tokenizer.base import Tokenizer
from tessel.data.tokenizer.hugging_face import GPT2, HuggingFaceTokenizer, gpt2_tokenizer
from tessel.data.tokenizer.null import NULL, NullTokenizer
from tessel.data.tokenizer.sentencepiece import SENTENCEPIECE_TYPES, SentencePieceTokenizer
from tessel.data.tokenizer.tiktoken import TIKTOKEN, TikTokenizer
from tessel.errors import TesselError, UsageError
from tessel.runtime.files import require_path


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
    if section.tokenizer_type == GPT2:
        return _gpt2(section)
    if section.tokenizer_type == TIKTOKEN:
        return TikTokenizer(_file_of(section), section, vocab_size)
    if section.tokenizer_type in SENTENCEPIECE_TYPES:
        return SentencePieceTokenizer(_file_of(section), section)
    if section.vocab_file or section.merge_file:
        raise UsageError(
            "--vocab-file and --merge-file are those of --tokenizer-type GPT2BPETokenizer; add it, or leave them out."
        )
    path = _named_path(section) or default_folder
    if path is None:
        raise UsageError(
            "No tokenizer is named: give --tokenizer-name-or-path FOLDER (or --tokenizer-type NullTokenizer "
            "--vocab-size V for text that is already ids)."
        )
    flag = "--tokenizer-name-or-path" if _named_path(section) else "the tokenizer in --load"
    return HuggingFaceTokenizer(require_path(path, flag), section)


def _gpt2(section: TokenizerSection) -> Tokenizer:
    if section.vocab_file is None or section.merge_file is None:
        raise UsageError(f"--tokenizer-type {GPT2} needs --vocab-file vocab.json and --merge-file merges.txt.")
    if _named_path(section):
        raise UsageError(f"--tokenizer-type {GPT2} reads no tokenizer folder: leave {_named_path(section)} out.")
    files = require_path(section.vocab_file, "--vocab-file"), require_path(section.merge_file, "--merge-file")
    return gpt2_tokenizer(*files, section)


def _file_of(section: TokenizerSection) -> Path:
    path = _named_path(section)
    if path is None:
        raise UsageError(f"--tokenizer-type {section.tokenizer_type} needs --tokenizer-model FILE.")
    return require_path(path, "--tokenizer-model")


def _named_path(section: TokenizerSection) -> str | None:
    by_name, by_model = section.tokenizer_name_or_path, section.tokenizer_model
    if by_name and by_model and Path(by_name).resolve() != Path(by_model).resolve():
        raise UsageError(
            f"--tokenizer-name-or-path {by_name} and --tokenizer-model {by_model} name two tokenizers; give one."
        )
    return by_name or by_model


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
