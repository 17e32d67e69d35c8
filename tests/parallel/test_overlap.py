"""--tp-comm-overlap: on where it can be, else a reason."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import distributed

from tessel.parallel.overlap import enable_overlap
from tessel.runtime import device as devices
from tests.parallel.processes import run

CPU = torch.device("cpu")


def lines() -> list[str]:
    from torch._inductor import config
    from torch.distributed._symmetric_memory import is_symm_mem_enabled_for_group

    group = distributed.group.WORLD
    assert group is not None
    answers = [
        enable_overlap(CPU, None, True, True),
        enable_overlap(CPU, group, False, True),
        enable_overlap(CPU, group, True, False),
        enable_overlap(CPU, group, True, True),
    ]
    assert not config._micro_pipeline_tp and not is_symm_mem_enabled_for_group(group.group_name)
    with mock.patch.object(devices, "symmetric_memory_available", lambda device, num_ranks: (num_ranks == 2, "")):
        answers.append(enable_overlap(CPU, group, True, True))
    assert config._micro_pipeline_tp and is_symm_mem_enabled_for_group(group.group_name)
    return answers


def test_says_what_it_does() -> None:
    for *refusals, line in run(2, lines):
        assert all(refusal.endswith("; going on without") for refusal in refusals)
        for refusal, reason in zip(
            refusals, ("one tensor-parallel", "--sequence-parallel", "--compile", "cpu"), strict=True
        ):
            assert reason in refusal
        assert "async tensor parallelism" in line


def test_what_symmetric_memory_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: other >= 2)
    assert devices.symmetric_memory_available(gpu, 2) == (True, "")
    assert devices.symmetric_memory_available(gpu, 4) == (False, "devices 3 and 0 cannot reach each other's memory")
    available, reason = devices.symmetric_memory_available(gpu, 8)
    assert not available and "needs 8 devices" in reason and "sees 4" in reason
    available, reason = devices.symmetric_memory_available(CPU, 2)
    assert not available and "cpu" in reason
