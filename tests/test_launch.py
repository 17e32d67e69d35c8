"""Several processes through tessel's own launcher: how they start and fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tessel import cli, launch
from tests.runtime.launched import by_tessel, by_torchrun, run

PRETRAIN = (
    "pretrain --seq-length 8 --train-iters 1 --lr 1e-3 --data-path nowhere --tokenizer-type NullTokenizer "
    "--vocab-size 7 --num-layers 1 --hidden-size 8 --num-attention-heads 1 --position-embedding-type rope "
    "--max-position-embeddings 8 --normalization RMSNorm --swiglu --disable-bias-linear"
).split()


def test_one_ranks_error_is_shown_once_with_its_rank_and_every_rank_keeps_a_log(tmp_path: Path) -> None:
    status, out, err = run(by_tessel("--nproc-per-node 4", "fail", tmp_path), TEST_RANK_LOG_DIR=str(tmp_path / "logs"))
    assert status == 1
    lines = err.splitlines()
    assert lines[0] == "tessel: error: rank 2: ZeroDivisionError: of one process"
    assert err.count("\nZeroDivisionError: of one process\n") == err.count("Traceback") == 1
    assert "this is a bug in tessel" in lines[-1]
    assert not any(word in err.lower() for word in ("gloo", "peer", "sigterm", "child"))
    assert out.splitlines() == ["iteration 1", "iteration 2"], "rank 0 alone speaks"
    logs = {file.name: file.read_text() for file in (tmp_path / "logs").iterdir()}
    assert sorted(logs) == [f"rank_0000{rank}.log" for rank in range(4)]
    assert all("iteration 2\n" in log for log in logs.values())
    assert "ZeroDivisionError: of one process" in logs["rank_00002.log"]
    assert "of one process" not in logs["rank_00000.log"]


def test_an_error_of_all_ranks_reads_as_that_of_one_process(tmp_path: Path) -> None:
    status, out, err = run(by_tessel("--nproc-per-node 4", "refuse_all", "this"))
    assert (status, out) == (2, "")
    assert err == "tessel: error: this cannot be.\ntessel: error: Second line.\n"


def test_under_torchrun_the_error_comes_before_its_table(tmp_path: Path) -> None:
    status, _, err = run(by_torchrun("--standalone --nproc-per-node 2", "refuse_one", tmp_path))
    assert status == 1
    assert err.splitlines()[0] == "tessel: error: rank 1: the disk is full."
    assert "the disk is full" in err.partition("Root Cause")[2], "its table has it, too"


def test_a_failed_start_is_tried_again_as_often_as_asked(tmp_path: Path) -> None:
    status, _, err = run(by_tessel("--nproc-per-node 2 --max-restarts 1", "refuse_one", tmp_path))
    assert status == 1
    error = "tessel: error: rank 1: the disk is full."
    assert err.splitlines() == [error, "tessel: starting again; 1 restart left (--max-restarts)", error]


def test_what_is_wrong_with_the_command_line_is_said_before_processes_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessel.training.launch", lambda arguments, options: pytest.fail("it was started"))
    heads = ["--nproc-per-node", "2", "--tensor-model-parallel-size", "2"]
    assert cli.main([*PRETRAIN, *heads]) == 2
    assert "tessel: error: " in capsys.readouterr().err
    assert cli.main([*PRETRAIN, "--nproc-per-node", "3", "--tensor-model-parallel-size", "2"]) == 2
    assert "tessel: error: " in capsys.readouterr().err


def test_a_folder_for_logs_that_cannot_be_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main([*PRETRAIN, "--nproc-per-node", "2", "--rank-log-dir", str(tmp_path / "file")]) == 1
    assert f"tessel: error: --rank-log-dir {tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_the_processes_get_the_same_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def keep(arguments: list[str], options: object) -> int:
        seen["arguments"] = arguments
        return 5

    monkeypatch.setattr("tessel.training.launch", keep)
    assert cli.main([*PRETRAIN, "--nproc-per-node", "1"]) == 5
    assert seen["arguments"] == ["-m", "tessel", *PRETRAIN, "--nproc-per-node", "1"]


def test_processes_are_not_started_from_one_that_torchrun_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*PRETRAIN, "--nproc-per-node", "2"]) == 2
    assert "--nproc-per-node 2 starts processes, and this is one already" in capsys.readouterr().err


def test_a_schedulers_counts_of_machines_are_not_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(PRETRAIN) == 1, "one process, which finds no data"
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if "WORLD_SIZE" in line] == [
        "tessel: WORLD_SIZE=2 and RANK=1 without LOCAL_RANK count machines and are not read; give --nproc-per-node "
        "with --nnodes and --node-rank, or use torchrun, for a run of several"
    ]
    assert "rank 1" not in err


def test_threads_are_a_fair_share_of_the_cores_unless_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert launch.threads_of(4, {}) == {"OMP_NUM_THREADS": "3"}
    assert capsys.readouterr().err == "tessel: OMP_NUM_THREADS=3: 12 cores, 4 processes\n"
    assert launch.threads_of(64, {}) == {"OMP_NUM_THREADS": "1"}
    assert launch.threads_of(4, {"OMP_NUM_THREADS": "7"}) == launch.threads_of(1, {}) == {}
