"""docs/SUPPORT.md from reports: what passed on which device, and what has not been run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Words:
    """A language of the short table: what was checked, by part, and what cells say."""

    parts: Mapping[str, str]
    passed: str
    failed: str
    not_yet: str


ENGLISH = Words(
    {
        "kernels": "kernels, against plain formulas in fp64",
        "collectives": "collectives, results and gradients",
        "memory": "planned memory, against the measured peak",
        "training": "20 steps as on the CPU; save and resume, bitwise",
    },
    "passed on {device} with {versions}",
    "**failed** on {device} with {versions}",
    NOT_YET,
)
CHINESE = Words(
    {
        "kernels": "算子，对照 fp64 朴素公式",
        "collectives": "集合通信的结果与梯度",
        "memory": "规划的内存，对照实测峰值",
        "training": "20 步训练与 CPU 一致；保存后续训逐位一致",
    },
    "在 {device} 上通过（{versions}）",
    "在 {device} 上**未通过**（{versions}）",
    "尚未在硬件上运行",
)


def summary(reports: Sequence[Mapping[str, Any]], words: Words) -> list[str]:
    """A table of a row for each part: whether all of its checks passed on a kind of device. It is README's table."""
    from tessel.runtime.device import KINDS

    by_kind = {str(report["device"]): report for report in reports}
    lines = [f"| | {' | '.join(KINDS.values())} |", f"|---|{'---|' * len(KINDS)}"]
    for part, title in words.parts.items():
        cells = [_short_cell(by_kind.get(kind), part, words) for kind in KINDS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _short_cell(report: Mapping[str, Any] | None, part: str, words: Words) -> str:
    found = {row["status"] for row in report["checks"] if row["part"] == part} if report is not None else set()
    if report is None or not found & {"passed", "failed"}:
        return words.not_yet
    text = words.failed if "failed" in found else words.passed
    return text.format(device=report["device_name"], versions=_versions(report))


def _versions(report: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in report["versions"].items())


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """The document, from reports; of two reports of one kind of device, the later one is taken."""
    from tessel.runtime.device import KINDS

    by_kind = {str(report["device"]): report for report in reports}
    lines = [_HEAD.rstrip(), ""]
    for kind, name in KINDS.items():
        lines.append(f"- {name}: {_described(by_kind[kind]) if kind in by_kind else NOT_YET}")
    lines += ["", *summary(reports, ENGLISH)]
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
    devices = f"{report['num_devices']} x " if report.get("num_devices", 1) > 1 else ""
    return (
        f"{devices}{report['device_name']}, tessel {report['tessel']}, {_versions(report)}, Python {report['python']}, "
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
