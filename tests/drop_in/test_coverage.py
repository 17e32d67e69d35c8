"""docs/COVERAGE.md: each of the guides' 121 capabilities once, and tests that are there."""

from __future__ import annotations

import re
from pathlib import Path


def test_every_capability_has_its_row(repository: Path) -> None:
    text = (repository / "docs" / "COVERAGE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d[\d, to]*) \|.*\| (.+) \|$", text, re.MULTILINE)
    numbers: list[int] = []
    for cell, tests in rows:
        for part in cell.split(", "):
            first, _, last = part.partition(" to ")
            numbers += range(int(first), int(last or first) + 1)
        folder = ""
        for word in tests.split(", "):
            path = word if word.startswith("tests/") else f"{folder}/{word}"
            assert (repository / path).exists(), path
            folder = path.rpartition("/")[0]
    assert sorted(numbers) == list(range(1, 122))
