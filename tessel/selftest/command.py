"""The verb: what is tested in which order, and what the reader gets."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tessel import __version__
from tessel.config.selftest import SelftestConfig
from tessel.errors import TesselError
from tessel.runtime.files import atomic_write, require_writable
from tessel.selftest.result import Check
from tessel.selftest.support import markdown

_MARKS = {"passed": "ok  ", "failed": "FAIL", "skipped": "-   "}


def selftest(cfg: SelftestConfig) -> int:
    """`tessel selftest`. Returns the exit status: 1 where a check failed.

    Raises:
        TesselError: there is no such device, or a report cannot be read or written.
    """
    if cfg.markdown:
        print(markdown([read_report(Path(file)) for file in cfg.markdown]), end="")
        return 0
    if cfg.output is not None:
        require_writable(Path(cfg.output).parent, "--output")
    from tessel.runtime import device as devices

    device = devices.resolve(cfg.device)
    name, versions = devices.name_and_versions(device)
    print(f"tessel {__version__} selftest on {devices.describe(device)}")
    print(f"  {', '.join(f'{package} {version}' for package, version in versions.items())}")
    start_s, part, found = time.perf_counter(), None, []
    for check in _checks(cfg, device):
        if check.part != part:
            part = check.part
            print(f"\n{part}")
        found.append(check)
        print(_line(check), flush=True)
    seconds = time.perf_counter() - start_s
    print(f"\n{_summary(found)} in {seconds:.0f} s")
    if cfg.output is not None:
        report = {
            "tessel": __version__,
            "date": datetime.now(UTC).date().isoformat(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device.type,
            "device_name": name,
            "num_devices": devices.count(device),
            "versions": versions,
            "seconds": round(seconds, 1),
            "checks": [asdict(check) for check in found],
        }
        with atomic_write(Path(cfg.output)) as temporary:
            temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"Written: {cfg.output}")
    return int(any(check.status == "failed" for check in found))


def _checks(cfg: SelftestConfig, device: Any) -> Iterator[Check]:
    from tessel.selftest import collectives, kernels, memory, speed, training

    for part in cfg.parts:
        match part:
            case "kernels":
                yield from kernels.run(device)
            case "collectives":
                yield from collectives.run(device)
            case "memory":
                yield from memory.run(device)
            case "training":
                yield from training.run(device)
            case "speed":
                yield from speed.run(device, cfg)


def _line(check: Check) -> str:
    text = f"  {_MARKS[check.status]} {check.name}: {check.detail}"
    width = max(shutil.get_terminal_size((120, 24)).columns, 80)
    return text if check.status == "failed" or len(text) <= width else f"{text[: width - 4]} ..."


def _summary(found: Sequence[Check]) -> str:
    counts = Counter(check.status for check in found)
    words = [f"{counts[status]} {status}" for status in ("passed", "failed", "skipped") if counts[status]]
    return ", ".join(words) or "nothing was tested"


def read_report(file: Path) -> dict[str, Any]:
    """A report that `--output` wrote.

    Raises:
        TesselError: it is none.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        wanted = {"device", "device_name", "versions", "checks"}
    except (OSError, ValueError) as error:
        raise TesselError(f"--markdown {file}: it cannot be read as JSON ({error}).") from error
    if not isinstance(report, dict) or not wanted <= report.keys():
        raise TesselError(f"--markdown {file}: it is no report; `tessel selftest --output FILE` writes one.")
    return report
