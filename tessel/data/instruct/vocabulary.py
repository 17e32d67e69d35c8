"""A tokenizer as a prompt type makes it: its end of sequence, its special tokens, its padding.

Nothing is changed in the tokenizer that was given: another prompt type may follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tessel.data.instruct.templates import ROLES, Template, Token
from tessel.data.tokenizer import BatchEncoder, HuggingFaceTokenizer, Tokenizer
from tessel.data.tokenizer.encoders import ReferenceEncoder, SlowEncoder
from tessel.errors import TesselError, UsageError

_MISSING_EOS = "<|endoftext|>"


@dataclass(frozen=True)
class Vocabulary:
    """What dialogues need of a tokenizer. Can be pickled.

    Attributes:
        encoder: texts to ids without special tokens of the tokenizer's own, those spelled out read as such.
        eos, bos: ids of the end and the beginning of a sequence; None where there is none.
        eod: id that --append-eod appends: the end of sequence, unless --eod-id says another.
        pad: id that fills packs; --pad-id where that is given.
        added: tokens that the prompt type adds to the vocabulary, with their ids.
        tokens: ids of the tokens that the template names.
    """

    encoder: BatchEncoder
    eos: int | None
    bos: int | None
    eod: int | None
    pad: int
    vocab_size: int
    added: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


def hf_of(tokenizer: Tokenizer) -> Any:
    """The transformers tokenizer of `tokenizer`.

    Raises:
        UsageError: it has none: ids between spaces are no dialogue.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise UsageError(
            f"Dialogues need a tokenizer of a Hugging Face folder (--tokenizer-name-or-path), not {tokenizer.identity}."
        )
    return tokenizer.hf


def plain_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer as it is, without any prompt type."""
    hf = hf_of(tokenizer)
    pad = hf.pad_token_id if hf.pad_token_id is not None else hf.eos_token_id
    return Vocabulary(
        tokenizer.batch_encoder(add_special_tokens=False),
        hf.eos_token_id,
        hf.bos_token_id,
        tokenizer.eod,
        -1 if pad is None else pad,
        tokenizer.vocab_size,
    )


def vocabulary_for(tokenizer: Tokenizer, template: Template) -> Vocabulary:
    """The tokenizer with what `template` changes, by MindSpeed-LLM's rules.

    With `replace_eos` the first stop word is the end of sequence, and so what --append-eod appends. A
    tokenizer without an end of sequence gets `<|endoftext|>`; one without padding pads with the end of
    sequence. The other stop words become special tokens. What the tokenizer lacks gets a new id.

    Raises:
        UsageError: the tokenizer is not one of Hugging Face.
        TesselError: the template names a token that the tokenizer lacks.
    """
    hf = hf_of(tokenizer)
    stop_words = list(template.stop_words)
    eos = (stop_words.pop(0) if template.replace_eos else hf.eos_token) or _MISSING_EOS
    marked = {token.content for token in hf.added_tokens_decoder.values()}
    missing = [word for word in dict.fromkeys([eos, *stop_words]) if word not in marked]
    if missing:
        hf = _with_tokens(hf, missing)
    ids = hf.get_vocab()
    named = sorted({slot.name for role in ROLES for slot in getattr(template, role) if isinstance(slot, Token)})
    for name in named:
        if name not in ids:
            raise TesselError(
                f"The prompt type {template.name} uses the token {name!r}, which the tokenizer {tokenizer.source} "
                "does not have; use the tokenizer of the model that the prompt type is for."
            )
    known = hf_of(tokenizer).get_vocab() if missing else ids
    added = {word: ids[word] for word in missing if word not in known}
    return Vocabulary(
        _encoder_of(hf) if missing else tokenizer.batch_encoder(add_special_tokens=False),
        ids[eos],
        hf.bos_token_id,
        _asked_for(tokenizer.eod, hf.eos_token_id) or ids[eos],
        _asked_for(tokenizer.pad, hf.pad_token_id) or (ids[eos] if hf.pad_token_id is None else hf.pad_token_id),
        tokenizer.vocab_size + len(added),
        added,
        {name: ids[name] for name in named},
    )


def _asked_for(used: int | None, own: int | None) -> int | None:
    """The id in use, where --eod-id or --pad-id says another than the tokenizer; None otherwise."""
    return used if used is not None and used > 0 and used != own else None


def _with_tokens(hf: Any, words: Sequence[str]) -> Any:
    """A copy of the tokenizer that reads `words` as single tokens."""
    import copy

    hf = copy.deepcopy(hf)
    hf.add_tokens(list(words), special_tokens=True)
    return hf


def _encoder_of(hf: Any) -> BatchEncoder:
    backend = getattr(hf, "backend_tokenizer", None)
    return SlowEncoder(hf, False) if backend is None else ReferenceEncoder(backend, False)
