"""Runs the commands of a guide of docs/guides, in order, on a machine without devices and without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tessel.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent.parent
GUIDES = REPOSITORY / "docs" / "guides"
# Bash in place of Python: writes down where, with what environment and what it is asked to run, and runs nothing.
# Of the question whether MindSpore is installed it says no.
_RECORDER = """#!/bin/bash
[ "$1" = -c ] && exit 1
number=$(ls "$RECORDED" | wc -l)
{ printf '%s\\0' "$PWD" "$@"; } > "$RECORDED/$number"
env -0 > "$RECORDED.environment"
"""
# accelerate without its own processes: what stands after its flags.
_ACCELERATE = """#!/bin/bash
while [ "$1" != -m ]; do shift; done
exec "$PYTHON" "$@"
"""
_PROGRAM = re.compile(r'main\(\["drop-in", "(\w+)", "([\w.]+)"')


def blocks(name: str) -> list[str]:
    """The `bash` blocks of a guide: commands that need no network."""
    text = (GUIDES / name).read_text(encoding="utf-8")
    return re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@dataclass
class Session:
    """A shell that goes from block to block; programs run in this process, which has loaded torch already."""

    root: Path
    monkeypatch: pytest.MonkeyPatch
    variables: dict[str, str] = field(default_factory=dict)
    """What the user of a small machine sets before the commands."""

    def __post_init__(self) -> None:
        shutil.copytree(REPOSITORY / "drop_in", self.root / "drop_in", ignore=shutil.ignore_patterns("__pycache__"))
        self._folder = self.root
        self._tools = self.root / "tools"
        self._tools.mkdir()
        for name, text in (("python", _RECORDER), ("accelerate", _ACCELERATE)):
            (self._tools / name).write_text(text)
            (self._tools / name).chmod(0o755)
        known = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG")}
        self._environment = known | {
            "PATH": f"{self._tools}:{os.environ['PATH']}",
            "PYTHON": str(self._tools / "python"),
            "RECORDED": str(self.root / "recorded"),
            **self.variables,
        }
        self.monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # for the processes that a run starts

    def run(self, block: str) -> None:
        """A block's commands, and what its programs stand for."""
        recorded, after = self.root / "recorded", self.root / "after"
        shutil.rmtree(recorded, ignore_errors=True)
        recorded.mkdir()
        text = f"set -e\n{block}\npwd > {after}\nenv -0 >> {after}"
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        calls = sorted(recorded.iterdir(), key=lambda path: int(path.name))
        assert calls, f"no program in\n{block}"
        for path in calls:
            folder, *words = path.read_text().split("\0")[:-1]
            self.monkeypatch.chdir(folder)
            assert not main(_command(words)), block
        where, _, rest = after.read_text().partition("\n")
        self._folder = Path(where)
        self._environment = dict(entry.split("=", 1) for entry in rest.split("\0") if "=" in entry)


def _command(words: list[str]) -> list[str]:
    """What Python was asked to run, as arguments of tessel."""
    program, *rest = words
    if program != "-m":
        found = _PROGRAM.search(Path(program).read_text())
        assert found is not None, program
        return ["drop-in", *found.groups(), *rest]
    module, *rest = rest
    return rest if module == "tessel" else ["drop-in", "pai", module, *rest]
