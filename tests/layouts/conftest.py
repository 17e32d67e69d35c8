"""The runs of one process that layouts are compared with, and the table of how far they are from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


DEVIATION = "deviation"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->"
HEAD = "| layout | processes | trains | loss | gradient norm | weights within 1e-5 |\n|---|---|---|---|---|---|\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the table goes, beside the terminal."""
    parser.addoption("--layouts-table", metavar="FILE", help="write the table of layouts into this document")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The largest deviation of each layout, in the order of the list."""
    from tests.layouts.layouts import CASES

    rows = dict(_deviations(terminalreporter))
    table = "".join(rows[case.name] for case in CASES if case.name in rows)
    if not table:
        return
    terminalreporter.section("layouts against one process: largest relative deviations")
    terminalreporter.write(HEAD + table)
    file = config.getoption("--layouts-table")
    if file:
        path = Path(str(file))
        before, _, rest = path.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        path.write_text(before + BEGIN + HEAD + table + END + after)


def _deviations(terminalreporter: pytest.TerminalReporter) -> Iterator[tuple[str, str]]:
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                yield from (value for key, value in report.user_properties if key == DEVIATION)
