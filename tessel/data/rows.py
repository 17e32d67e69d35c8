"""Rows: what the readers give, and the encoders take, whatever the format of the file."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row of a file: its number (from 1), as errors name it, and its columns by name.

    The number is that of the line where a format has lines (.jsonl, .txt), else that of the row.
    """

    number: int
    values: dict[str, Any]


class BadRow(NamedTuple):
    """A row that could not be read, passed over with --on-error skip: its number (from 1), and why."""

    number: int
    reason: str
