"""What stands in place of a program of another suite."""

from __future__ import annotations

from dataclasses import dataclass

from tessel.drop_in.arguments import Arguments


@dataclass(frozen=True)
class Command:
    """One command of tessel."""

    verb: str
    arguments: Arguments


@dataclass(frozen=True)
class Translation:
    """Commands, one after the other, and what a user should know about them."""

    commands: tuple[Command, ...]
    remarks: tuple[str, ...] = ()
