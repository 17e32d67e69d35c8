"""Rows: what the readers give, and the encoders take, whatever the format of the file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

Text = str | list[str]


class Row(NamedTuple):
    """One row of a file: its number (from 1), as errors name it, and its columns by name.

    The number is that of the line where a format has lines (.jsonl, .txt, .csv: its first), else that of the row.
    """

    number: int
    values: dict[str, Any]


class BadRow(NamedTuple):
    """A row that could not be read, passed over with --on-error skip: its number (from 1), and why."""

    number: int
    reason: str


def why_no_text(values: Mapping[str, Any], key: str) -> str | None:
    """Why the value of `key` is neither a text nor a list of texts (sentences), in a sentence; None if it is."""
    value = values.get(key)
    if type(value) is str and value.isascii():
        return None  # as nearly always
    if key not in values:
        near = difflib.get_close_matches(key, values, n=3, cutoff=0.5) or sorted(values)[:8]
        has = f"it has {', '.join(near)}" if near else "it is empty"
        return f"the object has no key {key!r}; {has}. Choose with --json-keys."
    for sentence in value if isinstance(value, list) else (value,):
        if not isinstance(sentence, str):
            holds = f"a list with {kind_of(sentence)}" if isinstance(value, list) else kind_of(sentence)
            return f"{key!r} is {holds}, where text is expected. Mend the line or leave it out."
        if not _is_unicode(sentence):
            return (
                f"{key!r} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character. "
                "Mend the line or leave it out."
            )
    return None


def kind_of(value: object) -> str:
    """What a value is, as JSON calls it."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a truth value",
        type(None): "null",
        int: "a number",
        float: "a number",
        bytes: "bytes",
    }
    return names.get(type(value), f"of type {type(value).__name__}")


def _is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8; JSON's \\u escapes can spell what cannot."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
