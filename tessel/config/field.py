"""How a configuration field is declared: its default, its help and its command-line form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

REQUIRED: Any = dataclasses.MISSING
"""As the default of `option`: the value must be given."""


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    nargs: str | int | None = None,
    aliases: Sequence[str] = (),
    positional: bool = False,
    metavar: str | None = None,
) -> Any:
    """Declare a field of a section.

    The flag is the field's name with dashes. A `bool` field is a switch; a tuple field takes
    several values, `nargs` of them if that is a number. `aliases` are further spellings, with their
    dashes. A `positional` field has no flag. `metavar` stands for the value in the help, which is
    written here and nowhere else.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "nargs": nargs,
        "aliases": tuple(aliases),
        "positional": positional,
        "metavar": metavar,
    }
    return dataclasses.field(default=default, metadata=metadata)
