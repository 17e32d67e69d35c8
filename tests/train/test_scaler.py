"""Loss scales against megatron-core's scalers, over many random overflows."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tessel.config.run import Precision
from tessel.errors import UsageError
from tessel.train.scaler import ConstantScaler, DynamicScaler, build_scaler


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> Any:
    """megatron-core's scalers, which put their tensors on a GPU, on the CPU."""
    module = pytest.importorskip("megatron.core.optimizer.grad_scaler", reason="megatron-core is not installed")
    tensor = torch.tensor
    monkeypatch.setattr(module.torch, "tensor", lambda data, dtype, device: tensor(data, dtype=dtype))
    return module


@pytest.mark.parametrize("hysteresis", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("overflow_share", [0.1, 0.6])
def test_a_dynamic_scale_equals_megatrons(megatron: Any, hysteresis: int, window: int, overflow_share: float) -> None:
    theirs = megatron.DynamicGradScaler(2.0**16, 4.0, 2.0, 0.5, window, hysteresis)
    ours = DynamicScaler(2.0**16, 4.0, window, hysteresis)
    draw = random.Random(hysteresis)
    scales = set()
    for _ in range(100):  # fewer than fp32's exponents: beyond, Megatron's scale is infinite
        found_inf = draw.random() < overflow_share
        theirs.update(found_inf)
        ours.update(found_inf)
        state = theirs.state_dict()
        assert ours.scale == state["scale"].item()
        assert ours.inverse_scale == theirs.inv_scale.item()
        assert ours.state_dict() == state | {"scale": state["scale"].item()}
        scales.add(ours.scale)
    assert len(scales) > 1


def test_a_saved_scale_goes_on() -> None:
    ours, resumed = DynamicScaler(256.0, 1.0, 3, 2), DynamicScaler(256.0, 1.0, 3, 2)
    for found_inf in (True, True, False, False):
        ours.update(found_inf)
    resumed.load_state_dict(ours.state_dict())
    for found_inf in (False, True, True, False):
        ours.update(found_inf)
        resumed.update(found_inf)
        assert resumed.state_dict() == ours.state_dict()
    assert ours.scale == 128.0


def test_a_constant_scale_stays(megatron: Any) -> None:
    ours, theirs = ConstantScaler(1024.0), megatron.ConstantGradScaler(1024.0)
    ours.update(True)
    theirs.update(True)
    assert ours.scale == theirs.scale.item() == 1024.0
    assert ours.inverse_scale == 2.0**-10
    assert ours.state_dict() == theirs.state_dict() == {}


def test_the_flags_choose_the_scaler() -> None:
    assert build_scaler(Precision()) is None
    assert build_scaler(Precision(bf16=True)) is None
    assert isinstance(build_scaler(Precision(bf16=True, loss_scale=8.0)), ConstantScaler)
    assert isinstance(build_scaler(Precision(fp16=True, loss_scale=8.0)), ConstantScaler)
    scaler = build_scaler(
        Precision(fp16=True, initial_loss_scale=2.0**20, min_loss_scale=2.0, loss_scale_window=7, hysteresis=3)
    )
    assert isinstance(scaler, DynamicScaler)
    assert (scaler.scale, scaler.min_scale, scaler.growth_interval, scaler.hysteresis) == (2.0**20, 2.0, 7, 3)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="--min-loss-scale 8.0"):
        DynamicScaler(4.0, 8.0)
    with pytest.raises(UsageError, match="--loss-scale-window 0"):
        DynamicScaler(growth_interval=0)
    with pytest.raises(UsageError, match="--loss-scale -1"):
        ConstantScaler(-1.0)
