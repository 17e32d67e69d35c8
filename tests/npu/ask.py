"""Run by `test_package.py` where torch_npu can be imported: what the package says, as JSON on the last line."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_npu
import torch_npu.profiler

from tessel.runtime import device as devices
from tessel.runtime.ascend import Profiler
from tests.npu import stand_ins

NPU = torch.device("npu:0")


def has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def differences() -> list[str]:
    """Of the stand-ins for the profiler's module, from that module."""
    real, found = torch_npu.profiler, []
    handler = "tensorboard_trace_handler"
    if parameters(getattr(stand_ins, handler)) != parameters(getattr(real, handler)):
        found.append(handler)
    for item in stand_ins.PROFILER:
        theirs = getattr(real, item.__name__)
        if "__init__" in vars(item) and not parameters(item).items() <= parameters(theirs).items():
            found.append(item.__name__)
        found += [
            name for name in vars(item) if not name.startswith("_") and name != "made" and not hasattr(theirs, name)
        ]
    return found


def recordings(folder: Path) -> list[list[str]]:
    """Level and export type of what the profiler is made with; the package puts right what it does not take."""
    made: list[dict[str, Any]] = []
    torch_npu.profiler.profile = lambda **given: made.append(given)
    for level in ("level_none", "level0", "level1", "level2"):
        for export_type in ("text", "db"):
            Profiler(
                folder, "rank-0", level=level, export_type=export_type, data_simplification=True, with_cpu=True,
                with_stack=False, with_memory=True, record_shapes=True,
            )  # fmt: skip
    configs = [given["experimental_config"] for given in made]
    return [[config._profiler_level, *config._export_type, config._aic_metrics] for config in configs]


def answers(names: list[str], folder: Path) -> dict[str, Any]:
    module, (backend, reason) = torch.get_device_module(NPU), devices.compile_backend(NPU)
    return {
        "schemas": [str(getattr(torch.ops.npu, name).default._schema) for name in names],
        "without_gradients": [name for name in names if not has_kernel(f"npu::{name}", "AutogradPrivateUse1")],
        "fused_adamw": has_kernel("aten::_fused_adamw_", "PrivateUse1"),
        "backend": devices.distributed_backend(NPU),
        "kernels": devices.vendor_kernels_available(NPU)[0],
        "mc2": devices.fused_products_available(NPU, 1, torch.bfloat16)[1],
        "module": all(hasattr(module, name) for name in ("get_rng_state", "set_rng_state", "get_device_name")),
        "peak_memory_bytes": devices.peak_memory_bytes(NPU),
        "auto": str(devices.resolve("auto")),
        "torchair": [callable(backend), reason],
        "profiler_differences": differences(),
        "recordings": recordings(folder),
    }


if __name__ == "__main__":
    print(json.dumps(answers(sys.argv[2:], Path(sys.argv[1]))))
