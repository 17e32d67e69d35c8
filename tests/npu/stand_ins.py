"""Modules of torch_npu for machines without it, as far as tessel calls them, with the package's own signatures.

`tests/npu/test_package.py` holds them against the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class ProfilerActivity:
    CPU, NPU = "CPU", "NPU"


class ProfilerLevel:
    Level0, Level1, Level2, Level_none = "Level0", "Level1", "Level2", "Level_none"


class AiCMetrics:
    PipeUtilization = "ACL_AICORE_PIPE_UTILIZATION"


class ExportType:
    Db, Text = "db", "text"


class _ExperimentalConfig:
    def __init__(
        self,
        profiler_level: str = "Level0",
        aic_metrics: str = "ACL_AICORE_PIPE_UTILIZATION",
        l2_cache: bool = False,
        msprof_tx: bool = False,
        mstx: bool = False,
        data_simplification: bool = True,
        record_op_args: bool = False,
        op_attr: bool = False,
        gc_detect_threshold: float | None = None,
        export_type: str | list[str] = "text",
    ) -> None:
        self.given = (profiler_level, aic_metrics, data_simplification, export_type)


class profile:
    """Records what it was made with, and writes it as its handler does."""

    made: list[profile] = []

    def __init__(
        self,
        *,
        activities: Any = None,
        schedule: Any = None,
        on_trace_ready: Callable[[Any], Any] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        with_modules: bool = False,
        experimental_config: _ExperimentalConfig | None = None,
    ) -> None:
        self.activities, self.on_trace_ready = activities, on_trace_ready
        self.recorded = (record_shapes, profile_memory, with_stack)
        self.config = experimental_config
        self.calls: list[str] = []
        self.made.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")
        if self.on_trace_ready is not None:
            self.on_trace_ready(self)


def tensorboard_trace_handler(
    dir_name: str | None = None, worker_name: str | None = None, analyse_flag: bool = True, async_mode: bool = False
) -> Callable[[profile], None]:
    def write(recorded: profile) -> None:
        assert dir_name is not None and worker_name is not None
        (Path(dir_name) / f"{worker_name}_20260101_ascend_pt").mkdir()

    return write


PROFILER = (ProfilerActivity, ProfilerLevel, AiCMetrics, ExportType, _ExperimentalConfig, profile)


def install(patch: pytest.MonkeyPatch) -> type[profile]:
    """Put the profiler where `import torch_npu.profiler` finds it; what it makes is in `profile.made`."""
    package, module = ModuleType("torch_npu"), ModuleType("torch_npu.profiler")
    for item in (*PROFILER, tensorboard_trace_handler):
        setattr(module, item.__name__, item)
    patch.setitem(sys.modules, "torch_npu", package)
    patch.setitem(sys.modules, "torch_npu.profiler", module)
    patch.setattr(profile, "made", [])
    return profile
