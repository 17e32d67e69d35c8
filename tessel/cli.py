"""The door: `tessel VERB ...`, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from tessel import __version__
from tessel.commands import VERBS
from tessel.config.nearest import nearest
from tessel.config.schema import first_sentence
from tessel.errors import TesselError, UsageError

INTERRUPTED = 130
"""Exit status of a program that SIGINT ended, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, 1 for an error, 2 for a wrong command line.

    An error that the user can mend is one line on stderr. Any other exception is a bug: it leaves
    with its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except TesselError as error:
        for line in str(error).splitlines() or [""]:
            print(f"tessel: error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("tessel: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has left; nothing may be flushed to it when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        print("tessel: this is a bug in tessel; please report the following with the command line", file=sys.stderr)
        raise


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else UsageError.exit_code
    verb, rest = arguments[0], arguments[1:]
    if verb in ("--version", "-V"):
        print(f"tessel {__version__}")
        return 0
    if verb not in VERBS:
        near = nearest(verb, VERBS)
        kind = "flag" if verb.startswith("-") else "verb"
        remedy = f"nearest: {', '.join(near)}" if near else f"the verbs are {', '.join(VERBS)}"
        raise UsageError(f"unknown {kind} {verb}; {remedy}")
    run: Callable[[list[str]], None] = VERBS[verb]
    try:
        run(rest)
        sys.stdout.flush()
    except SystemExit as leaving:
        # --help; a verb that stops early with a status of its own.
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def _overview() -> str:
    width = max(len(verb) for verb in VERBS)
    lines = ["usage: tessel VERB [flags]        (tessel VERB --help lists the flags)", ""]
    lines += [f"  {verb:<{width}}  {first_sentence(run.__doc__ or '')}" for verb, run in VERBS.items()]
    return "\n".join(lines)
