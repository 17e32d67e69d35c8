"""docs/SUPPORT.md from reports: what passed on which device, and what has not been run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TITLES = {
    "kernels": "Kernels",
    "collectives": "Collectives",
    "memory": "Memory",
    "training": "Training",
    "speed": "Speed",
}
_HEAD = """# Support

What was run on which hardware, filled in by `tessel selftest --output FILE` on it and printed by
`tessel selftest --markdown FILE ...`. Nothing here is written by hand: a cell says that a check passed on the device
named above it, or that it has not been run on such hardware. To fill a column, run `tessel selftest --output
selftest.json` and send the file.

"""
NOT_YET = "not yet run on hardware"


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """The document, from reports; of two reports of one kind of device, the later one is taken."""
    from tessel.runtime.device import KINDS

    by_kind = {str(report["device"]): report for report in reports}
    lines = [_HEAD.rstrip(), ""]
    for kind, name in KINDS.items():
        lines.append(f"- {name}: {_described(by_kind[kind]) if kind in by_kind else NOT_YET}")
    for part, title in _TITLES.items():
        if part != "speed":
            lines += ["", f"## {title}", "", *_table(part, KINDS, by_kind)]
    for kind, report in by_kind.items():
        rows = [row for row in report["checks"] if row["part"] == "speed"]
        if rows:
            lines += ["", f"## Speed on {KINDS[kind]}", "", "| shape | measured |", "|---|---|"]
            lines += [f"| {row['name']} | {row['detail']} |" for row in rows]
    return "\n".join(lines) + "\n"


def _described(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    devices = f"{report['num_devices']} x " if report.get("num_devices", 1) > 1 else ""
    return (
        f"{devices}{report['device_name']}, tessel {report['tessel']}, {versions}, Python {report['python']}, "
        f"{report['date']}, {report['seconds']:.0f} s"
    )


def _table(part: str, kinds: Mapping[str, str], by_kind: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(row["name"] for report in by_kind.values() for row in report["checks"] if row["part"] == part)
    lines = [f"| | {' | '.join(kinds.values())} |", f"|---|{'---|' * len(kinds)}"]
    for name in names:
        cells = [_cell(by_kind.get(kind), part, name) for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(report: Mapping[str, Any] | None, part: str, name: str) -> str:
    if report is None:
        return NOT_YET
    rows = [row for row in report["checks"] if row["part"] == part and row["name"] == name]
    if not rows:
        return NOT_YET
    row = rows[0]
    torch_version = report["versions"]["torch"]
    if row["status"] == "skipped":
        return f"- ({row['detail']})"
    if row["status"] == "failed":
        return f"**failed**: {row['detail']}"
    return f"passed on {report['device_name']} with torch {torch_version}: {row['detail']}"
