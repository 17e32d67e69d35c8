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
        keep = max(self._overlap(string) for string in self._strings)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given, False

    def finish(self) -> str:
        """What was held back; the text has ended otherwise."""
        return self._held

    def _overlap(self, string: str) -> int:
        """The longest end of what is held that is a beginning of the string."""
        longest = min(len(string) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)
