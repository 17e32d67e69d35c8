"""The options of a configuration: a walk over its dataclass tree, and the conversion of one value."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tessel.errors import UsageError

PATH_METAVARS = ("DIR", "FILE", "PATH", "PREFIX")


@dataclass(frozen=True)
class Option:
    """One field of a configuration, as the command line and the file see it."""

    name: str
    path: tuple[str, ...]
    """Names of the sections that hold it, outermost first; empty for a field of the verb itself."""
    heading: str
    kind: type
    """bool, int, float or str: of the value, or of each value of a tuple."""
    many: bool
    default: Any
    required: bool
    metadata: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """The flag, or the name of a positional argument."""
        if self.metadata["positional"]:
            return str(self.metadata["metavar"] or self.name.upper())
        return flag_of(self.name)

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every flag that sets it, with dashes only."""
        if self.metadata["positional"]:
            return ()
        return (self.flag, *(normal_flag(alias) for alias in self.metadata["aliases"]))

    @property
    def rule(self) -> str:
        """What a value must be, as the end of "must be"."""
        if self.metadata["choices"] is not None:
            return "one of " + ", ".join(str(choice) for choice in self.metadata["choices"])
        one = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[self.kind]
        if not self.many:
            return one
        several = {int: "whole numbers", float: "numbers", str: "texts"}[self.kind]
        count = self.metadata["nargs"]
        return f"{count} {several}" if isinstance(count, int) else f"one or more {several}"


def flag_of(name: str) -> str:
    """`num_layers` -> `--num-layers`."""
    return "--" + name.replace("_", "-")


def normal_flag(flag: str) -> str:
    """A flag with dashes only, since underscores are accepted too."""
    return "--" + flag[2:].replace("_", "-") if flag.startswith("--") else flag


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, without its full stop."""
    return " ".join(text.split()).split(". ")[0].rstrip(".")


@functools.cache
def options(cls: type) -> tuple[Option, ...]:
    """Every option of a dataclass tree, in the order of declaration. Names are unique in a tree."""
    found = tuple(_walk(cls, ()))
    names = [o.name for o in found]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"{cls.__name__} declares {sorted(twice)} twice"
    return found


def _walk(cls: type, path: tuple[str, ...]) -> typing.Iterator[Option]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _walk(typing.cast(type, hints[f.name]), (*path, f.name))
            continue
        kind, many = _kind(hints[f.name])
        required = f.default is dataclasses.MISSING
        default = None if required else f.default
        heading = first_sentence(_declarer(cls, f.name).__doc__ or "")
        yield Option(f.name, path, heading, kind, many, default, required, f.metadata)


def _declarer(cls: type, name: str) -> type:
    """The class of `cls` and its bases that declares a field: its docstring is the heading."""
    return next(c for c in cls.__mro__ if name in inspect.get_annotations(c))


def _kind(annotation: Any) -> tuple[type, bool]:
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = arguments
        arguments = list(typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return arguments[0], True
    return annotation, False


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass tree from values by option name; defaults for the others."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            arguments[f.name] = build(typing.cast(type, hints[f.name]), values)
        elif f.name in values:
            arguments[f.name] = values[f.name]
    return cls(**arguments)


def read(config: Any, option: Option) -> Any:
    """The value of an option in an instance of the tree that it was found in."""
    for section in option.path:
        config = getattr(config, section)
    return getattr(config, option.name)


def convert(option: Option, raw: Any, name: str) -> Any:
    """A value as written on the command line (text) or in a file, as the field's type.

    Raises:
        UsageError: it does not fit; `name` is how the user wrote the field.
    """
    if option.many:
        items = raw if isinstance(raw, Sequence) and not isinstance(raw, str) else [raw]
        count = option.metadata["nargs"]
        # None at all is what a default may say, and a file may repeat it.
        if (not items and option.default != ()) or (isinstance(count, int) and len(items) != count):
            raise _misfit(option, raw, name)
        return tuple(_convert_one(option, item, raw, name) for item in items)
    return _convert_one(option, raw, raw, name)


def _convert_one(option: Option, item: Any, raw: Any, name: str) -> Any:
    value = _as_kind(option.kind, item, loose_text=option.many)
    if isinstance(value, str) and option.metadata["metavar"] in PATH_METAVARS:
        # No shell has done it in a file, nor after an equals sign.
        value = os.path.expanduser(value)
    choices = option.metadata["choices"]
    if value is None or (choices is not None and value not in choices):
        raise _misfit(option, raw, name)
    return value


def _as_kind(kind: type, item: Any, loose_text: bool) -> Any:
    """`item` as `kind`, or None where that loses or invents something."""
    if kind is bool or isinstance(item, bool):
        return item if kind is bool and isinstance(item, bool) else None
    if kind is str:
        # A blend in a file mixes weights, which YAML reads as numbers, with paths.
        accepted = (str, int, float) if loose_text else (str,)
        return str(item) if isinstance(item, accepted) else None
    if not isinstance(item, (str, int, float)) or (kind is int and isinstance(item, float) and not item.is_integer()):
        return None
    try:
        # YAML 1.1 reads 1e-3 as text, so text that is a number is taken in files too.
        value = kind(item)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _misfit(option: Option, raw: Any, name: str) -> UsageError:
    shown = " ".join(str(item) for item in raw) if isinstance(raw, (list, tuple)) else raw
    return UsageError(f"{name} is {shown!r}: it must be {option.rule}.")
