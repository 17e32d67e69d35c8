"""Rows to ids: what every encoder is, and how one is run over a block of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from tessel.data.readers import Block, LineCounter, Span, parse_rows
from tessel.data.rows import BadRow, Row
from tessel.errors import TesselError


class Encoded(NamedTuple):
    """One dataset's part of some documents.

    tokens i32[N]; lengths i32[S], tokens of each sequence; sequences_per_document i32[D], 0 for an empty document.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sequences_per_document: np.ndarray


class RowError(TesselError):
    """A row that cannot be encoded: its number, as in `Row`, and why (a sentence that names no file)."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number = number
        self.reason = reason

    def __str__(self) -> str:
        return f"row {self.number}: {self.reason}"


class RowEncoder(Protocol):
    """Rows to ids. Can be pickled, since workers are other processes.

    Attributes:
        outputs: keys of the datasets written, each `{prefix}_{key}_document`.
        columns: the columns that it reads; None for all.

    It may have `left_out`, the rows of the last call that it left out or changed by its own rules, and why.
    """

    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def columns(self) -> tuple[str, ...] | None: ...

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """One `Encoded` an output, all of `rows` in order; `where` names their file.

        Raises:
            RowError: a row cannot be encoded.
        """


class BlockResult(NamedTuple):
    """A block's ids, one `Encoded` an output; the rows that were skipped, and those an encoder left out or changed."""

    encoded: tuple[Encoded, ...]
    bad: tuple[BadRow, ...] = ()
    noted: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class BlockEncoder:
    """Runs an encoder over blocks. With `skip`, bad rows are passed over; with `lists`, a row may be a list."""

    encoder: RowEncoder
    skip: bool = False
    lists: bool = False
    lines: LineCounter = field(default_factory=LineCounter)

    def __call__(self, block: Block | Span) -> BlockResult:
        """The rows of a block, encoded.

        Raises:
            TesselError: a row cannot be read or encoded, and none is to be skipped; names file and line or row.
        """
        if isinstance(block, Block):
            return self._result(block)
        try:
            result = self._result(block.load())
        except TesselError:
            # Lines are counted for those who want to know: an error is about to end the run.
            return self._result(block.load(self.lines.first_line(block)))
        if not (result.bad or result.noted):
            return result
        ahead = self.lines.first_line(block) - block.first_line
        bad, noted = (
            tuple(BadRow(row.number + ahead, row.reason) for row in rows) for rows in (result.bad, result.noted)
        )
        return BlockResult(result.encoded, bad, noted)

    def _result(self, block: Block) -> BlockResult:
        bad: list[BadRow] = []
        rows = parse_rows(block, self.encoder.columns, bad if self.skip else None, lists=self.lists)
        noted: list[BadRow] = []
        encoded = self._encode(rows, block, bad, noted)
        return BlockResult(encoded, tuple(sorted(bad)), tuple(noted))

    def _encode(self, rows: Sequence[Row], block: Block, bad: list[BadRow], noted: list[BadRow]) -> tuple[Encoded, ...]:
        try:
            encoded = self.encoder(rows, block.path)
            noted.extend(getattr(self.encoder, "left_out", ()))
            return encoded
        except RowError as error:
            if not self.skip:
                raise TesselError(f"{block.where(error.number)}: {error.reason}") from error
            if len(rows) == 1:
                bad.append(BadRow(error.number, error.reason))
                return self.encoder((), block.path)
        # Halves, so that a few bad rows cost a few times the work, not as many times as there are rows.
        middle = len(rows) // 2
        return join((self._encode(rows[:middle], block, bad, noted), self._encode(rows[middle:], block, bad, noted)))


def join(parts: Sequence[tuple[Encoded, ...]]) -> tuple[Encoded, ...]:
    """Documents after one another, output by output."""
    return tuple(Encoded(*map(np.concatenate, zip(*own, strict=True))) for own in zip(*parts, strict=True))
