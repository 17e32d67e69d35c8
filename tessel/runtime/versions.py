"""Which versions tessel was tested with."""

from __future__ import annotations

import sys
from importlib import metadata

from tessel.runtime.log import warn_once

TESTED_PYTHON = ((3, 11), (3, 13))
TESTED_TORCH = ((2, 11), (2, 13))


def untested(python: tuple[int, int], torch_version: str) -> list[str]:
    """One sentence for each of Python and torch whose version lies outside what was tested."""
    found = {"Python": (TESTED_PYTHON, python), "torch": (TESTED_TORCH, _major_minor(torch_version))}
    return [
        f"{name} {_text(version)} is not a version that tessel was tested with: "
        f"it was with {_text(low)} to {_text(high)}, so results may differ or fail."
        for name, ((low, high), version) in found.items()
        if not low <= version <= high
    ]


def check_versions() -> None:
    """Warn once where Python or torch is of a version that was not tested. Does not import torch."""
    for sentence in untested(sys.version_info[:2], metadata.version("torch")):
        warn_once(sentence)


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
