"""The command line of another suite's program -> commands of tessel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from tessel.config.nearest import nearest
from tessel.drop_in import conversion, pai, training, use
from tessel.drop_in.arguments import Arguments, Given
from tessel.drop_in.commands import Command, Translation
from tessel.drop_in.flags import OF_TRAINING, Kind, judge
from tessel.drop_in.rewrites import REWRITES
from tessel.errors import UsageError

SUITES = ("mindspeed", "modellink", "pai")
_Program = Callable[[str, Arguments], Translation]


@dataclass(frozen=True)
class Remark:
    """Flags without a place in a command, and why."""

    kind: Kind
    flags: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {' '.join(self.flags)} ({self.text})" if self.text else f"{self.kind}: {self.flags[0]}"


def _preprocessing(suite: str, arguments: Arguments) -> Translation:
    del suite
    remarks = []
    if not arguments.has("--append-eod") and not arguments.has("--handler-name"):
        remarks.append(
            "documents get no end, as in the suite: they run into one another. --append-eod sets one after each"
        )
    return Translation((Command("preprocess", arguments),), tuple(remarks))


def _compatible(tool: str) -> _Program:
    """A tool of Pai-Megatron-Patch whose bytes `tessel preprocess` can write."""

    def program(suite: str, arguments: Arguments) -> Translation:
        del suite
        return Translation((Command("preprocess", arguments.plus("--compatible", tool)),))

    return program


PROGRAMS: dict[str, _Program] = {
    "pretrain_gpt.py": training.training,
    "posttrain_gpt.py": training.training,
    "pretrain_qwen.py": training.training,
    "pretrain_qwen2_moe.py": training.training,
    "convert_ckpt.py": conversion.first_converter,
    "convert_ckpt_v2.py": conversion.second_converter,
    "convert_param.py": conversion.second_converter,
    "convert.py": conversion.distributed_converter,
    "preprocess_data.py": _preprocessing,
    "preprocess_data_megatron.py": _compatible("pai"),
    "build_idxmap_sft_dataset.py": _compatible("pai-sft"),
    "inference.py": use.generation,
    "evaluation.py": use.evaluation,
    "lm_eval": use.harness,
}
"""Name of a program -> what tessel does in its place."""

SCRIPTS: dict[str, Callable[[Sequence[str]], Translation]] = {
    "run_mcore_qwen.sh": pai.run_mcore_qwen,
    "run_mcore_qwen3.sh": pai.run_mcore_qwen3,
    "run_8xH20.sh": pai.run_8xh20,
    "run_8xH20_qwen3.sh": pai.run_8xh20_qwen3,
    "hf2mcore_qwen2.5_convertor.sh": pai.hf2mcore_convertor,
}
"""The same of Pai's scripts, whose arguments have no flags; two are of one name there."""


def translate(suite: str, program: str, argv: list[str]) -> Translation:
    """What tessel does in place of `program ARGV` of a suite.

    Flags that do nothing are left for the verb to speak of, and so are those that it refuses.

    Raises:
        UsageError: no such suite or program, or a command line that cannot be meant.
    """
    if suite not in SUITES:
        raise UsageError(f"unknown suite {suite}: it must be one of {', '.join(SUITES)}.")
    name = PurePath(program).name
    if name in SCRIPTS:
        return SCRIPTS[name](argv)
    if name not in PROGRAMS:
        near = nearest(name, PROGRAMS) or list(PROGRAMS)
        raise UsageError(f"tessel has nothing in place of {program}: it knows {', '.join(near)}.")
    translated = PROGRAMS[name](suite, Arguments.read(argv))
    remarks = list(translated.remarks)
    idle = sorted(
        {given.flag for command in translated.commands for given in command.arguments.given if _idle(command, given)}
    )
    if idle:
        remarks.append(f"without effect: {' '.join(idle)} ({OF_TRAINING})")
    return Translation(tuple(_rewritten(command) for command in translated.commands), tuple(remarks))


def tidy(command: Command) -> tuple[Command, list[Remark]]:
    """`command` with the flags alone that its verb acts on, and what became of the others."""
    kept, others = [], dict[tuple[Kind, str], list[str]]()
    for given in command.arguments.given:
        row = judge(command.verb, given.flag, given.values) if given.flag else None
        if row is None or row.kind in (Kind.SUPPORTED, Kind.ALIAS):
            kept.append(given)
        else:
            others.setdefault((row.kind, row.text), []).append(given.flag)
    remarks = [Remark(kind, tuple(dict.fromkeys(flags)), text) for (kind, text), flags in others.items()]
    return Command(command.verb, Arguments(tuple(kept))), remarks


def _rewritten(command: Command) -> Command:
    """`command` with tessel's flags in place of those that mean one."""
    table = REWRITES.get(command.verb, {})
    words: list[str] = []
    for given in command.arguments.given:
        if given.flag in table:
            words += table[given.flag].result(given.values)
        elif not _idle(command, given):
            words += given.words
    return Command(command.verb, Arguments.read(words))


def _idle(command: Command, given: Given) -> bool:
    """Whether a flag is of training, and the command is not: its verb does not know it."""
    return bool(given.flag) and judge(command.verb, given.flag).text == OF_TRAINING
