"""Text as it grows, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """The part of a tokenizer that `TextStream` needs."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Tokens in, text out, as early as the text is certain: never half of a character.

    A token may be a part of a character, which decodes to U+FFFD until the rest has come. Decoding
    starts a few tokens back, since some tokenizers drop the space before the first token.
    """

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._ids = list(prompt_ids)
        self._context = 0  # where decoding starts
        self._shown = len(self._ids)  # the tokens before it are shown

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; often empty."""
        self._ids.append(token)
        text = self._pending()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """The rest, with U+FFFD for what never became a character."""
        text = self._pending()
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._decoder.decode(self._ids[self._context : self._shown])
        return self._decoder.decode(self._ids[self._context :])[len(before) :]


class StopStrings:
    """Cuts a text before the first of some strings, and holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What of the text so far is certain to stay and was not given before; whether a string was met."""
        if not self._strings:
            return text, False
        self._held += text
        met = [at for string in self._strings if (at := self._held.find(string)) >= 0]
        if met:
            return self._held[: min(met)], True
        keep = max(_overlap(self._held, string) for string in self._strings)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given, False

    def finish(self) -> str:
        """What was held back; the text has ended otherwise."""
        return self._held


class TaggedText:
    """Parts a text that grows at a pair of tags, such as <think> and </think>, which are left out.

    `is_inside`: whether the text begins after the first tag.
    """

    def __init__(self, begin: str, end: str, is_inside: bool = False) -> None:
        self._begin, self._end = begin, end
        self.is_inside = is_inside
        self._held = ""

    def push(self, text: str) -> list[tuple[bool, str]]:
        """What is certain now and was not before: pieces, each with whether it stands between the tags.

        Where a tag is met, the piece before it is given even if it is empty: what follows another one stands apart.
        """
        self._held += text
        pieces = []
        while (at := self._held.find(tag := self._end if self.is_inside else self._begin)) >= 0:
            pieces.append((self.is_inside, self._held[:at]))
            self._held = self._held[at + len(tag) :]
            self.is_inside = not self.is_inside
        certain = len(self._held) - _overlap(self._held, tag)
        if certain:
            pieces.append((self.is_inside, self._held[:certain]))
            self._held = self._held[certain:]
        return pieces

    def finish(self) -> list[tuple[bool, str]]:
        """What was held back as the possible beginning of a tag."""
        held, self._held = self._held, ""
        return [(self.is_inside, held)] if held else []


def _overlap(text: str, string: str) -> int:
    """The longest end of `text` that is a beginning of `string`, and not the whole of it."""
    longest = min(len(string) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
