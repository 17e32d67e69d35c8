"""A command line as flags with their values, whatever program it is for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tessel.config.parser import looks_like_flag
from tessel.config.schema import normal_flag


@dataclass(frozen=True)
class Given:
    """A flag as it was given, with dashes only; "" for the values before the first flag."""

    flag: str
    values: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """As the command line has it."""
        return (self.flag, *self.values) if self.flag else self.values


@dataclass(frozen=True)
class Arguments:
    """Flags in the order in which they were given."""

    given: tuple[Given, ...]

    @classmethod
    def read(cls, argv: Sequence[str]) -> Arguments:
        """A command line apart: a flag's values are what follows it up to the next flag."""
        return cls(tuple(_grouped(argv)))

    def has(self, flag: str) -> bool:
        """Whether it was given, with or without a value."""
        return any(given.flag == flag for given in self.given)

    def values(self, flag: str) -> tuple[str, ...]:
        """Its values where it was given last; none if it was not."""
        return next((given.values for given in reversed(self.given) if given.flag == flag), ())

    def value(self, flag: str) -> str | None:
        """Its only value; None if it was not given, or without one."""
        values = self.values(flag)
        return values[0] if values else None

    def without(self, *flags: str) -> Arguments:
        """All but these."""
        return Arguments(tuple(given for given in self.given if given.flag not in flags))

    def plus(self, *words: str) -> Arguments:
        """With more at the end."""
        return Arguments((*self.given, *_grouped(words)))

    @property
    def argv(self) -> tuple[str, ...]:
        """As a command line."""
        return tuple(itertools.chain.from_iterable(given.words for given in self.given))


def _grouped(argv: Sequence[str]) -> Iterator[Given]:
    flag, values = "", list[str]()
    for word in argv:
        if not looks_like_flag(word):
            values.append(word)
            continue
        if flag or values:
            yield Given(flag, tuple(values))
        name, equals, value = word.partition("=")
        flag, values = normal_flag(name), [value] if equals else []
    if flag or values:
        yield Given(flag, tuple(values))
