"""What an Ascend machine has beside torch's devices: driver, firmware and CANN, its guides' variables, its profiler.

Reads files in the places where Huawei's installers put them. Imports no torch; torch_npu for its profiler, when one
is made.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/usr/local/Ascend")
DEVICE_FILES = "davinci[0-9]*"
_VERSION = re.compile(r"^\s*\"?version\"?\s*[=:]\s*\"?\[?([^\s\"\]]+)", re.IGNORECASE | re.MULTILINE)

# torch -> CANN, as torch_npu's own README has it for the versions that tessel takes; it names none for later ones.
MATCHING = {"2.11": "8.5.0", "2.12": "8.5.0"}
OLDEST_CANN = (8, 5)


@dataclass(frozen=True)
class Part:
    """A piece of the vendor's software: where its version stands, and what puts it into the environment."""

    name: str
    files: tuple[str, ...]
    variable: str | None = None
    scripts: tuple[str, ...] = ()

    def script(self, root: Path) -> Path:
        """What is to be sourced: where it is, or where it would be."""
        found = [root / name for name in self.scripts if (root / name).exists()]
        return found[0] if found else root / self.scripts[0]


PARTS = (
    Part("driver", ("driver/version.info",)),
    Part("firmware", ("firmware/version.info",)),
    Part(
        "CANN toolkit",
        ("ascend-toolkit/latest/*-linux/ascend_toolkit_install.info", "cann/*-linux/ascend_toolkit_install.info",
         "ascend-toolkit/latest/version.cfg"),
        "ASCEND_HOME_PATH",
        ("cann/set_env.sh", "ascend-toolkit/set_env.sh"),
    ),
    Part("kernels", ("ascend-toolkit/latest/opp/version.info", "cann/opp/version.info")),
    Part("nnal", ("nnal/atb/latest/version.info",), "ATB_HOME_PATH", ("nnal/atb/set_env.sh",)),
)  # fmt: skip

# Variables of MindSpeed-LLM's guides -> who reads them on an NPU; None: nobody here does, anywhere.
_CANN, _TORCH_NPU, _HCCL = "CANN reads it", "torch_npu reads it", "HCCL reads it"
VARIABLES: dict[str, str | None] = {
    "ASCEND_RT_VISIBLE_DEVICES": _CANN,
    "ASCEND_LAUNCH_BLOCKING": _TORCH_NPU,
    "ASCEND_SLOG_PRINT_TO_STDOUT": _CANN,
    "HCCL_WHITELIST_DISABLE": _HCCL,
    "HCCL_CONNECT_TIMEOUT": _HCCL,
    "HCCL_SOCKET_IFNAME": _HCCL,
    "HCCL_LOGIC_SUPERPOD_ID": _HCCL,
    "HCCL_DETERMINISTIC": _HCCL,
    "HCCL_ASYNC_ERROR_HANDLING": _TORCH_NPU,
    "TASK_QUEUE_ENABLE": _TORCH_NPU,
    "COMBINED_ENABLE": _TORCH_NPU,
    "PYTORCH_NPU_ALLOC_CONF": _TORCH_NPU,
    "CPU_AFFINITY_CONF": _TORCH_NPU,
    "NPU_ASD_ENABLE": _TORCH_NPU,
    "NPUS_PER_NODE": None,
    "HIGH_AVAILABILITY": None,
}
_INSTEAD = {"NPUS_PER_NODE": "it is --nproc-per-node here", "HIGH_AVAILABILITY": "see --max-restarts"}


def has_devices(devices: Path = Path("/dev")) -> bool:
    """Whether the driver shows an NPU."""
    return any(devices.glob(DEVICE_FILES))


def installed(root: Path = ROOT) -> dict[str, str]:
    """part -> version, of those that are there; `unknown` where the file does not say."""
    found = {}
    for part in PARTS:
        files = [file for pattern in part.files for file in sorted(root.glob(pattern))]
        if files:
            version = _VERSION.search(files[0].read_text(errors="replace"))
            found[part.name] = version[1] if version else "unknown"
    return found


def matching(torch: str) -> str:
    """Which versions belong to a torch, in words."""
    release = torch.partition("+")[0]
    cann = MATCHING.get(".".join(release.split(".")[:2]))
    named = (
        f"CANN {cann}" if cann else "the CANN that torch_npu's README names for it (8.5.0 is for torch 2.11 and 2.12)"
    )
    return f"torch {release}, torch_npu {release}, {named}"


def mismatch(torch_npu: str | None, torch: str) -> str | None:
    """What is wrong with the version of torch_npu (None: it is missing) beside this torch, and what to install."""
    release = torch.partition("+")[0]
    if torch_npu is None:
        return f"torch_npu is missing: pip install torch-npu=={release}"
    if re.match(rf"{re.escape(release)}(\D|$)", torch_npu):
        return None
    return f"torch_npu {torch_npu} is not the one of torch {release}: pip install torch-npu=={release}"


def problems(
    torch_npu: str | None, torch: str, root: Path = ROOT, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """What stands between this machine and a run on its NPUs, each with what to type.

    `torch_npu` is the package's version, None where it is missing.
    """
    there, found = installed(root), []
    for part in PARTS:
        if part.name not in there:
            found.append(f"no {part.name} under {root}: install the one of your CANN version (docs/ASCEND.md)")
        elif part.variable is not None and part.variable not in environment:
            found.append(f"{part.name} {there[part.name]} is not in the environment: source {part.script(root)}")
    plugin = mismatch(torch_npu, torch)
    found += [plugin] if plugin is not None else []
    numbers = re.match(r"(\d+)\.(\d+)", there.get("CANN toolkit", ""))
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST_CANN:
        oldest = ".".join(str(number) for number in OLDEST_CANN)
        found.append(
            f"CANN {there['CANN toolkit']} is older than {oldest}, which torch_npu names for torch 2.11: update it"
        )
    return found


def remarks(is_npu: bool, environment: Mapping[str, str] = os.environ) -> list[str]:
    """A line on the variables of the guides that are set, and do nothing here; none where all do something."""
    idle = [name for name, reader in VARIABLES.items() if name in environment and (reader is None or not is_npu)]
    if not idle:
        return []
    words = [f"{name} ({_INSTEAD[name]})" if name in _INSTEAD else name for name in idle]
    return [f"environment variables without effect here: {', '.join(words)}"]


_LEVELS = {"level_none": "Level_none", "level0": "Level0", "level1": "Level1", "level2": "Level2"}
_EXPORT_TYPES = {"text": "Text", "db": "Db"}


class Profiler:
    """torch_npu's profiler (Ascend Extension for PyTorch, torch_npu.profiler), set as MindSpeed-LLM sets it.

    `level` and `export_type` are MindSpeed-LLM's words. What it recorded is parsed when it stops, into
    `folder`/<worker>_<time>_ascend_pt, for MindStudio Insight.
    """

    def __init__(
        self,
        folder: Path,
        worker: str,
        *,
        level: str,
        export_type: str,
        data_simplification: bool,
        with_cpu: bool,
        with_stack: bool,
        with_memory: bool,
        record_shapes: bool,
    ) -> None:
        vendors = importlib.import_module("torch_npu.profiler")
        self._is_kept = True
        write = vendors.tensorboard_trace_handler(dir_name=str(folder), worker_name=worker)
        kinds = vendors.ProfilerActivity
        self._profile = vendors.profile(
            activities=[kinds.NPU, kinds.CPU] if with_cpu else [kinds.NPU],
            on_trace_ready=lambda recorded: write(recorded) if self._is_kept else None,
            record_shapes=record_shapes,
            profile_memory=with_memory,
            with_stack=with_stack,
            experimental_config=vendors._ExperimentalConfig(
                profiler_level=getattr(vendors.ProfilerLevel, _LEVELS[level]),
                aic_metrics=vendors.AiCMetrics.PipeUtilization,
                export_type=getattr(vendors.ExportType, _EXPORT_TYPES[export_type]),
                data_simplification=data_simplification,
            ),
        )

    def start(self) -> None:
        """Record from here on."""
        self._profile.start()

    def stop(self, *, is_kept: bool) -> None:
        """Record no more; parse what there is, if it is kept, which may take minutes."""
        self._is_kept = is_kept
        self._profile.stop()
