"""A report as facts: lines for a reader, one object for a program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """What was found.

    `facts` are (label, text) for the reader, `data` the same as JSON, and `tail` further lines as they are.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    data: dict[str, Any]
    tail: Sequence[str] = field(default=())

    def print(self, as_json: bool) -> None:
        """Print on stdout, as text or as one JSON object."""
        print(json.dumps(self.data, ensure_ascii=False) if as_json else "\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The report as text; labels in one column."""
        width = max((len(label) for label, _ in self.facts), default=0)
        return [self.title, *(f"  {label:<{width}}  {text}" for label, text in self.facts), *self.tail]


def bytes_text(num_bytes: int) -> str:
    """A size in the largest decimal unit that leaves at least 1: `1.4 MB`."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def count_text(number: int) -> str:
    """A number with its thousands set off, and in short where it is long: `494,032,768 (494 M)`."""
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number:,} ({number / unit:.3g} {letter})"
    return f"{number:,}"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())


def clip(text: str, num_characters: int) -> str:
    """At most so many characters, with a mark where some are left out."""
    return text if len(text) <= num_characters else text[:num_characters] + " ..."
