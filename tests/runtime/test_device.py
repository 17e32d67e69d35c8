"""Devices: choosing one, its memory, its peak, its errors."""

from __future__ import annotations

import pytest
import torch

from tessel.errors import TesselError, UsageError
from tessel.runtime import device as devices
from tessel.runtime.memory import resident_bytes

CPU = torch.device("cpu")


def test_auto_takes_the_cpu_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert devices.resolve("auto") == CPU
    assert devices.resolve("cpu") == CPU


def test_an_unknown_device_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--device tpu: not a device; choose auto, cpu, cuda or npu"):
        devices.resolve("tpu")


@pytest.mark.parametrize("name", ["cuda", "npu"])
def test_a_device_that_is_not_there_says_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    with pytest.raises(TesselError, match=f"--device {name}: torch .* sees no such device .*Install .*--device auto"):
        devices.resolve(name)


def test_peak_memory_sees_what_was_freed_between_two_looks() -> None:
    devices.reset_peak_memory(CPU)
    before = devices.peak_memory_bytes(CPU)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    # Held until a sample has seen it, however slow the machine is.
    while devices.peak_memory_bytes(CPU) < before + 60 * 2**20:
        block.add_(1)
    del block
    assert devices.peak_memory_bytes(CPU) >= before + 60 * 2**20
    devices.reset_peak_memory(CPU)
    assert devices.peak_memory_bytes(CPU) < before + 60 * 2**20


def test_mapped_files_do_not_count(tmp_path: object) -> None:
    path = f"{tmp_path}/weights"
    torch.ones(64 * 2**20, dtype=torch.uint8).numpy().tofile(path)
    before = resident_bytes()
    mapped = torch.from_file(path, shared=False, size=64 * 2**20, dtype=torch.uint8)
    assert mapped.sum().item() == 64 * 2**20
    assert resident_bytes() < before + 32 * 2**20


def test_peak_flops_of_a_card_come_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA H200": 989.5e12, "NVIDIA H20": 148e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L4": 121e12}
    for index, (name, flops) in enumerate(names.items()):
        monkeypatch.setattr(devices, "_name", lambda device, name=name: name)
        assert devices.peak_flops(torch.device("cuda", index + 40), torch.bfloat16) == flops


def test_peak_flops_of_a_cpu_are_measured_once() -> None:
    peak = devices.peak_flops(CPU, torch.float32)
    assert peak > 1e8
    assert devices.peak_flops(CPU, torch.float32) == peak


def test_flash_attention_says_why_not() -> None:
    available, reason = devices.flash_attention_available(CPU)
    assert not available
    assert "cpu" in reason


def test_deterministic_mode_reaches_torch() -> None:
    devices.set_deterministic()
    assert torch.are_deterministic_algorithms_enabled()


def test_the_random_state_of_a_device_can_be_put_back() -> None:
    state = devices.rng_state(CPU)
    first = torch.rand(3)
    devices.set_rng_state(CPU, state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.gpu
def test_an_accelerator_is_found_described_and_measured() -> None:
    device = devices.resolve("auto")
    assert device.type != "cpu"
    assert str(device) in devices.describe(device)
    devices.reset_peak_memory(device)
    block = torch.ones(64 * 2**20, dtype=torch.uint8, device=device)
    devices.synchronize(device)
    assert devices.peak_memory_bytes(device) >= block.numel()
    assert devices.peak_flops(device, torch.bfloat16) > 1e12
