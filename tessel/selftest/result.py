"""What a check found, and how each is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tessel.errors import TesselError

# What a device's software raises where it lacks something, or has it in another form.
_FINDINGS = (TesselError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError, OSError)

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line of the report. `detail`: figures of one that passed, and else the reason."""

    part: str
    name: str
    status: Status
    detail: str
    seconds: float = 0.0


class SkippedError(Exception):
    """A check that has nothing to look at here; its text says why."""


class WrongError(Exception):
    """A check that found something wrong; its text says what."""


def check(part: str, name: str, body: Callable[[], str]) -> Check:
    """Run `body`, which returns what it measured.

    An operation that a device refuses is a finding like a wrong number: the report goes on with the next check.
    """
    start_s = time.perf_counter()
    status: Status = "passed"
    try:
        detail = body()
    except SkippedError as reason:
        status, detail = "skipped", str(reason)
    except WrongError as found:
        status, detail = "failed", str(found)
    except _FINDINGS as error:
        status, detail = "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return Check(part, name, status, detail, round(time.perf_counter() - start_s, 3))
