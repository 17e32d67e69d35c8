"""A command line of tessel in this process, and what it printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tessel.cli import main


class Said(NamedTuple):
    """What a command did: its exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def tessel(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`tessel("convert", "--load", folder, ...)`."""

    def run(*arguments: Any) -> Said:
        status = main([str(argument) for argument in arguments])
        return Said(status, *capsys.readouterr())

    return run
