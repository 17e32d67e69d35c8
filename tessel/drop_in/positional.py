"""Scripts of Pai-Megatron-Patch whose arguments have no flags: each is checked by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tessel.errors import UsageError

Check = Callable[[str], str | None]
"""A value -> what it must be, where it is not."""


@dataclass(frozen=True)
class Positional:
    """One argument: its name in the script, and what it must be."""

    name: str
    check: Check
    is_optional: bool = False


def read(script: str, wanted: Sequence[Positional], argv: Sequence[str]) -> dict[str, str]:
    """The arguments by name.

    Raises:
        UsageError: their number is wrong, with the list of what was given, or one of them.
    """
    least = sum(not one.is_optional for one in wanted)
    if not least <= len(argv) <= len(wanted):
        needed = str(least) if least == len(wanted) else f"{least} to {len(wanted)}"
        given = [
            f"{number}. {one.name} = {value!r}"
            for number, (one, value) in enumerate(zip(wanted, argv, strict=False), 1)
        ]
        missing = [one.name for one in wanted[len(argv) : least]]
        said = f"; missing: {', '.join(missing)}" if missing else f"; too many: {' '.join(argv[len(wanted) :])}"
        raise UsageError(f"{script} needs {needed} arguments, and {len(argv)} are given: {', '.join(given)}{said}.")
    for number, (one, value) in enumerate(zip(wanted, argv, strict=False), 1):
        rule = one.check(value)
        if rule is not None:
            raise UsageError(f"{script}: argument {number}, {one.name}, is {value!r}: {rule}.")
    return {one.name: value for one, value in zip(wanted, (*argv, *[""] * len(wanted)), strict=False)}


def one_of(*choices: str) -> Check:
    """One of these words."""
    return lambda value: None if value in choices else f"it must be one of {', '.join(choices)}"


def whole(least: int) -> Check:
    """A whole number from `least` on."""

    def check(value: str) -> str | None:
        good = value.isdecimal() and int(value) >= least
        return None if good else f"it must be a whole number of at least {least}"

    return check


def positive(value: str) -> str | None:
    """A number above 0."""
    try:
        good = float(value) > 0
    except ValueError:
        good = False
    return None if good else "it must be a number above 0"


def folder(value: str) -> str | None:
    """A folder that exists."""
    return None if Path(value).is_dir() else "there is no such folder"


def dataset(value: str) -> str | None:
    """A dataset's prefix, or a file."""
    prefix = value.removesuffix(".bin").removesuffix(".idx")
    parts = ("", "_text_document", "_packed_input_ids_document")
    if Path(value).is_file() or any(Path(f"{prefix}{part}.idx").exists() for part in parts):
        return None
    return "there is neither such a file nor a dataset of this prefix (PREFIX.bin and PREFIX.idx)"


def writable(value: str) -> str | None:
    """A folder that exists or can be made."""
    if not value:
        return "it must be a folder to write to"
    existing = next(path for path in (Path(value), *Path(value).absolute().parents) if path.exists())
    return None if existing.is_dir() else f"{existing} is a file, not a folder"
