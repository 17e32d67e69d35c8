"""Whole runs: what they write, that they resume bitwise, and how they stop."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tessel.cli import main
from tests.train.runs import flags, loading, losses, metrics, start, tessel, weight_bytes, write_data, write_pattern


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def run(arguments: list[str], expect: int = 0) -> None:
    """In this process, which is faster; status checked."""
    assert main(arguments) == expect


def test_run_writes_checkpoint_metrics_and_a_folder_that_transformers_opens(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    save = tmp_path / "out"
    run(flags(data, save, 6))
    out = capsys.readouterr().out
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
    assert (save / "iter_0000006" / ".metadata").is_file()
    assert len(losses(save)) == 6
    assert len(metrics(save, "validation")) == 1
    assert len(metrics(save, "final_validation")) == len(metrics(save, "test")) == 1
    assert "random weights" in out
    assert "successfully saved checkpoint from iteration       6" in out
    assert "[after training is done] datetime: " in out
    assert "without tokenizer" in out
    model = AutoModelForCausalLM.from_pretrained(save / "hf")
    assert model.config.vocab_size == 64
    assert model.dtype == torch.float32


def test_loss_falls_on_a_text_that_repeats(tmp_path: Path) -> None:
    save = tmp_path / "out"
    run(flags(write_pattern(tmp_path / "data"), save, 60))
    assert losses(save)[-1] < 0.5 * losses(save)[0]


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--fp16", "--initial-loss-scale", "4096"]])
def test_resuming_is_bitwise(data: Path, tmp_path: Path, precision: list[str]) -> None:
    dropout = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1", *precision]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(flags(data, whole, 20, *dropout))
    run(flags(data, parts, 20, *dropout, "--exit-interval", "10"))
    assert len(losses(parts)) == 10
    run(flags(data, parts, 20, *dropout))
    assert losses(parts) == losses(whole)
    assert weight_bytes(parts) == weight_bytes(whole)


def test_two_deterministic_runs_write_identical_weights_whatever_the_workers(data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(flags(data, first, 5, "--deterministic-mode", "--num-workers", "0"))
    run(flags(data, second, 5, "--deterministic-mode", "--num-workers", "3"))
    assert weight_bytes(first) == weight_bytes(second)


def test_killed_run_goes_on_as_if_it_had_not_been(data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(flags(data, whole, 40, "--save-interval", "7"))
    process = start(flags(data, killed, 40, "--save-interval", "7", "--async-save"))
    wait_for(lambda: (killed / "iter_0000014" / ".metadata").is_file(), process)
    process.kill()
    process.communicate(timeout=60)
    result = tessel(flags(data, killed, 40, "--save-interval", "7", "--async-save"))
    assert "going on from iteration" in result.stdout or "done already" in result.stdout
    assert losses(killed) == losses(whole)
    assert weight_bytes(killed) == weight_bytes(whole)


def wait_for(condition: Callable[[], bool], process: object) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()[1][-2000:]  # type: ignore[attr-defined]
        time.sleep(0.05)
    raise AssertionError("waited a minute in vain")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_step_saves_and_exits_0(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    save = tmp_path / "out"
    process = start(flags(data, save, 100_000, "--log-interval", "1"))
    wait_for(lambda: (save / "metrics.jsonl").is_file() and len(losses(save)) >= 2, process)
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    last = len(losses(save))
    assert f"exiting after iteration {last}: received {number.name}" in stdout
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == str(last)


def test_exit_duration_saves_and_stops(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 50, "--exit-duration-in-mins", "0.000001"))
    assert len(losses(save)) == 1
    assert "--exit-duration-in-mins" in capsys.readouterr().out


def test_not_finite_loss_stops_and_names_step_samples_and_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "out"
    wild = ["--lr", "1e20", "--min-lr", "1e20", "--clip-grad", "0", "--lr-decay-style", "constant"]
    run(flags(data, save, 20, *wild, "--save-interval", "1"), expect=1)
    error = capsys.readouterr().err
    assert "is not finite" in error
    assert "samples" in error
    assert str(save / "iter_") in error


def test_not_finite_loss_is_skipped_on_request(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "out"
    wild = ["--lr", "1e20", "--min-lr", "1e20", "--clip-grad", "0", "--lr-decay-style", "constant"]
    run(flags(data, save, 8, *wild, "--no-check-for-nan-in-loss-and-grad", "--eval-iters", "0"))
    assert [row["skipped"] for row in metrics(save)].count(1) >= 1


def test_keep_last_k_and_save_hf_interval(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 6, "--save-interval", "1", "--keep-last-k", "2", "--save-hf-interval", "3"))
    assert sorted(entry.name for entry in save.glob("iter_*")) == ["iter_0000005", "iter_0000006"]
    assert (save / "hf_0000003" / "model.safetensors").is_file()


def test_save_holding_this_run_wins_over_load(
    data: Path, tmp_path: Path, tiny_hf_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_hf_folder("qwen2", vocab_size=64)
    save = tmp_path / "out"
    command = loading(model, data, save, 4)
    run([*command, "--exit-interval", "2"])
    capsys.readouterr()
    run(command)
    assert "going on from iteration 2" in capsys.readouterr().out
    run([*command, "--no-resume"])
    assert "starting from the Hugging Face weights" in capsys.readouterr().out
    assert len(losses(save)) == 4


def test_load_of_another_run_goes_on_or_finetunes(data: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(flags(data, first, 4))
    run(loading(first, data, tmp_path / "second", 6, "--override-opt-param-scheduler"))
    assert [row["iteration"] for row in metrics(tmp_path / "second")] == [5, 6]
    run(loading(first, data, tmp_path / "third", 3, "--finetune"))
    assert [row["iteration"] for row in metrics(tmp_path / "third")] == [1, 2, 3]


def test_evaluations_of_a_run_that_is_loaded_go_on_where_they_ended(data: Path, tmp_path: Path) -> None:
    whole, part, rest = tmp_path / "whole", tmp_path / "part", tmp_path / "rest"
    often = ["--eval-interval", "2", "--split", "50,40,10"]
    run(flags(data, whole, 8, *often))
    run(flags(data, part, 8, *often, "--exit-interval", "4"))
    run(loading(part, data, rest, 8, *often))
    expected = {row["iteration"]: row["lm_loss_validation"] for row in metrics(whole, "validation")}
    assert len(set(expected.values())) == 4
    assert {row["iteration"]: row["lm_loss_validation"] for row in metrics(rest, "validation")} == {
        iteration: loss for iteration, loss in expected.items() if iteration > 4
    }


def test_contradicting_data_is_listed_and_override_insists(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 8, "--exit-interval", "2"))
    other = write_data(tmp_path / "other", seed=1)
    run(flags(other, save, 8, "--eod-mask-loss"), expect=1)
    error = capsys.readouterr().err
    assert "training data was" in error
    assert "--eod-mask-loss was False and is True" in error
    assert "--override" in error
    run(flags(other, save, 8, "--eod-mask-loss", "--override"))
    assert len(losses(save)) == 8


def test_changed_schedule_is_refused_as_in_megatron(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 8, "--exit-interval", "2"))
    run(flags(data, save, 8, "--lr", "5e-3"), expect=1)
    assert "--lr" in capsys.readouterr().err
    run(flags(data, save, 8, "--lr", "5e-3", "--override-opt-param-scheduler"))


def test_full_disk_while_saving_keeps_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tessel.checkpoint import training

    save = tmp_path / "out"
    run(flags(data, save, 4, "--exit-interval", "2"))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.dcp, "save", full)
    run(flags(data, save, 4), expect=1)
    assert "disk is full" in capsys.readouterr().err
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert [entry.name for entry in save.iterdir() if entry.name.startswith((".iter", "iter_"))] == ["iter_0000002"]


def test_poisoned_checkpoint_index_is_refused_and_does_not_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pickle

    save, proof = tmp_path / "out", tmp_path / "proof"
    run(flags(data, save, 4, "--exit-interval", "2"))

    class Poison:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {proof}",)

    (save / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(Poison()))
    run(flags(data, save, 4), expect=1)
    assert "system" in capsys.readouterr().err
    assert not proof.exists()


def test_load_without_weights_says_what_was_looked_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    run(loading(empty, data, None, 2), expect=1)
    error = capsys.readouterr().err
    assert "model.safetensors" in error
    assert "latest_checkpointed_iteration.txt" in error
    (empty / "config.json").write_text("{}")
    run(loading(empty, data, None, 2), expect=1)
    assert "--init-from-config" in capsys.readouterr().err


def test_sequence_longer_than_the_model_allows(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(flags(data, None, 2, "--seq-length", "100"), expect=2)
    assert "--seq-length 100" in capsys.readouterr().err


def test_z_loss_changes_the_gradient_and_not_the_logged_loss(data: Path, tmp_path: Path) -> None:
    plain, with_z = tmp_path / "plain", tmp_path / "z"
    run(flags(data, plain, 2))
    run(flags(data, with_z, 2, "--z-loss-coeff", "0.1"))
    first, second = metrics(plain)[0], metrics(with_z)[0]
    assert first["lm_loss"] == pytest.approx(second["lm_loss"], rel=1e-6)
    assert abs(first["grad_norm"] - second["grad_norm"]) > 1e-3


def test_checkpoint_records_what_the_run_is(data: Path, tmp_path: Path) -> None:
    save = tmp_path / "out"
    run(flags(data, save, 2))
    state = json.loads((save / "iter_0000002" / "run.json").read_text())
    assert state["iteration"] == 2
    assert state["consumed_train_samples"] == 8
    assert state["config"]["batch"]["seq_length"] == 16
    assert state["identity"]["model"]["hidden_size"] == 32


@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_evaluating_leaves_training_as_it_is(data: Path, tmp_path: Path, precision: list[str]) -> None:
    with_evaluation, without = tmp_path / "with", tmp_path / "without"
    run(flags(data, with_evaluation, 8, *precision, "--eval-interval", "2"))
    run(flags(data, without, 8, *precision, "--eval-interval", "1000"))
    assert losses(with_evaluation) == losses(without)
    assert weight_bytes(with_evaluation) == weight_bytes(without)
