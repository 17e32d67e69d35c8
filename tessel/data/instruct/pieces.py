"""Ids as text for the eye: special tokens by their names, ends of lines visible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tessel.data.instruct.vocabulary import hf_of
from tessel.data.tokenizer import Tokenizer

NEWLINE = "↵"


class Pieces:
    """Text of ids, those included that a prompt type adds."""

    def __init__(self, tokenizer: Tokenizer, added: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        hf = hf_of(tokenizer)
        self._specials = {i: token.content for i, token in hf.added_tokens_decoder.items()}
        self._specials |= {i: word for word, i in added.items()}

    def of(self, ids: Sequence[int]) -> Iterator[tuple[str, bool]]:
        """Stretches of text, and whether each is a special token. Ends of lines are marked before them."""
        plain: list[int] = []
        for i in ids:
            if i in self._specials:
                if plain:
                    yield self._plain(plain), False
                    plain = []
                yield self._specials[i], True
            else:
                plain.append(i)
        if plain:
            yield self._plain(plain), False

    def one(self, i: int) -> str:
        """One token: a special one by its name, another in quotes with its ends of lines spelled out."""
        if i in self._specials:
            return self._specials[i]
        return repr(self._tokenizer.decode([i]))

    def _plain(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids).replace("\n", f"{NEWLINE}\n")
