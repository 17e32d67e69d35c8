"""--tp-comm-overlap: on where it can be, else a reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import distributed

from tessel.cli import main
from tessel.config.megatron import MEGATRON
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.parallel.overlap import FusedProducts, enable_overlap
from tessel.runtime import device as devices
from tests.parallel.processes import run
from tests.train.runs import flags, write_data

CPU = torch.device("cpu")


def lines() -> list[str]:
    from torch._inductor import config
    from torch.distributed._symmetric_memory import is_symm_mem_enabled_for_group

    group = distributed.group.WORLD
    assert group is not None
    cases = ((None, True, True), (group, False, True), (group, True, False), (group, True, True))
    answers = []
    for case in cases:
        products, line = enable_overlap(CPU, *case, torch.float32)
        assert products is None
        answers.append(line)
    assert not config._micro_pipeline_tp and not is_symm_mem_enabled_for_group(group.group_name)
    with mock.patch.object(devices, "symmetric_memory_available", lambda device, num_ranks: (num_ranks == 2, "")):
        answers.append(enable_overlap(CPU, group, True, True, torch.float32)[1])
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


class Group:
    """Of the vendor's library."""

    def size(self) -> int:
        return 2

    def _get_backend(self, device: torch.device) -> Group:
        return self

    def get_hccl_comm_name(self, global_rank: int) -> str:
        return f"group of {global_rank}"


class Npu:
    type = "npu"


def with_the_vendors_products(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_devices: int = 8
) -> tuple[FusedProducts | None, str]:
    names = dict.fromkeys(("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"))
    monkeypatch.setattr(torch.ops, "npu", SimpleNamespace(**names), raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: num_devices)
    monkeypatch.setattr(distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(devices, "vendor_kernels_available", lambda device: (True, ""))
    return enable_overlap(Npu(), Group(), True, False, dtype)  # type: ignore[arg-type]


def test_the_vendors_products_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    products, line = with_the_vendors_products(monkeypatch, torch.bfloat16)
    assert products == FusedProducts("group of 5", 2)
    assert line == (
        "--tp-comm-overlap: npu_all_gather_base_mm and npu_mm_reduce_scatter_base (MC2), in attention and MLPs"
    )


def test_what_the_vendors_products_need(monkeypatch: pytest.MonkeyPatch) -> None:
    products, line = with_the_vendors_products(monkeypatch, torch.float32)
    assert products is None and "MC2 multiplies in bf16 and fp16, and this run computes in float32; going on" in line
    products, line = with_the_vendors_products(monkeypatch, torch.bfloat16, num_devices=1)
    assert products is None and "these are 2 of 1" in line


@pytest.mark.parametrize("flag", ["--use-mc2", "--use-ascend-mc2", "--use-ascend-coc", "--tp-comm-overlap"])
def test_names_of_other_suites(flag: str) -> None:
    parsed = parse(RunConfig, [flag, "--coc-parallel-num", "4"], "tessel pretrain", MEGATRON)
    assert parsed.value.layout.tp_comm_overlap
    assert "--coc-parallel-num (--use-ascend-coc takes the device's own overlap" in parsed.notes[0]


def test_a_run_says_what_becomes_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(write_data(tmp_path / "data"), tmp_path / "out", 2, "--use-mc2")) == 0
    assert "--tp-comm-overlap: there is one tensor-parallel process; going on without" in capsys.readouterr().out


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
