"""Devices. The only file that names a vendor."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tessel.errors import TesselError, UsageError
from tessel.runtime import ascend
from tessel.runtime.memory import PeakSampler
from tessel.runtime.peaks import FLOPS_16BIT, FLOPS_32BIT
from tessel.runtime.world import World

_ACCELERATORS = ("cuda", "npu")
KINDS = {"cpu": "CPU", "cuda": "NVIDIA GPU", "npu": "Ascend NPU"}
"""The names of devices' types in reports."""


def load_plugins() -> None:
    """Import the vendor's torch plugin where one is installed: until then torch does not know its device.

    Raises:
        TesselError: it cannot be imported, as where CANN's libraries are not found.
    """
    if importlib.util.find_spec("torch_npu") is not None:
        try:
            importlib.import_module("torch_npu")
        except (ImportError, RuntimeError) as error:
            version = _plugin_version()
            wrong = None if version is None else ascend.mismatch(version, str(torch.__version__))
            remedy = f"{wrong}," if wrong else "Source CANN's set_env.sh (`tessel doctor` names it),"
            raise TesselError(
                f"torch_npu is installed and cannot be imported ({(str(error).splitlines() or [''])[0]}). {remedy} or "
                "take --device cpu."
            ) from error


def environment_remarks(device: torch.device) -> list[str]:
    """What of the environment variables of other suites' guides does nothing on this device."""
    return ascend.remarks(device.type == "npu")


def vendor_report() -> tuple[dict[str, str], list[str]] | None:
    """What of the vendor's software is installed, and what stands in the way; None where nothing asks for it."""
    plugin = _plugin_version()
    if plugin is None and not ascend.has_devices():
        return None
    release = str(torch.__version__)
    return {**ascend.installed(), "belong together": ascend.matching(release)}, ascend.problems(plugin, release)


def _plugin_version() -> str | None:
    try:
        return metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return None


def vendor_profiler(device: torch.device) -> tuple[type[ascend.Profiler] | None, str]:
    """The vendor's own profiler, where torch's does not see the device; and what it is, or why there is none."""
    if device.type != "npu":
        return None, f"of torch_npu's profiler alone, and this is {device.type}"
    return ascend.Profiler, "torch_npu's profiler; MindStudio Insight opens what it writes"


def compile_backend(device: torch.device) -> tuple[Any, str | None]:
    """What torch.compile is to use on this device; None, and the reason, where it stays off."""
    if device.type != "npu":
        return "inductor", None
    try:
        torchair = importlib.import_module("torchair")
        backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    except (ImportError, AttributeError, AssertionError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, f"torch.compile needs torchair on Ascend NPUs, and it cannot be used ({first})"
    return backend, None


def resolve(name: str, world: World | None = None) -> torch.device:
    """The device that `--device` asks for: auto, cpu, cuda or npu, or one of the latter with ":index".

    `auto` takes the accelerator that torch reports, else the CPU. Of several processes of `world` on a machine,
    each takes the device of its local rank.

    Raises:
        UsageError: the name is none of these, or is one device for several processes.
        TesselError: torch sees no such device.
    """
    kind, _, index = name.partition(":")
    if index and world is not None and world.local_world_size > 1:
        raise UsageError(
            f"--device {name} is one device for {world.local_world_size} processes. Give --device {kind}: each takes "
            "the one of its own number."
        )
    if kind == "cpu":
        return torch.device("cpu")
    load_plugins()
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return _with_index(found, world) if found is not None and found.type in _ACCELERATORS else torch.device("cpu")
    if kind not in _ACCELERATORS:
        raise UsageError(f"--device {name}: not a device; choose auto, cpu, cuda or npu.")
    if found is None or found.type != kind:
        sees = f"it sees {found.type}" if found is not None else "it sees no accelerator"
        needs = "torch_npu of torch's version, and CANN" if kind == "npu" else "a CUDA build of torch and a driver"
        raise TesselError(
            f"--device {name}: torch {torch.__version__} sees no such device ({sees}). "
            f"Install {needs} (`tessel doctor` says what lacks), or take --device auto."
        )
    return _with_index(torch.device(name), world)


def distributed_backend(device: torch.device) -> str:
    """What init_process_group is to use: Gloo for CPU tensors, and the vendor's library for the accelerator's."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{torch.distributed.get_default_backend_for_device(device)}"


def _with_index(device: torch.device, world: World | None) -> torch.device:
    num_devices = torch.accelerator.device_count()
    if world is not None and world.local_world_size > 1:
        if world.local_world_size > num_devices:
            raise TesselError(
                f"{world.local_world_size} processes on this machine, and torch sees {num_devices} of {device.type}. "
                f"Start at most {num_devices} (--nproc-per-node), or take --device cpu."
            )
        device = torch.device(device.type, world.local_rank)
    elif device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    if device.index >= num_devices:
        raise TesselError(f"--device {device}: torch sees {num_devices}, counted from 0. Choose one of them.")
    torch.accelerator.set_device_index(device.index)
    return device


def count(device: torch.device) -> int:
    """Devices of this kind on this machine; a CPU is one."""
    return 1 if device.type == "cpu" else torch.accelerator.device_count()


def describe(device: torch.device) -> str:
    """The device in words: kind, model, and the memory or the threads it has."""
    if device.type == "cpu":
        return f"cpu ({_cpu_name()}, {torch.get_num_threads()} threads)"
    free, total = torch.accelerator.get_memory_info(device)
    return f"{device} ({_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free)"


def name_and_versions(device: torch.device) -> tuple[str, dict[str, str]]:
    """The device's model, and the versions of torch and of the vendor's software under it."""
    versions = {"torch": str(torch.__version__)}
    if device.type == "cpu":
        return _cpu_name(), versions
    if device.type == "cuda":
        versions["CUDA"] = str(torch.version.cuda)
        versions["driver"] = _nvidia_driver()
    else:
        versions["torch_npu"] = metadata.version("torch_npu")
    return _name(device), versions


def _nvidia_driver() -> str:
    file = Path("/sys/module/nvidia/version")
    return file.read_text().strip() if file.exists() else "unknown"


def _name(device: torch.device) -> str:
    return str(torch.get_device_module(device).get_device_name(device))


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing to do on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


_cpu_peak = PeakSampler()


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring peak memory anew."""
    if device.type == "cpu":
        _cpu_peak.reset()
    else:
        torch.accelerator.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak_memory`.

    On an accelerator: bytes that torch's allocator had given out. On the CPU: private memory of the
    process (RssAnon + RssShmem), sampled 20 times a second; without a reset, what it is now or the
    largest seen by these calls.
    """
    if device.type == "cpu":
        return _cpu_peak.peak_bytes()
    return torch.accelerator.max_memory_allocated(device)


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU divides by: the data sheet's dense figure for a device in the table, else a measured GEMM.

    A CPU has no useful data sheet, so there it is always the best of a few square GEMMs (about
    0.3 s, once in a process): MFU then says how near training comes to this machine's own GEMM.
    """
    if device.type != "cpu":
        table = FLOPS_16BIT if dtype.itemsize == 2 else FLOPS_32BIT
        name = _name(device)
        for part, flops in table.items():
            if part in name:
                return flops
    return _measured_gemm_flops(device, dtype)


def _measured_gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 1024 if device.type == "cpu" else 8192
    # Random numbers would disturb the run's generator; ones have no effect on a CPU's speed.
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    best_s = float("inf")
    with torch.no_grad():
        torch.mm(left, right)
        for _ in range(4):
            synchronize(device)
            start_s = time.perf_counter()
            torch.mm(left, right)
            synchronize(device)
            best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s


def rng_state(device: torch.device) -> torch.Tensor:
    """The state of the device's random generator, a uint8 tensor on the CPU."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    """Put back what `rng_state` gave."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def set_deterministic() -> None:
    """Make torch choose deterministic kernels, and refuse an operation that has none."""
    # cuBLAS reads this when it is first used; without it torch refuses matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    os.environ.setdefault("CLOSE_MATMUL_K_SHIFT", "1")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@functools.cache
def vendor_kernels_available(device: torch.device) -> tuple[bool, str]:
    """Whether the vendor's operators of `model/vendor.py` run on this device; with the reason, for or against."""
    if device.type != "npu":
        return False, f"torch_npu's operators are for Ascend NPUs, this is {device.type}"
    wanted = ("npu_fusion_attention", "npu_rms_norm", "npu_add_rms_norm", "npu_rotary_mul", "npu_swiglu",
              "npu_grouped_matmul", "npu_moe_token_permute", "npu_moe_token_unpermute")  # fmt: skip
    missing = [name for name in wanted if not hasattr(torch.ops.npu, name)]
    version = metadata.version("torch_npu")
    if missing:
        return False, f"torch_npu {version} has no {', '.join(missing)}: install the one for torch {torch.__version__}"
    return True, f"torch_npu {version} is there for {device}"


def fused_products_available(device: torch.device, num_ranks: int, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the vendor's products with a gather or a scatter inside them run between `num_ranks` devices in a row.

    Returns the answer, and with it what they are, or what stands against them.
    """
    if device.type != "npu":
        return False, f"MC2 is for Ascend NPUs, this is {device.type}"
    if dtype.itemsize != 2:
        return False, f"MC2 multiplies in bf16 and fp16, and this run computes in {str(dtype).removeprefix('torch.')}"
    num_devices = torch.accelerator.device_count()
    if num_ranks not in (2, 4, 8, 16, 32) or num_ranks > num_devices:
        return False, f"MC2 is for 2, 4, 8, 16 or 32 NPUs of one machine, and these are {num_ranks} of {num_devices}"
    names = ("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base")
    missing = [name for name in names if not hasattr(torch.ops.npu, name)]
    if missing:
        return False, f"torch_npu has no {missing[0]}"
    return True, f"{' and '.join(names)} (MC2), in attention and MLPs"


def communicator_name(group: torch.distributed.ProcessGroup, device: torch.device) -> str:
    """What the vendor's library calls the group; made there if it is not yet."""
    name: str = group._get_backend(device).get_hccl_comm_name(torch.distributed.get_rank())  # type: ignore[attr-defined]
    return name


@functools.cache
def flash_attention_available(device: torch.device) -> tuple[bool, str]:
    """Whether FlashAttention 3 or 4 runs on this device through `torch.nn.attention`.

    Returns the answer, and with it the implementation's name ("FA3" or "FA4") or what is lacking.
    """
    if device.type != "cuda":
        return False, f"FlashAttention 3 and 4 are for NVIDIA GPUs, this is {device.type}"
    from torch.nn import attention

    if not hasattr(attention, "list_flash_attention_impls"):
        return False, f"torch {torch.__version__} cannot register FlashAttention 3 or 4; 2.11 and later can"
    major, minor = torch.cuda.get_device_capability(device)
    # FA3 is written for Hopper alone; FA4 for Hopper and Blackwell.
    candidates = {9: (("FA3", "flash_attn_interface"), ("FA4", "flash_attn.cute")), 10: (("FA4", "flash_attn.cute"),)}
    if major not in candidates:
        return (
            False,
            f"compute capability {major}.{minor}: FlashAttention 3 needs 9.0, FlashAttention 4 needs 9.0 or 10.0",
        )
    known = attention.list_flash_attention_impls()
    for implementation, module in candidates[major]:
        if implementation in known and _importable(module):
            return True, implementation
    packages = "flash-attn-3 or flash-attn-4" if major == 9 else "flash-attn-4"
    return False, f"the package is missing: pip install {packages}"


def symmetric_memory_available(device: torch.device, num_ranks: int) -> tuple[bool, str]:
    """Whether `num_ranks` processes in a row, this device's among them, can map each other's memory.

    Returns the answer, and with it what is lacking.
    """
    if device.type != "cuda":
        return False, f"torch's symmetric memory is for NVIDIA GPUs, this is {device.type}"
    own, num_devices = device.index or 0, torch.cuda.device_count()
    first = own // num_ranks * num_ranks
    if first + num_ranks > num_devices:
        return False, f"symmetric memory needs {num_ranks} devices of one machine, and torch sees {num_devices}"
    for other in range(first, first + num_ranks):
        if other != own and not torch.cuda.can_device_access_peer(own, other):
            return False, f"devices {own} and {other} cannot reach each other's memory"
    return True, ""


def _importable(module: str) -> bool:
    parent = module.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None


def fused_block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, masked: bool, causal: bool) -> str:
    """Which of torch's fused attentions that give an lse takes these [B, H, S, D]: cpu, flash, or plain for none."""
    if q.device.type == "cpu":
        return "cpu" if q.dtype in (torch.float32, torch.bfloat16, torch.float16) else "plain"
    if q.device.type != "cuda" or masked:
        return "plain"
    backends = torch.backends.cuda
    parameters = backends.SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])
    return "flash" if backends.can_use_flash_attention(parameters) else "plain"
