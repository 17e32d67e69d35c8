"""A shell script apart: statements of words, with quotes and expansions still in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ENDS = ("&&", "||", ";;", "|", "&", ";", "\n")
_COMMENT_AFTER_BACKSLASH = re.compile(r"\\[ \t]+(#[^\n]*)?\n")
_COMMENT_IN_COMMAND = re.compile(r"(?<=\\\n)[ \t]*#[^\n]*\n")


@dataclass(frozen=True)
class Piece:
    """A part of a word. `quote`: "" outside quotes, or one of them."""

    text: str
    quote: str


Word = tuple[Piece, ...]


@dataclass
class Statement:
    """A simple command, an assignment, or a word such as `if` with what follows it."""

    line: int
    words: list[Word] = field(default_factory=list)
    end: str = ""

    @property
    def first(self) -> str:
        """Its first word as it is written."""
        return "".join(piece.text for piece in self.words[0]) if self.words else ""


def mended(text: str) -> tuple[str, list[str]]:
    """`text` with commands that a comment cuts in two in one piece again, and a remark on each."""
    remarks = []
    for pattern, what, put in (
        (_COMMENT_AFTER_BACKSLASH, "something after a backslash", "\\\n"),
        (_COMMENT_IN_COMMAND, "a comment between the lines of a command", ""),
    ):
        for found in pattern.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            remarks.append(f"line {line}: {what} ends the command there; here the lines below are read as its rest")
        # A comment's line is gone, and so the backslash before it goes on to the line after.
        text = pattern.sub(put, text)
    return text, remarks


def statements(text: str) -> Iterator[Statement]:
    """The statements of a script, with array assignments as one statement `NAME=(`, words, `)`."""
    reader = _Reader(text)
    statement = Statement(1)
    while reader.position < len(text):
        end = reader.end()
        if end is not None:
            if statement.words:
                statement.end = end
                yield statement
            statement = Statement(reader.line)
            continue
        word = reader.word()
        if word:
            if not statement.words:
                statement.line = reader.line
            statement.words.append(word)
            if len(statement.words) == 1 and statement.first in ("then", "else", "do", "{"):
                yield statement
                statement = Statement(reader.line)
    if statement.words:
        yield statement


class _Reader:
    """A place in the text."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.position) + 1

    def end(self) -> str | None:
        """What ends a statement here, or None. Inside the brackets of an array a line's end is a blank."""
        self._skip_blanks()
        for end in _ENDS:
            if self.text.startswith(end, self.position):
                self.position += len(end)
                return None if end == "\n" and self.depth else end
        return None

    def _skip_blanks(self) -> None:
        while self.position < len(self.text):
            if self.text.startswith("\\\n", self.position):
                self.position += 2
            elif self.text[self.position] in " \t\r":
                self.position += 1
            elif self.text[self.position] == "#":
                end = self.text.find("\n", self.position)
                self.position = len(self.text) if end < 0 else end
            else:
                return

    def word(self) -> Word:
        """The word that begins here; a bracket of an array, which ends a word, is one by itself."""
        pieces: list[Piece] = []
        while self.position < len(self.text):
            rest = self.text[self.position :]
            here = rest[0]
            if rest.startswith("\\\n"):
                self.position += 2
                if not pieces:
                    continue
                break
            if here in " \t\r\n;|&" and not rest.startswith("&>"):
                break
            if here == "(" and pieces and pieces[-1].text.endswith("="):
                self.position, self.depth = self.position + 1, self.depth + 1
                return (*pieces, Piece("(", ""))
            if here == ")" and self.depth:
                if not pieces:
                    self.position, self.depth = self.position + 1, self.depth - 1
                    return (Piece(")", ""),)
                break
            pieces.append(self._piece(rest))
        return tuple(pieces)

    def _piece(self, rest: str) -> Piece:
        here = rest[0]
        if here == "'":
            end = rest.find("'", 1)
            return self._taken(Piece(rest[1:end], "'"), end + 1)
        if here == '"':
            end = _quoted_end(rest)
            return self._taken(Piece(rest[1:end].replace("\\\n", ""), '"'), end + 1)
        if here == "\\" and len(rest) > 1:
            return self._taken(Piece(rest[1], "'"), 2)
        size = _expansion(rest) if here in "$`" else 1
        return self._taken(Piece(rest[:size], ""), size)

    def _taken(self, piece: Piece, size: int) -> Piece:
        self.position += max(size, 1)
        return piece


def _quoted_end(rest: str) -> int:
    """Where the double quote that `rest` begins with is closed."""
    position = 1
    while position < len(rest) and rest[position] != '"':
        position += 2 if rest[position] == "\\" else _expansion(rest[position:]) if rest[position] == "$" else 1
    return min(position, len(rest) - 1)


def _expansion(rest: str) -> int:
    """How long the expansion is that `rest` begins with."""
    if rest[0] == "`":
        return rest.find("`", 1) + 1 or 1
    if len(rest) > 1 and rest[1] in "({":
        depth, closing = 0, {"(": ")", "{": "}"}[rest[1]]
        for position, letter in enumerate(rest):
            depth += (letter == rest[1]) - (letter == closing)
            if position > 1 and depth == 0:
                return position + 1
        return len(rest)
    found = re.match(r"\$(\w+|[@#?$*])?", rest)
    return found.end() if found else 1
