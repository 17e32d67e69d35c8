"""How a configuration field is declared: its default, its help and its command-line form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    nargs: str | int | None = None,
    aliases: Sequence[str] = (),
) -> Any:
    """Declare a field of a section.

    The flag is the field's name with dashes. A `bool` field is a switch. `aliases` are further
    spellings, with their dashes. The help text is written here and nowhere else.
    """
    metadata = {"help": help, "choices": choices, "nargs": nargs, "aliases": tuple(aliases)}
    return dataclasses.field(default=default, metadata=metadata)
