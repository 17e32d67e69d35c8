"""--ckpt-format: a run saved in Megatron's formats goes on from them as from its own, on any layout."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessel.checkpoint import run_formats
from tessel.checkpoint.detect import format_of, open_model
from tessel.checkpoint.run_formats import Formats
from tessel.checkpoint.stored import Target
from tessel.cli import main
from tessel.errors import UsageError
from tessel.model.config import ModelConfig
from tests.checkpoint.megatron import different
from tests.train.runs import environment, flags, loading, losses, tessel, weight_bytes, write_data

TRACKER = "latest_checkpointed_iteration.txt"
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "text")


def run(arguments: list[str], expect: int = 0) -> None:
    assert main(arguments) == expect


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run that was never stopped, by its flags."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*more: str) -> Path:
        if more not in made:
            made[more] = tmp_path_factory.mktemp("whole")
            run(flags(data, made[more], 6, *more))
        return made[more]

    return make


@pytest.mark.parametrize(
    ("name", "precision"), [("torch", "fp32"), ("torch", "bf16"), ("torch", "fp16"), ("torch_dist", "bf16")]
)
def test_a_run_goes_on_bit_by_bit(
    name: str, precision: str, data: Path, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    more = [*DROPOUT, *({"bf16": ["--bf16"], "fp16": ["--fp16", "--initial-loss-scale", "65536"]}.get(precision, []))]
    command = flags(data, tmp_path / "out", 6, *more, "--save-interval", "2", "--ckpt-format", name)
    run([*command, "--exit-interval", "4"])
    assert format_of(tmp_path / "out") == name
    assert (tmp_path / "out" / TRACKER).read_text() == "4"
    assert list((tmp_path / "out").glob(".*")) == []
    run(command)
    assert losses(tmp_path / "out") == losses(whole(*more))
    assert weight_bytes(tmp_path / "out") == weight_bytes(whole(*more))


def test_formats_may_change_while_a_run_goes_on(data: Path, tmp_path: Path, whole: Callable[..., Path]) -> None:
    command = flags(data, tmp_path / "out", 6, *DROPOUT)
    for iteration, name in ((2, "torch"), (4, "torch_dcp"), (5, "torch_dist")):
        run([*command, "--ckpt-format", name, "--exit-interval", str(iteration)])
        assert format_of(tmp_path / "out") == name
    run(command)
    assert losses(tmp_path / "out") == losses(whole(*DROPOUT))
    assert format_of(tmp_path / "out", ckpt_step=2) == "torch"
    run(["inspect", str(tmp_path / "out")])


def test_several_at_once_in_the_background(data: Path, tmp_path: Path, whole: Callable[..., Path]) -> None:
    save = tmp_path / "out"
    more = ["--save-interval", "2", "--keep-last-k", "1", "--save-hf-interval", "3", "--async-save"]
    run([*flags(data, save, 6, *DROPOUT), "--ckpt-format", "torch_dist", "hf", "torch_dcp", "torch", *more])
    for folder, name in ((save, "torch_dcp"), (save / "torch", "torch"), (save / "torch_dist", "torch_dist")):
        assert [entry.name for entry in folder.glob("iter_*")] == ["iter_0000006"]
        assert (folder / TRACKER).read_text().strip() == "6"
        assert format_of(folder) == name
        stored = open_model(folder)
        assert different(stored.tensors, open_model(save).tensors) == []
        moments = {key: value for key, value in stored.optimizer.items() if key.startswith("exp_avg")}
        assert len(moments) == 2 * len(stored.tensors)
        assert different(moments, {key: open_model(save).optimizer[key] for key in moments}) == []
    assert sorted(entry.name for entry in save.glob("hf*")) == ["hf", "hf_0000003", "hf_0000006"]
    assert (save / "hf_0000006" / "model.safetensors").read_bytes() == weight_bytes(save)
    assert weight_bytes(save) == weight_bytes(whole(*DROPOUT))
    assert list(save.rglob(".*.tmp")) == []


def test_another_run_goes_on_from_what_lies_beside(data: Path, tmp_path: Path, whole: Callable[..., Path]) -> None:
    first = tmp_path / "first"
    run([*flags(data, first, 6, *DROPOUT, "--ckpt-format", "torch_dcp", "torch"), "--exit-interval", "4"])
    run(loading(first / "torch", data, tmp_path / "second", 6, *DROPOUT))
    assert losses(tmp_path / "second") == losses(whole(*DROPOUT))[4:]


TP2_PP2 = "--nproc-per-node 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()


@pytest.mark.layouts
def test_four_processes_save_and_one_goes_on_and_back(data: Path, tmp_path: Path, whole: Callable[..., Path]) -> None:
    save, layout = tmp_path / "out", [*TP2_PP2, "--use-distributed-optimizer"]
    command = flags(data, save, 6, "--ckpt-format", "torch", "torch_dist")
    tessel([*command, *layout, "--exit-interval", "2"])
    assert len(list((save / "iter_0000002").glob("mp_rank_0[01]_00[01]"))) == 4
    written = {path.name for path in (save / "torch_dist" / "iter_0000002").glob("*.distcp")}
    assert {name.split("_")[2] for name in written} == set("0123"), "each process writes, and nothing is gathered"
    run([*command, "--exit-interval", "4"])
    tessel([*command, *layout])
    assert losses(save) == pytest.approx(losses(whole()), rel=1e-5)


KILLED = """
import os, signal, sys
from tessel.checkpoint import run_formats
from tessel.cli import main
write = run_formats._write_files
def writing(plan, temporary, target, team):
    write(plan, temporary, target, team)
    if "0000004" in target.name:
        os.kill(os.getpid(), signal.SIGKILL)
run_formats._write_files = writing
main(sys.argv[1:])
"""


def test_a_killed_save_leaves_the_one_before(data: Path, tmp_path: Path, whole: Callable[..., Path]) -> None:
    save = tmp_path / "out"
    command = flags(data, save, 6, *DROPOUT, "--save-interval", "2", "--ckpt-format", "torch")
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert (save / TRACKER).read_text() == "2" and not (save / "iter_0000004").exists()
    assert len(list(save.glob(".iter_*"))) == 2, "what was written, and what it was read from"
    run(command)
    assert list(save.glob(".*")) == []
    assert losses(save) == losses(whole(*DROPOUT))


def test_after_an_error_nothing_is_left(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_formats, "_write_files", full)
    run(flags(data, tmp_path / "out", 2, "--ckpt-format", "torch_dcp", "torch"), expect=1)
    assert "The disk is full" in capsys.readouterr().err
    assert (tmp_path / "out" / TRACKER).read_text() == "2\n", "the run's own was whole before"
    assert [path.name for path in (tmp_path / "out" / "torch").iterdir()] == []


def test_degrees_that_a_format_cannot_hold_are_refused_first(tiny_hf_folder: Callable[..., Path]) -> None:
    config = ModelConfig.from_folder(tiny_hf_folder("qwen2"))
    run_formats.check(Formats(run_formats.FORMATS, Target(tp=2, pp=2), True), config)
    with pytest.raises(UsageError, match="tensor-model-parallel-size 4 does not divide the 2 key/value heads"):
        run_formats.check(Formats(("torch_dcp", "torch"), Target(tp=4), True), config)
    run_formats.check(Formats(("torch_dcp",), Target(tp=4), True), config)


def test_weights_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = tmp_path / "out"
    run([*flags(data, save, 4, "--ckpt-format", "torch", "--no-save-optim"), "--exit-interval", "2"])
    assert open_model(save).optimizer == {}
    run(flags(data, save, 4, "--ckpt-format", "torch"), expect=1)
    assert "was saved without the optimizer's state (--no-save-optim)" in capsys.readouterr().err
    run(flags(data, save, 4, "--ckpt-format", "torch", "--no-load-optim"))
    assert [entry["kind"] for entry in map(json.loads, (save / "metrics.jsonl").read_text().splitlines())].count(
        "train"
    ) == 4
    run(flags(data, tmp_path / "hf", 2, "--ckpt-format", "hf"))
    assert "a run that is stopped cannot go on from it. Add torch_dcp for that" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["hf", "hf_0000002", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ckpt-format", "torch", "--optimizer", "sgd"], "not for that of --optimizer sgd: use torch_dcp"),
        (["--ckpt-format", "torch_dcp", "torch_dist", "--no-shared-storage"], "none sees all of that"),
        (["--ckpt-format", "zarr"], "zarr"),
    ],
)
def test_what_is_refused(
    more: list[str], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(flags(data, tmp_path / "out", 2, *more), expect=2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
