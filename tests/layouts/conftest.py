"""The runs of one process that layouts are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layouts.harness import Outcome, read, train
from tests.layouts.layouts import arguments

Reference = Callable[[str, str], Outcome]


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where data, models and runs lie."""
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="session")
def reference(work: Path) -> Reference:
    """The run of one process, once for each family and variant."""
    known: dict[tuple[str, str], Outcome] = {}

    def of(family: str, variant: str) -> Outcome:
        if (family, variant) not in known:
            save = work / f"one-{family}-{variant}"
            train(1, arguments("", family, variant, work), save)
            known[family, variant] = read(save, 1)
        return known[family, variant]

    return of
