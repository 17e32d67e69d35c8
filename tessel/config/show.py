"""A resolved configuration as text: YAML that can be given back, with where each value came from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tessel.config.schema import options, read

PLAIN_TEXT = re.compile(r"[A-Za-z_./~][A-Za-z0-9_./~+-]*")
WORDS_OF_YAML = {"true", "false", "yes", "no", "on", "off", "null", "y", "n", "~"}
SOURCE_COLUMN = 48


def format_config(config: object, provenance: Mapping[str, str]) -> str:
    """Every value by section, one a line, with its source as a comment.

    Sources are those of `Parsed.provenance`; a field that it lacks counts as a default.
    """
    lines: list[str] = []
    section: str | None = None
    cls: type = type(config)
    for o in sorted(options(cls), key=lambda o: bool(o.path)):
        here = o.path[-1] if o.path else None
        if here != section:
            section = here
            lines.append(f"{section}:")
        entry = f"{'  ' if section else ''}{o.name}: {_scalar(read(config, o))}"
        lines.append(f"{entry:<{SOURCE_COLUMN}} # {provenance.get(o.name, 'default')}")
    return "\n".join(lines)


def mark_changes(before: object, after: object, provenance: Mapping[str, str], source: str) -> dict[str, str]:
    """`provenance` with `source` for every field whose value differs between two configurations."""
    cls: type = type(after)
    changed = [o.name for o in options(cls) if read(before, o) != read(after, o)]
    return {**provenance, **dict.fromkeys(changed, source)}


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    if isinstance(value, str):
        plain = PLAIN_TEXT.fullmatch(value) and value.lower() not in WORDS_OF_YAML
        return value if plain else json.dumps(value, ensure_ascii=False)
    return repr(value)
