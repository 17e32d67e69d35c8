"""Documents cut into sentences by NLTK's Punkt, as the suites' tools do with --split-sentences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tessel.errors import TesselError

# Megatron-LM cuts long texts into pieces of so many characters first; MindSpeed-LLM does not.
MEGATRON_PIECE_CHARS = 1_000_000


@dataclass(frozen=True)
class SentenceSplitter:
    """Text to sentences. Without `keep_newlines`, the white space between two sentences is lost.

    `piece_chars`: cut texts into pieces of so many characters first; None for never.
    """

    lang: str = "english"
    keep_newlines: bool = False
    piece_chars: int | None = MEGATRON_PIECE_CHARS

    def __call__(self, text: str) -> list[str]:
        """The sentences of a text, in order.

        Raises:
            TesselError: NLTK is not installed, or its parameters for the language are not there.
        """
        step = self.piece_chars or max(len(text), 1)
        pieces = (text[start : start + step] for start in range(0, len(text), step))
        return [sentence for piece in pieces for sentence in self._punkt.tokenize(piece)]

    def check(self) -> None:
        """Whether it can be had here.

        Raises:
            TesselError: as a call.
        """
        self._punkt  # noqa: B018

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens its own.
        return {name: value for name, value in vars(self).items() if name != "_punkt"}

    @cached_property
    def _punkt(self) -> Any:
        try:
            from nltk.tokenize import punkt  # type: ignore[import-untyped]
        except ImportError as error:
            raise TesselError("--split-sentences needs nltk: pip install 'tessel[sentences]'.") from error
        try:
            punkt_of_lang = punkt.PunktTokenizer(self.lang)
        except LookupError as error:
            raise TesselError(
                f"--split-sentences needs NLTK's parameters for {self.lang}, which are not on this machine: run "
                "`python -m nltk.downloader punkt_tab`, or set NLTK_DATA to a folder with tokenizers/punkt_tab in it."
            ) from error
        if not self.keep_newlines:
            return punkt_of_lang

        class KeepingNewlines(punkt.PunktLanguageVars):  # type: ignore[misc]
            """White space after the end of a sentence belongs to it: what follows is looked for behind it."""

            _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

        return punkt.PunktSentenceTokenizer(train_text=punkt_of_lang._params, lang_vars=KeepingNewlines())
