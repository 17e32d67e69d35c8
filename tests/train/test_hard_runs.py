"""Runs under hard conditions: full disks, signals at bad moments, readers that leave, unusual flags."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel.checkpoint import training as run_checkpoint
from tessel.cli import main
from tessel.data.indexed import IndexedDataset, IndexedDatasetWriter
from tessel.train import evaluation
from tests.train.runs import NULL_TOKENIZER, environment, flags, loading, losses, metrics, weight_bytes, write_data

LONGER = "--override-opt-param-scheduler"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def run(arguments: list[str], expect: int = 0) -> None:
    assert main(arguments) == expect


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".old"))]


# Full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kib)`: an empty file system of that size; skips where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size_kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no small file system can be mounted here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def grow(disk: Path, size_kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_kib}k", str(disk)], check=True)


# The sizes stop the first save, torch's writer in the middle of the second one, and the end of the third.
@pytest.mark.parametrize(("size_kib", "saved"), [(200, None), (700, "2"), (900, "4")])
@pytest.mark.parametrize("mode", [[], ["--async-save"]])
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    size_kib: int,
    saved: str | None,
    mode: list[str],
    data: Path,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = small_disk(size_kib)
    command = flags(data, disk / "run", 6, "--save-interval", "2", *mode)
    run(command, expect=1)
    assert "The disk is full" in capsys.readouterr().err
    tracker = disk / "run" / "latest_checkpointed_iteration.txt"
    assert (tracker.read_text().strip() if tracker.exists() else None) == saved
    assert not unfinished(disk)
    grow(disk, 10_000)
    run(command)
    run(flags(data, tmp_path / "whole", 6))
    assert losses(disk / "run") == losses(tmp_path / "whole")
    assert weight_bytes(disk / "run") == weight_bytes(tmp_path / "whole")


def test_a_disk_that_is_full_for_preprocessing(
    tmp_path: Path, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(["1 2 3 4 5 6 7 8 9"] * 2000))
    disk = small_disk(40)
    run(["preprocess", "--input", str(text), "--output-prefix", str(disk / "x"), *NULL_TOKENIZER], expect=1)
    assert "The disk is full" in capsys.readouterr().err
    assert list(disk.iterdir()) == []
    run(flags(text, None, 2, "--data-cache-path", str(disk)), expect=1)
    assert "The disk is full" in capsys.readouterr().err
    assert not [path for path in disk.rglob("*") if path.is_file()]


@pytest.fixture
def full_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`full_for(word)`: as if the disk were full for files whose path holds `word`."""
    sync = os.fsync

    def start(word: str) -> None:
        def full(descriptor: int) -> None:
            if word in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", full)

    return start


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="file names of descriptors are Linux's")
def test_a_full_disk_at_the_export_keeps_the_older_folder(
    data: Path, tmp_path: Path, full_for: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 2))
    before = weight_bytes(save)
    full_for("/.hf.")
    run(flags(data, save, 4, LONGER), expect=1)
    assert "The disk is full: writing" in capsys.readouterr().err
    assert weight_bytes(save) == before
    assert not unfinished(save)
    assert run_checkpoint.latest_iteration(save) == 4


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="file names of descriptors are Linux's")
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_full_disk_keeps_the_dataset_that_was_to_be_replaced(
    suffix: str, tmp_path: Path, full_for: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    command = ["preprocess", "--input", str(text), "--output-prefix", str(tmp_path / "x"), *NULL_TOKENIZER]
    text.write_text("1 2 3\n")
    run(command)
    text.write_text("4 5 6 7\n8\n")
    full_for(f"_document{suffix}.")
    run(command, expect=1)
    assert "The disk is full" in capsys.readouterr().err
    kept = IndexedDataset(tmp_path / "x_text_document")
    assert [kept.get(i).tolist() for i in range(len(kept))] == [[1, 2, 3]]
    assert not unfinished(tmp_path)


# Signals


def sending(number: signal.Signals, times: int, wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """`wrapped`, whose first call sends this process a signal."""
    left = [times]

    def call(*arguments: Any, **named: Any) -> Any:
        while left[0]:
            left[0] -= 1
            os.kill(os.getpid(), number)
        return wrapped(*arguments, **named)

    return call


def test_a_signal_during_an_evaluation_cuts_it_short(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # An evaluation of 50,000 batches: it ends in time only if it is cut.
    endless = ["--eval-interval", "2", "--eval-iters", "50000", "--dataloader-type", "cyclic"]
    short = ["--eval-interval", "2", "--eval-iters", "1", "--dataloader-type", "cyclic"]
    save = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluation_sums", sending(signal.SIGTERM, 1, evaluation.evaluation_sums))
        run(flags(data, save, 6, *endless))
    assert "exiting after iteration 2: received SIGTERM" in capsys.readouterr().out
    assert run_checkpoint.latest_iteration(save) == 2
    assert not metrics(save, "validation")
    run(flags(data, save, 6, *short))
    run(flags(data, tmp_path / "whole", 6, *short))
    assert weight_bytes(save) == weight_bytes(tmp_path / "whole")


def test_a_signal_during_the_last_evaluation_leaves_the_rest_to_the_next_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluation_sums", sending(signal.SIGTERM, 1, evaluation.evaluation_sums))
        run(flags(data, save, 2, "--eval-iters", "50000", "--dataloader-type", "cyclic"))
    out = capsys.readouterr().out
    assert "exiting after iteration 2: received SIGTERM" in out
    assert "the same command evaluates and writes the Hugging Face folder" in out
    assert not (save / "hf").exists()
    run(flags(data, save, 2, "--eval-iters", "1", "--dataloader-type", "cyclic"))
    assert (save / "hf" / "model.safetensors").is_file()
    assert len(metrics(save, "test")) == 1


def test_a_signal_during_a_save_in_the_background_lets_it_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tmp_path / "out"
    monkeypatch.setattr(run_checkpoint.dcp, "save", sending(signal.SIGTERM, 1, run_checkpoint.dcp.save))
    run(flags(data, save, 100, "--save-interval", "2", "--async-save"))
    saved = run_checkpoint.saved_iterations(save)
    assert 2 in saved
    assert run_checkpoint.latest_iteration(save) == saved[-1] == len(losses(save)) < 100
    assert not unfinished(save)


def test_a_second_interrupt_ends_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tmp_path / "out"
    monkeypatch.setattr(evaluation, "evaluation_sums", sending(signal.SIGINT, 2, evaluation.evaluation_sums))
    run(flags(data, save, 6, "--save-interval", "2", "--eval-interval", "3"), expect=130)
    assert run_checkpoint.saved_iterations(save) == [2]
    assert not unfinished(save)


def test_a_reader_that_leaves_does_not_end_a_run(data: Path, tmp_path: Path) -> None:
    """As in `tessel pretrain ... | head -1`."""
    save = tmp_path / "out"
    command = [sys.executable, "-m", "tessel", *flags(data, save, 3)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 0, error
    assert error == "tessel: nobody reads stdout any more; going on without it\n"
    assert len(losses(save)) == 3
    assert (save / "hf" / "config.json").is_file()


# Unusual and right


@pytest.mark.parametrize(
    "more",
    [
        ["--eval-iters", "0"],
        ["--split", "100,0,0"],
        ["--num-workers", "0"],
        ["--log-interval", "100"],
        ["--exit-interval", "2"],
        ["--keep-last-k", "1", "--async-save", "--save-interval", "1"],
    ],
)
def test_flags_that_are_unusual_and_right(more: list[str], data: Path, tmp_path: Path) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 2, *more))
    assert run_checkpoint.saved_iterations(save) == [2]
    assert (save / "hf" / "model.safetensors").is_file()
    assert not unfinished(save)


def test_names_with_spaces_slashes_tildes_and_other_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "家"))
    write_data(tmp_path / "语 料")
    run(flags(Path("语 料.bin"), Path("输 出"), 2))
    run(["pretrain", "--load", "输 出/hf/", *flags(Path("./语 料"), None, 2)[1:], "--save=~/模型/"])
    assert (tmp_path / "家" / "模型" / "hf" / "config.json").is_file()
    (tmp_path / "run.yaml").write_text("save: ~/yaml\n")
    run([*flags(Path("语 料"), None, 1, "--lr-warmup-iters", "0"), "--config", "run.yaml"])
    assert (tmp_path / "家" / "yaml" / "hf" / "config.json").is_file()


def test_save_and_load_are_one_folder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 4, "--save-interval", "2"))
    run(loading(Path(f"{save}/"), data, save, 6, LONGER))
    assert "going on from iteration 4" in capsys.readouterr().out
    run(loading(save, data, save, 6, LONGER, "--ckpt-step", "2"))
    assert "going on from iteration 2" in capsys.readouterr().out
    assert len(losses(save)) == 6


def test_ckpt_step_is_of_save_where_load_holds_no_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, save = tmp_path / "first", tmp_path / "out"
    run(flags(data, first, 4, "--save-interval", "2"))
    command = loading(first / "hf", data, save, 6, "--save-interval", "2")
    run(command)
    run([*command, "--ckpt-step", "4"])
    assert "going on from iteration 4" in capsys.readouterr().out
    # A run in --load has iterations of its own, and the one in --save goes on from its last.
    command = loading(first, data, tmp_path / "second", 6, LONGER, "--ckpt-step", "2")
    run([*command, "--exit-interval", "3"])
    assert f"starting from the run in {first}, iteration 2" in capsys.readouterr().out
    run(command)
    assert "going on from iteration 3" in capsys.readouterr().out


def test_a_run_that_is_longer_than_asked_for(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 4))
    before = weight_bytes(save)
    run(flags(data, save, 2, LONGER))
    assert "all 2 iterations are done already" in capsys.readouterr().out
    assert weight_bytes(save) == before


def test_a_run_killed_before_its_first_tracker_goes_on(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 4, "--exit-interval", "2"))
    (save / "latest_checkpointed_iteration.txt").unlink()
    for name in (".iter_0000004.abc.tmp", ".hf.abc.tmp", ".hf.abc.old"):
        (save / name / "inside").mkdir(parents=True)
    run(flags(data, save, 4))
    assert len(losses(save)) == 4
    assert not unfinished(save)


def test_without_the_optimizers_state(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 4, "--exit-interval", "2", "--no-save-optim"))
    run(flags(data, save, 4), expect=1)
    printed = capsys.readouterr()
    assert "--no-load-optim" in printed.err
    assert "attention:" not in printed.out.split("exiting")[-1], "refused before the model is built"
    run(flags(data, save, 4, "--no-load-optim"))
    assert len(losses(save)) == 4


def test_evaluating_alone_needs_no_learning_rate_and_writes_no_weights(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    run(flags(data, first, 2))
    (want,) = metrics(first, "test")
    evaluate = ["--seq-length", "16", "--micro-batch-size", "2", "--global-batch-size", "4", "--split", "80,10,10"]
    evaluate += [*NULL_TOKENIZER, "--data-path", str(data), "--skip-train", "--eval-iters", "1", "--device", "cpu"]
    for load in (first, first / "hf"):
        save = tmp_path / f"evaluated_{load.name}"
        run(["pretrain", "--load", str(load), "--save", str(save), *evaluate])
        (row,) = metrics(save, "test")
        assert row["lm_loss_test"] == want["lm_loss_test"]
        assert [entry.name for entry in save.iterdir()] == ["metrics.jsonl"]
    run(["pretrain", "--save", str(first), *evaluate])
    assert capsys.readouterr().out.count("on test set") == 4


def test_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetWriter(tmp_path / "one", np.uint16) as writer:
        writer.add_document(np.arange(60, dtype=np.uint16))
    run(flags(tmp_path / "one", tmp_path / "out", 2))
    assert "the valid split holds no tokens" in capsys.readouterr().err
    assert len(losses(tmp_path / "out")) == 2


def test_a_tokenizer_that_is_one_file(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tiny_tokenizer_folder / "tokenizer.json", alone)
    command = flags(text, None, 2, "--data-cache-path", str(tmp_path / "cache"), "--split", "100,0,0")
    start = command.index(NULL_TOKENIZER[0])
    del command[start : start + len(NULL_TOKENIZER)]
    for number, named in enumerate(
        (["--tokenizer-name-or-path", alone], ["--tokenizer-model", alone / "tokenizer.json"])
    ):
        save = tmp_path / f"out{number}"
        run([*command, *map(str, named), "--save", str(save), "--eod-id", "305"])
        assert AutoTokenizer.from_pretrained(save / "hf")("the fox").input_ids


@pytest.mark.parametrize("source", ["shape", "hf", "run"])
def test_print_config_and_samples_take_a_runs_own_flags(
    source: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 2))
    command = (
        flags(data, save, 2) if source == "shape" else loading(save / source if source == "hf" else save, data, save, 2)
    )
    before = sorted(save.rglob("*"))
    capsys.readouterr()
    run([*command, "--print-config"])
    assert "num_layers: 2" in capsys.readouterr().out
    run(["samples", *command[1:], "--step", "2:3"])
    assert capsys.readouterr().out.count("step 2, ") == 4
    assert sorted(save.rglob("*")) == before
