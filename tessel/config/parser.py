"""The command line of a verb, read into its configuration."""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tessel.config.file import read_file
from tessel.config.megatron import ForeignFlags
from tessel.config.nearest import CERTAINTY, nearest
from tessel.config.schema import Option, build, convert, normal_flag, options
from tessel.errors import UsageError

MAX_HELP_WIDTH = 120
HELP_FLAGS = ("--help", "--config", "--print-config")


@dataclass(frozen=True)
class Parsed:
    """A configuration, and how it came to be."""

    value: Any
    given: frozenset[str]
    """Names of the fields that the command line or the file set."""
    provenance: dict[str, str]
    """Field name -> "default", "file" or "flag"; later "derived" or "model"."""
    notes: tuple[str, ...] = ()
    """Lines to print once at start-up."""
    print_config: bool = False


@dataclass
class _Scan:
    """The arguments after a first pass: flags normalised, foreign ones taken out."""

    arguments: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def parse(cls: type, argv: Sequence[str], prog: str, foreign: ForeignFlags | None = None) -> Parsed:
    """Read `argv` into an instance of `cls`, a frozen dataclass whose fields are `option`s or sections.

    `--config FILE` gives values that the command line overrides. `foreign` are flags of other
    suites: accepted with a note, or refused with a reason. `--help` prints and raises SystemExit(0).

    Raises:
        UsageError: an unknown flag, a value that does not fit, a required one that is missing.
    """
    foreign = foreign or ForeignFlags()
    all_options = options(cls)
    scan = _scan(argv, _spellings(all_options), foreign)
    if scan.unknown or scan.refused:
        raise UsageError(_refusal(scan, all_options, foreign, prog))
    written = vars(_argparser(cls, prog).parse_intermixed_args(scan.arguments))
    # A positional that is not there is None, or an empty list, once.
    written = {name: None if value in ([None], [[]]) else value for name, value in written.items()}
    values: dict[str, Any] = {}
    notes: list[str] = []
    provenance = {o.name: "default" for o in all_options}
    if written["config"] is not None:
        from_file = read_file(written["config"], all_options, foreign)
        values.update(from_file.values)
        provenance.update(dict.fromkeys(from_file.values, "file"))
        scan.foreign.extend(flag for flag in from_file.foreign if flag not in scan.foreign)
    for o in all_options:
        if written[o.name] is not None:
            values[o.name] = _converted(o, written[o.name], notes)
            provenance[o.name] = "flag"
    missing = [o.flag for o in all_options if o.required and o.name not in values]
    if missing:
        raise UsageError(f"{prog} needs {' and '.join(missing)}; see {prog} --help.")
    notes.extend(foreign.notes(scan.foreign))
    return Parsed(build(cls, values), frozenset(values), provenance, tuple(notes), written["print_config"])


def _spellings(all_options: Sequence[Option]) -> dict[str, Option | None]:
    known: dict[str, Option | None] = {spelling: o for o in all_options for spelling in o.spellings}
    return {**dict.fromkeys(HELP_FLAGS), **known}


def _scan(argv: Sequence[str], known: Mapping[str, Option | None], foreign: ForeignFlags) -> _Scan:
    scan = _Scan()
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not looks_like_flag(argument):
            scan.arguments.append(argument)
            continue
        written, equals, value = argument.partition("=")
        flag = normal_flag(written) if written.startswith("--") else written
        if flag in known:
            o = known[flag]
            scan.arguments.append((o.flag if o is not None else flag) + equals + value)
        elif flag in foreign.accepted:
            values = [value] if equals else _values_after(argv, position, foreign.accepted[flag].num_values)
            position += 0 if equals else len(values)
            refusal = foreign.refusal(flag, values)
            (scan.refused if refusal else scan.foreign).append(refusal or flag)
        elif refusal := foreign.refusal(flag) or _refused_family(flag, known, foreign):
            scan.refused.append(refusal)
        else:
            scan.unknown.append(written)
    return scan


def _refused_family(flag: str, known: Iterable[str], foreign: ForeignFlags) -> str | None:
    """The refusal of a flag that is known by its beginning, unless it is surely a known one mistyped."""
    refusal = foreign.family_refusal(flag)
    return None if refusal and nearest(flag, [*known, *foreign.names()], CERTAINTY) else refusal


def _values_after(argv: Sequence[str], position: int, num_values: int) -> list[str]:
    following = argv[position : position + num_values]
    return list(itertools.takewhile(lambda argument: not looks_like_flag(argument), following))


def looks_like_flag(argument: str) -> bool:
    """Whether an argument is a flag, not a value: `-1`, `-` and text with a space are values."""
    if argument in ("-h", "--help"):
        return argument == "--help"
    if argument.startswith("--"):
        return len(argument) > 2 and " " not in argument.partition("=")[0]
    return len(argument) > 1 and argument[0] == "-" and argument[1].isalpha() and " " not in argument


def _refusal(scan: _Scan, all_options: Sequence[Option], foreign: ForeignFlags, prog: str) -> str:
    parts = []
    if scan.unknown:
        candidates = [spelling for o in all_options for spelling in o.spellings]
        candidates += [*HELP_FLAGS, *foreign.names()]
        if len(scan.unknown) == 1:
            near = nearest(_dashed(scan.unknown[0]), candidates)
            remedy = f"nearest: {', '.join(near)}" if near else f"see {prog} --help"
            parts.append(f"unknown flag {scan.unknown[0]}; {remedy}")
        else:
            described = []
            for flag in dict.fromkeys(scan.unknown):
                near = nearest(_dashed(flag), candidates)
                described.append(f"{flag} (nearest: {', '.join(near)})" if near else f"{flag} (nothing like it)")
            parts.append(f"unknown flags: {'; '.join(described)}")
    return "\n".join([*parts, *dict.fromkeys(scan.refused)])


def _dashed(flag: str) -> str:
    return normal_flag("--" + flag.lstrip("-"))


def _converted(o: Option, written: list[Any], notes: list[str]) -> Any:
    """The value of a flag from every time it was given; the last one counts, as in Megatron."""
    if o.kind is bool and not o.many:
        return True
    values = [convert(o, each, o.flag) for each in written]
    if any(value != values[-1] for value in values):
        earlier = ", ".join(dict.fromkeys(_shown(value) for value in values[:-1] if value != values[-1]))
        notes.append(f"{o.flag} is given {len(values)} times: {_shown(values[-1])} counts, not {earlier}")
    return values[-1]


def _shown(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """What argparse itself refuses, in the words of the other errors."""
        message = re.sub(r"expected (one|at least one) argument", "it needs a value", message)
        message = re.sub(r"expected (\d+) arguments", r"it needs \1 values", message)
        message = message.replace("ignored explicit argument", "it is a switch and takes no value, so not")
        message = message.removeprefix("argument ")
        if message.startswith("unrecognized arguments: "):
            message = f"unexpected {message.removeprefix('unrecognized arguments: ')!r}: it belongs to no flag"
        raise UsageError(f"{message}; see {self.prog} --help.")


class _Formatter(argparse.HelpFormatter):
    """Argparse's, as wide as the terminal up to a width that reads well."""

    def __init__(self, prog: str, *_: Any, **__: Any) -> None:
        width = min(shutil.get_terminal_size((MAX_HELP_WIDTH, 24)).columns, MAX_HELP_WIDTH)
        super().__init__(prog, max_help_position=40, width=width)


def _argparser(cls: type, prog: str) -> _Parser:
    positionals = "".join(f" {o.flag}{'...' if o.many else ''}" for o in options(cls) if o.metadata["positional"])
    parser = _Parser(
        prog, usage=f"{prog}{positionals} [flags]", allow_abbrev=False, add_help=False, formatter_class=_Formatter
    )
    for heading, group_options in _groups(cls):
        group = parser.add_argument_group(heading)
        for o in group_options:
            _add(group, o)
    general = parser.add_argument_group("Configuration")
    general.add_argument("-h", "--help", action="help", help="show this help, and stop")
    general.add_argument("--config", metavar="FILE", help="YAML with the same names; the command line wins")
    general.add_argument(
        "--print-config", action="store_true", help="show every value and where it came from, and stop"
    )
    return parser


def _groups(cls: type) -> Iterator[tuple[str, list[Option]]]:
    """Headings with their options; sections that `cls.help_sections` leaves out keep their flags unlisted."""
    shown: frozenset[str] | None = getattr(cls, "help_sections", None)
    groups: dict[str, list[Option]] = {}
    for o in options(cls):
        listed = shown is None or not o.path or o.path[-1] in shown
        groups.setdefault(o.heading if listed else "", []).append(o)
    yield from groups.items()


def _add(group: argparse._ArgumentGroup, o: Option) -> None:
    arguments: dict[str, Any] = {"help": _help(o, group.title or ""), "default": None}
    if o.kind is bool and not o.many:
        group.add_argument(o.flag, dest=o.name, action="store_const", const=True, **arguments)
        return
    arguments["metavar"] = _metavar(o)
    if o.metadata["positional"]:
        # Appended like flags, so that every value is a list of the times it was given.
        group.add_argument(o.name, action="append", nargs="*" if o.many else "?", **arguments)
        return
    count = o.metadata["nargs"]
    group.add_argument(o.flag, dest=o.name, action="append", nargs=count if o.many else None, **arguments)


def _metavar(o: Option) -> str:
    if o.metadata["metavar"]:
        return str(o.metadata["metavar"])
    if o.metadata["choices"] is not None:
        return "|".join(str(choice) for choice in o.metadata["choices"])
    if o.metadata["positional"]:
        return o.name.upper()
    return {int: "N", float: "X", str: "TEXT"}.get(o.kind, "TEXT")


def _help(o: Option, heading: str) -> str:
    if not heading:
        return argparse.SUPPRESS
    parts = [o.metadata["help"].replace("%", "%%")]
    if o.default not in (None, False) and not (o.many and not o.default):
        parts.append(f"(default: {_shown(o.default)})".replace("%", "%%"))
    if o.metadata["aliases"]:
        parts.append(f"(also {', '.join(o.metadata['aliases'])})")
    return " ".join(parts)
