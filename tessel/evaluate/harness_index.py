"""An index of lm-evaluation-harness's tasks: of what is asked for, where that can be told without reading all of them.

The harness parses the YAML files of all its tasks, some 14,000, which takes half a minute in every process. To search
their text for a name takes half a second, and then one or two folders are parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks import __file__ as _PACKAGE

_NAME = re.compile(rb"""^["']?(?:task|group)["']?:[ \t]*["']?([^\s"'#\[\]]+)""", re.MULTILINE)


def index_of(names: Sequence[str], root: Path | None = None) -> TaskManager:
    """A manager that knows at least `names` and what they consist of. `root`: where the tasks are, for tests.

    It is that of all tasks where a name is a pattern, a tag (whose tasks may be anywhere), or not found.
    """
    root = root or Path(_PACKAGE).parent
    places = _places(root)
    folders: list[Path] = []
    wanted = set(names)
    while new := sorted({places[name] for name in wanted if name in places} - set(folders)):
        folders += new
        manager = TaskManager(include_defaults=False, include_path=list(folders))
        wanted = {child for name in names for child in _missing(name, manager.task_index)}
        if not wanted:
            return manager
    return TaskManager(include_defaults=False, include_path=root)


def _places(root: Path) -> dict[str, Path]:
    """Names that tasks and groups have in their files -> the folder of the harness that they are in."""
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*/**/*.yaml")):
        folder = root / path.relative_to(root).parts[0]
        for name in _NAME.findall(path.read_bytes()):
            found.setdefault(name.decode(), folder)
    return found


def _missing(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """Names that a task, or a group down to its last member, refers to and `index` does not have."""
    entry = index.get(name)
    if entry is None:
        yield name
        return
    members = (entry.cfg or {}).get("task")
    for member in members if isinstance(members, list) else []:
        child = member if isinstance(member, str) else member.get("group", member.get("task"))
        if isinstance(child, str):
            yield from _missing(child, index)
