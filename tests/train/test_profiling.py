"""--profile: which iterations and ranks are recorded, and what the trace and the table say."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.cli import main
from tessel.config.profiling import Profiling
from tessel.config.run import RunConfig
from tessel.errors import UsageError
from tessel.runtime import ascend
from tessel.runtime import device as devices
from tessel.runtime.world import World
from tessel.train.profiling import Operator, Profiler, table
from tests.npu import stand_ins
from tests.train.runs import flags, losses, write_data


def trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def profiled(save: Path, iterations: str) -> list[dict[str, Any]]:
    return trace(save / "profile" / f"rank-0-iterations-{iterations}.json.gz")


def numbers(events: list[dict[str, Any]]) -> set[str]:
    return {event["name"] for event in events if re.fullmatch(r"iteration \d+", event.get("name", ""))}


def test_the_iterations_from_start_to_before_end_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, save = write_data(tmp_path / "data"), tmp_path / "out"
    assert main(flags(data, save, 4, "--profile", "--profile-step-start", "2", "--profile-step-end", "4")) == 0
    events = profiled(save, "2-3")
    assert numbers(events) == {"iteration 2", "iteration 3"}
    names = {event["name"] for event in events}
    assert any("Optimizer.step" in name for name in names)
    assert "aten::mm" in names
    out = capsys.readouterr().out
    written = (save / "profile" / "rank-0-iterations-2-3.txt").read_text()
    assert written in out
    assert "profile of rank 0, iterations 2 to 3: " in written
    assert {"matrix products", "optimizer", "copies"} <= {line[2:58].strip() for line in written.splitlines()}
    assert main(flags(data, tmp_path / "plain", 4)) == 0
    assert losses(save) == losses(tmp_path / "plain")


def test_shapes_memory_and_stack_are_recorded_where_asked_for(tmp_path: Path) -> None:
    data, save, folder = write_data(tmp_path / "data"), tmp_path / "out", tmp_path / "traces"
    more = ["--profile-record-shapes", "--profile-with-memory", "--profile-with-stack"]
    one = ["--profile", "--profile-step-start", "2", "--profile-step-end", "3"]
    assert main(flags(data, save, 2, *one, *more, "--profile-save-path", str(folder))) == 0
    events = trace(folder / "rank-0-iterations-2-2.json.gz")
    product = next(event for event in events if event.get("name") == "aten::mm")
    assert product["args"]["Input Dims"][0]
    assert any(event.get("name") == "[memory]" for event in events)
    assert any("trainer.py" in event.get("name", "") for event in events)
    assert "MiB" in (folder / "rank-0-iterations-2-2.txt").read_text().splitlines()[1]
    assert not (save / "profile").exists()


def test_a_run_that_ends_earlier_leaves_what_it_recorded(tmp_path: Path) -> None:
    data, save = write_data(tmp_path / "data"), tmp_path / "out"
    window = ["--profile", "--profile-step-start", "0", "--profile-step-end", "-1", "--exit-interval", "2"]
    assert main(flags(data, save, 4, *window)) == 0
    assert numbers(profiled(save, "1-2")) == {"iteration 1", "iteration 2"}


def test_iterations_that_are_done_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, save = write_data(tmp_path / "data"), tmp_path / "out"
    window = ["--profile", "--profile-step-start", "1", "--profile-step-end", "2"]
    assert main(flags(data, save, 4, "--exit-interval", "2")) == 0
    assert main(flags(data, save, 4, *window)) == 0
    assert "the run goes on with iteration 3, and those to be recorded are done" in capsys.readouterr().err


def record(tmp_path: Path, rank: int, ranks: tuple[int, ...], fails: bool = False) -> list[str]:
    """What a rank of four writes of one iteration."""
    section = Profiling(
        profile=True, profile_step_start=1, profile_step_end=2, profile_ranks=ranks, profile_save_path=str(tmp_path)
    )
    with Profiler(RunConfig(profiling=section), torch.device("cpu"), World(rank, 4), done=0) as profiler:
        with profiler.iteration(1):
            torch.ones(2, 2) @ torch.ones(2, 2)
            if fails:
                raise ArithmeticError
        with profiler.iteration(2):
            torch.ones(2)
    return sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize(("ranks", "expected"), [((0,), False), ((0, 2), True), ((-1,), True)])
def test_the_ranks_that_are_named_record(tmp_path: Path, ranks: tuple[int, ...], expected: bool) -> None:
    files = ["rank-2-iterations-1-1.json.gz", "rank-2-iterations-1-1.txt"]
    assert record(tmp_path, 2, ranks) == (files if expected else [])


def test_a_rank_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape("--profile-ranks 4: the run's ranks are 0 to 3.")):
        record(tmp_path, 0, (4,))


def test_a_vendors_profiler_records_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = stand_ins.install(monkeypatch).made
    monkeypatch.setattr(devices, "vendor_profiler", lambda device: (ascend.Profiler, "torch_npu's profiler"))
    assert record(tmp_path, 2, (2,)) == ["rank-2_20260101_ascend_pt"]
    assert [recorded.calls for recorded in made] == [["start", "stop"]]
    assert f"--profile: torch_npu's profiler, under {tmp_path}" in capsys.readouterr().out
    with pytest.raises(ArithmeticError):
        record(tmp_path, 3, (3,), fails=True)
    assert made[1].calls == ["start", "stop"] and len(list(tmp_path.iterdir())) == 1


def test_what_one_vendors_profiler_is_told_does_nothing_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = Profiling(profile=True, profile_level="level1", profile_export_type="db", profile_save_path=str(tmp_path))
    Profiler(RunConfig(profiling=section), torch.device("cpu"), World(0, 1), done=0)
    assert (
        "--profile-level level1 --profile-export-type db: of torch_npu's profiler alone, and this is cpu; a Chrome "
        "trace and a table are written"
    ) in capsys.readouterr().err


def test_a_step_that_fails_leaves_nothing_and_the_profiler_is_off(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError):
        record(tmp_path, 0, (0,), fails=True)
    assert not list(tmp_path.iterdir())
    assert record(tmp_path, 0, (0,))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("nvjet_sm90_tst_192x208_64x4_v_bz_coopB_TNN", "matrix products"),
        ("aten::_flash_attention_forward", "attention"),
        ("DevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "other operators"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ],
)
def test_operators_are_counted_by_what_they_are(name: str, kind: str) -> None:
    assert Operator(name, 1, 1.0).kind == kind


def test_the_table_is_of_one_iteration() -> None:
    head, *lines = table([Operator("aten::mm", 4, 0.006), Operator("aten::add", 2, 0.001)], 0.010, 2)
    assert head.split() == ["ms", "share", "calls", "of", "one", "iteration"]
    assert [line.split() for line in lines] == [
        ["matrix", "products", "3.000", "60.0%", "2.0"],
        ["other", "operators", "0.500", "10.0%", "1.0"],
        ["outside", "of", "them", "1.500", "30.0%"],
        ["all", "5.000", "100.0%"],
        ["aten::mm", "3.000", "60.0%", "2.0"],
        ["aten::add", "0.500", "10.0%", "1.0"],
    ]
