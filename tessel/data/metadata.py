"""What tessel notes beside an .idx: which tokenizer made the data, and with which options.

A file `PREFIX.meta.json`, which other tools ignore and nothing here needs: data without one is
read as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tessel.runtime.files import atomic_write
from tessel.runtime.log import warn_once

FORMAT = 1


def metadata_path(prefix: str | Path) -> Path:
    """Where the metadata of the dataset `prefix` lies."""
    return Path(f"{prefix}.meta.json")


def write_metadata(prefix: str | Path, values: dict[str, Any]) -> None:
    """Write `values` (JSON) for the dataset `prefix`."""
    with atomic_write(metadata_path(prefix)) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT} | values, indent=1, ensure_ascii=False), encoding="utf-8")


def read_metadata(prefix: str | Path) -> dict[str, Any] | None:
    """The metadata of the dataset `prefix`; None, and a warning if it is damaged, where there is none."""
    path = metadata_path(prefix)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if isinstance(values, dict) and values.get("format") == FORMAT:
        return values
    warn_once(f"{path} cannot be read and is ignored")
    return None
