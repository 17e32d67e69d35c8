"""Overlap of tensor-parallel communication with matrix products: torch's async tensor parallelism."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from tessel.runtime import device as devices


def enable_overlap(device: torch.device, group: ProcessGroup | None, sequence_parallel: bool, compiled: bool) -> str:
    """Turn it on for layers that are compiled later; the line to log, which says so or why not.

    torch's compiler then runs an all-gather together with the products that take its result, and a product
    together with the reduce-scatter of its result, piece by piece over symmetric memory. Products with
    a bias are left as they are. Numbers change by the rounding of other products, as with any compiler.
    """
    reason = _reason_against(device, group, sequence_parallel, compiled)
    if reason:
        return f"--tp-comm-overlap: {reason}; going on without"
    assert group is not None
    # Private in torch 2.11 to 2.13, and what its own documentation of async tensor parallelism says to set.
    from torch._inductor import config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
    config._micro_pipeline_tp = True
    return "--tp-comm-overlap: torch's async tensor parallelism, in compiled layers"


def _reason_against(device: torch.device, group: ProcessGroup | None, sequence_parallel: bool, compiled: bool) -> str:
    if group is None:
        return "there is one tensor-parallel process"
    if not sequence_parallel:
        return "only gathers and scatters overlap, which need --sequence-parallel"
    if not compiled:
        return "torch's compiler does it, which needs --compile"
    available, reason = devices.symmetric_memory_available(device, group.size())
    return "" if available else reason
