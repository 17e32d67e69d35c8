"""What is handed from the process that reads to those that parse, and the formats there are."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

from tessel.data.rows import BadRow
from tessel.errors import TesselError

KINDS = ("jsonl", "json", "parquet", "csv", "arrow", "txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = tuple(f".{kind}" for kind in KINDS)
TABLES = ("parquet", "arrow")  # compressed, if at all, within
TEXT_KEY = "text"  # the key that .txt files are said to have
BLOCK_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 28
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Format(NamedTuple):
    """One of KINDS, and the compression around it: gzip, zstd or None."""

    kind: str
    compression: str | None

    @property
    def name(self) -> str:
        """As an extension without its dot: jsonl, or jsonl.gz."""
        endings = {compression: suffix for suffix, compression in COMPRESSIONS.items()}
        return self.kind + endings.get(self.compression or "", "")


def format_of(path: str | Path) -> Format | None:
    """The format that the extension names, as in a.jsonl, a.json.gz or a.parquet; None if it is not read here."""
    path = Path(path)
    suffix, compression = path.suffix.lower(), None
    if suffix in COMPRESSIONS:
        compression = COMPRESSIONS[suffix]
        suffix = Path(path.stem).suffix.lower()
    kind = suffix[1:]
    if suffix not in SUFFIXES or (kind in TABLES and compression is not None):
        return None
    return Format(kind, compression)


class Block(NamedTuple):
    """Whole rows of a file, yet to be parsed.

    Attributes:
        first_line: number (from 1) of the first line or row.
        data: lines (jsonl, txt), records (csv), elements with commas between (array), or a stream of Arrow (table).
        kind: which of these; what the extension says if not given.
        names: the columns of a csv.
        null_words: whether cells of a csv such as "", NA and None are null, as pandas has it.
        num_bytes: of the file, as it lies on the disk.
    """

    path: str
    first_line: int
    data: bytes
    kind: str = ""
    names: tuple[str, ...] = ()
    null_words: bool = False
    num_bytes: int = 0

    @property
    def unit(self) -> str:
        """What its rows' numbers count."""
        return "row" if self.kind in ("array", "table") else "line"

    def where(self, number: int) -> str:
        """A row's file and number, as errors begin."""
        return f"{self.path}, {self.unit} {number}"


class RowFault(Exception):
    """Why a row cannot be read: a sentence that names no place."""


class Damage(Exception):
    """Why a file cannot be read any further, and the number of the first row that is lost."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number = number
        self.reason = reason


def report(block: Block, number: int, reason: str, bad: list[BadRow] | None) -> None:
    """Note a row that cannot be read in `bad`.

    Raises:
        TesselError: there is no such list, as with --on-error stop.
    """
    if bad is None:
        raise TesselError(f"{block.where(number)}: {reason}")
    bad.append(BadRow(number, reason))


Blocks = Generator[Block, None, None]
