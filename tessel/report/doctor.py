"""`tessel doctor`: what this machine has, and what is missing for which verb."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tessel import __version__
from tessel.config.verbs import DoctorConfig
from tessel.errors import TesselError
from tessel.report.facts import Report, bytes_text
from tessel.runtime.versions import untested

TRAINING = ("pretrain", "demo")
MODEL_VERBS = ("pretrain", "generate", "demo")
TEXT_VERBS = ("preprocess", "samples", *MODEL_VERBS)
LEAST_DISK_BYTES = 2 * 10**9


class Need(NamedTuple):
    """A package, and what cannot be done without it."""

    package: str
    module: str
    verbs: tuple[str, ...]
    what: str
    """What it gives."""
    extra: str | None = None


NEEDS = (
    Need("torch", "torch", MODEL_VERBS, "training and generating"),
    Need("transformers", "transformers", TEXT_VERBS, "tokenizers of Hugging Face folders"),
    Need("tokenizers", "tokenizers", TEXT_VERBS, "tokenizers of Hugging Face folders"),
    Need("safetensors", "safetensors", (*MODEL_VERBS, "inspect"), "weights of Hugging Face folders"),
    Need("numpy", "numpy", (*TEXT_VERBS, "inspect"), "datasets"),
    Need("pyyaml", "yaml", ("pretrain",), "--config FILE"),
    Need("jinja2", "jinja2", ("generate",), "chat templates"),
    Need("matplotlib", "matplotlib", ("plot", "demo"), "pictures"),
    Need("rich", "rich", (*TRAINING, "plan"), "progress displays and tables"),
    Need("tensorboard", "tensorboard", ("pretrain",), "--tensorboard-dir", "tensorboard"),
    Need("wandb", "wandb", ("pretrain",), "--wandb-project", "wandb"),
    Need("swanlab", "swanlab", ("pretrain",), "--swanlab-project", "swanlab"),
    Need("mindspore", "mindspore", ("pretrain",), "--ai-framework mindspore", "mindspore"),
)


def doctor(cfg: DoctorConfig) -> None:
    """`tessel doctor`: print what was found. Finding something missing is an answer, not an error."""
    examine().print(cfg.json)


def examine() -> Report:
    """Look at this machine. Every part of it is looked at, whatever else is missing."""
    versions = {need.package: _version(need) for need in NEEDS}
    data: dict[str, Any] = {
        "tessel": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cpu": _cpu(),
        "memory": _memory(),
        "disk": {"folder": os.getcwd(), "free_bytes": shutil.disk_usage(".").free},
        "accelerator": _accelerator() if versions["torch"] is not None else None,
        "vendor": _vendor() if versions["torch"] is not None else None,
    }
    missing = [need for need in NEEDS if versions[need.package] is None]
    data["missing"] = [
        {"package": need.package, "verbs": list(need.verbs), "for": need.what, "install": _install(need)}
        for need in missing
    ]
    data["warnings"] = _warnings(data)
    return Report(f"tessel {__version__}", _facts(data), data, _tail(data, missing))


def _version(need: Need) -> str | None:
    if importlib.util.find_spec(need.module) is None:
        return None
    try:
        return metadata.version(need.package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cores": os.cpu_count(), "usable_cores": usable}
    if importlib.util.find_spec("torch") is not None:
        import torch

        found["torch_threads"] = torch.get_num_threads()
    return found


def _memory() -> dict[str, int] | None:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
    if any(name not in os.sysconf_names for name in names):
        return None
    page_bytes, num_pages, num_free = (os.sysconf(name) for name in names)
    return {"total_bytes": page_bytes * num_pages, "free_bytes": _available_bytes() or page_bytes * num_free}


def _available_bytes() -> int | None:
    """What Linux could give without swapping: free pages and those of its file cache."""
    table = Path("/proc/meminfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _vendor() -> dict[str, Any] | None:
    """Versions of the software that a vendor's devices need beside torch, and what is wrong with it."""
    from tessel.runtime import device as devices

    report = devices.vendor_report()
    return None if report is None else {"installed": report[0], "problems": report[1]}


def _accelerator() -> dict[str, Any]:
    """The device that `--device auto` takes, or why it cannot be taken."""
    import torch

    from tessel.runtime import device as devices

    try:
        device = devices.resolve("auto")
    except TesselError as error:
        return {"device": "none", "description": str(error), "num_devices": 0,
                "flash_attention": None, "flash_attention_reason": "no device"}  # fmt: skip
    available, reason = devices.flash_attention_available(device)
    return {
        "device": str(device),
        "description": devices.describe(device),
        "num_devices": 0 if device.type == "cpu" else torch.accelerator.device_count(),
        "flash_attention": reason if available else None,
        "flash_attention_reason": None if available else reason,
    }


def _warnings(data: dict[str, Any]) -> list[str]:
    warnings: list[str] = []
    torch_version = data["packages"]["torch"]
    if torch_version is not None:
        major, minor = (int(part) for part in data["python"].split(".")[:2])
        warnings += untested((major, minor), torch_version)
    if data["disk"]["free_bytes"] < LEAST_DISK_BYTES:
        warnings.append("Less than 2 GB of disk are free here: a checkpoint may not fit; use --save on another disk.")
    cpu = data["cpu"]
    if cpu.get("torch_threads", 0) > (cpu["usable_cores"] or 1):
        warnings.append(
            f"torch would use {cpu['torch_threads']} threads on {cpu['usable_cores']} usable cores: "
            "set OMP_NUM_THREADS to their number."
        )
    return warnings


def _facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory, disk = data["cpu"], data["memory"], data["disk"]
    threads = f", {cpu['torch_threads']} torch threads" if "torch_threads" in cpu else ""
    facts = [
        ("python", f"{data['python']} on {data['platform']}"),
        *((name, version) for name, version in data["packages"].items() if version is not None),
        ("cores", f"{cpu['usable_cores']} of {cpu['cores']}{threads}"),
    ]
    if memory is not None:
        facts.append(("memory", f"{bytes_text(memory['free_bytes'])} free of {bytes_text(memory['total_bytes'])}"))
    facts.append(("disk", f"{bytes_text(disk['free_bytes'])} free in {disk['folder']}"))
    accelerator = data["accelerator"]
    if accelerator is not None:
        facts.append(("device", accelerator["description"]))
        flash = accelerator["flash_attention"] or f"no: {accelerator['flash_attention_reason']}"
        facts.append(("FlashAttention", flash))
    if data["vendor"] is not None:
        facts += list(data["vendor"]["installed"].items())
    return facts


def _tail(data: dict[str, Any], missing: Sequence[Need]) -> list[str]:
    required = [need for need in missing if need.extra is None]
    lines = [f"warning: {sentence}" for sentence in data["warnings"]]
    lines += [f"device: {sentence}" for sentence in (data["vendor"] or {"problems": []})["problems"]]
    lines += [
        f"missing: {need.package}, which {', '.join(need.verbs)} need{'s' if len(need.verbs) == 1 else ''} "
        f"({need.what}): {_install(need)}"
        for need in required
    ]
    lines += [f"optional: {need.package}, for {need.what}: {_install(need)}" for need in missing if need.extra]
    if not required:
        lines.append("Every verb has what it needs.")
    return lines


def _install(need: Need) -> str:
    return f"pip install 'tessel[{need.extra}]'" if need.extra else f"pip install {need.package}"
