"""Memory that runs out is named, with what helps."""

from pathlib import Path

import pytest
import torch

from tessel.cli import main
from tessel.errors import TesselError
from tessel.runtime.memory import shortage_named
from tessel.train.step import TrainStep
from tests.train.runs import flags, write_data


def test_the_hosts_shortage_is_named() -> None:
    expected = r"ran out while trying \(.*can't allocate.*\)\. Take less\."
    with pytest.raises(TesselError, match=expected), shortage_named("while trying", "Take less."):
        torch.empty(2**58)


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape"), shortage_named("while trying", "Take less."):
        torch.zeros(3).view(2, 2)


def test_a_run_that_needs_too_much_says_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB: out of memory")

    monkeypatch.setattr(TrainStep, "__call__", fails)
    assert main(flags(write_data(tmp_path / "data"), None, 2)) == 1
    told = capsys.readouterr().err
    assert "Memory ran out in training (Tried to allocate 20.00 GiB" in told
    assert "--micro-batch-size" in told
    assert "tessel plan" in told
