"""`tessel drop-in`: a program of another suite, done by tessel's verbs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tessel.drop_in.devices import placed
from tessel.drop_in.translate import PROGRAMS, SCRIPTS, translate
from tessel.errors import UsageError

Verb = Callable[[list[str]], None]

_HELP = """usage: tessel drop-in SUITE PROGRAM ARGUMENTS

SUITE is mindspeed, modellink or pai. PROGRAM is one of its programs, such as pretrain_gpt.py, and ARGUMENTS are what
that takes. docs/FLAGS.md, or tessel flags SUITE, says what becomes of each flag. Programs:"""


def run(argv: Sequence[str], verbs: Mapping[str, Verb], note: Callable[..., None]) -> None:
    """Do what `SUITE PROGRAM ARGUMENTS` would, by `verbs`; remarks are told by `note` before.

    Raises:
        UsageError: suite or program are missing or unknown, or a command line that cannot be meant.
        SystemExit: processes that a verb started have failed.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(_HELP, ", ".join([*PROGRAMS, *SCRIPTS]))
        return
    if len(argv) < 2 or argv[0].startswith("-"):
        raise UsageError("tessel drop-in needs SUITE PROGRAM ARGUMENTS, such as mindspeed pretrain_gpt.py --lr 1e-5.")
    suite, program, *arguments = argv
    translated = translate(suite, program, arguments)
    commands, remarks = [], list(translated.remarks)
    for command in translated.commands:
        command, said = placed(command)
        commands.append(command)
        remarks += said
    note(*dict.fromkeys(remarks))
    for command in commands:
        try:
            verbs[command.verb](list(command.arguments.argv))
        except SystemExit as ended:  # of processes that were started: the next command follows a success
            if ended.code:
                raise
