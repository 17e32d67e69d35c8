"""`tessel migrate`: the command and the YAML that stand in place of a suite's shell script."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from tessel.config.nearest import CERTAINTY, nearest
from tessel.config.schema import convert
from tessel.config.verbs import MigrateConfig
from tessel.drop_in.arguments import Arguments
from tessel.drop_in.commands import Command
from tessel.drop_in.flags import Kind, fields, refusal
from tessel.drop_in.shell import Call, calls
from tessel.drop_in.translate import PROGRAMS, tidy, translate
from tessel.errors import TesselError, UsageError

_LAUNCH = ("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port")
_ENVIRONMENT = ("MP_", "MODEL_PARALLEL_ARGS", "WORLD_SIZE", "RANK", "KUBERNETES_", "MASTER_")


@dataclass(frozen=True)
class Migrated:
    """What stands in place of one program of a script."""

    line: int
    program: str
    commands: tuple[Command, ...] = ()
    remarks: tuple[str, ...] = ()
    dropped: tuple[Kind, ...] = field(default=())
    """What became of the flags that have no place."""


def migrate(cfg: MigrateConfig) -> None:
    """Print what stands in place of each program that the script calls.

    Raises:
        TesselError: the file cannot be read, or calls no program of a suite.
    """
    script, *arguments = cfg.script
    try:
        text = Path(script).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise TesselError(f"{script} cannot be read: {error.strerror}.") from error
    found, remarks = migrated(text, tuple(arguments), cfg.suite or _suite_of(script, text))
    if not found:
        raise TesselError(f"{script} calls no program that tessel stands for: {', '.join(PROGRAMS)}.")
    for remark in remarks:
        print(f"# {remark}")
    for one in found:
        print("\n".join(_shown(one)))


def migrated(text: str, arguments: tuple[str, ...], suite: str) -> tuple[list[Migrated], list[str]]:
    """What stands in place of each program that a script calls, and remarks on the script."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    found, remarks = calls(text, arguments, environment)
    return [one for call in found if (one := _migrated(call, suite)) is not None], remarks


def _migrated(call: Call, suite: str) -> Migrated | None:
    remarks: list[str] = []
    position = next(index for index, word in enumerate(call.words) if word.endswith(".py"))
    program = call.words[position]
    name = PurePath(program).name
    if name not in PROGRAMS:
        near = nearest(name, PROGRAMS, CERTAINTY)
        if not near:
            return None
        remarks.append(f"{name} is taken for {near[0]}")
        name = near[0]
    launch, unsaid = _said(Arguments.read(call.words[1:position]))
    try:
        translated = translate(suite, name, list(call.words[position + 1 :]))
    except UsageError as error:
        return Migrated(call.line, program, (), (str(error),))
    commands, dropped = [], list[Kind]()
    remarks += [*translated.remarks, *unsaid]
    for command in translated.commands:
        command, said = tidy(command)
        command = Command(command.verb, _launched(launch, command.arguments))
        remarks += [str(remark) for remark in said]
        dropped += [remark.kind for remark in said]
        problem = refusal(command.verb, _addressed(command.arguments).argv)
        remarks += [f"tessel {command.verb} would say: {problem}"] if problem else []
        commands.append(command)
    return Migrated(call.line, program, tuple(commands), tuple(dict.fromkeys(remarks)), tuple(dropped))


def _said(launch: Arguments) -> tuple[Arguments, list[str]]:
    """`launch` without numbers that only the running script, or its user, can say; and a remark on each."""
    remarks = []
    for flag in ("--nproc-per-node", "--master-port"):
        value = launch.value(flag)
        if value is not None and not value.isdecimal():
            launch = launch.without(flag)
            remarks.append(f"{flag} is still to be said: the script has {value}")
    return launch, remarks


def _addressed(arguments: Arguments) -> Arguments:
    """`arguments` with the address of a machine where a script has this one's, which its user changes."""
    if arguments.value("--nnodes") in (None, "1"):
        return arguments
    return arguments.without("--master-addr").plus("--master-addr", "machine-0")


def _launched(launch: Arguments, arguments: Arguments) -> Arguments:
    """With what torchrun was told: on one machine the number of processes alone."""
    if launch.value("--nproc-per-node") is None:
        return arguments
    names = _LAUNCH[:1] if launch.value("--nnodes") in (None, "1") else _LAUNCH
    words = [word for name in names for word in (name, launch.value(name)) if launch.value(name) is not None]
    return Arguments.read([str(word) for word in words]).plus(*arguments.argv)


def _suite_of(script: str, text: str) -> str:
    """The suite that a script is of, by what it calls and where it lies."""
    if "patch-tokenizer-type" in text or "MEGATRON_PATCH" in text:
        return "pai"
    return "modellink" if "modellink" in str(Path(script).absolute()).lower() or "--loader" in text else "mindspeed"


def _shown(one: Migrated) -> Iterator[str]:
    yield f"# line {one.line}: {one.program}"
    for remark in one.remarks:
        yield f"#   {remark}"
    for command in one.commands:
        lines = [" ".join(map(shlex.quote, given.words)) for given in command.arguments.given]
        yield " \\\n    ".join([f"tessel {command.verb}", *lines])
        yield f"\n# the same as a file, for tessel {command.verb} --config FILE"
        yield yaml.safe_dump(_as_file(command), sort_keys=False, allow_unicode=True)


def _as_file(command: Command) -> dict[str, Any]:
    """The fields of a command as YAML has them."""
    known = fields(command.verb)
    values: dict[str, Any] = {}
    for given in command.arguments.given:
        option = known.get(given.flag)
        if option is None:
            continue
        if not given.values:
            values[option.name] = True
            continue
        try:
            value = convert(option, list(given.values) if option.many else given.values[0], given.flag)
        except UsageError:
            value = " ".join(given.values)  # the command's own remark says what is wrong with it
        values[option.name] = list(value) if isinstance(value, tuple) else value
    return values
