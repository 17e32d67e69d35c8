"""metrics.jsonl over crashes and resumes, TensorBoard events read back, the adapters of others' services."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tessel.config.run import Logging
from tessel.errors import UsageError
from tessel.train.metrics import evaluation_values, tensorboard_tags_off
from tessel.train.progress import RunProgress
from tessel.train.sinks import MetricsFile, TensorBoardSink, WandbSink, build_sinks, read_metrics


def _write(path: Path, iterations: range, start_iteration: int = 0) -> None:
    file = MetricsFile(path, start_iteration)
    for iteration in iterations:
        file.log({"lm loss": 7.0 - iteration, "grad-norm": 1.0}, iteration, 8 * iteration)
    file.close()


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    file.log({"lm loss": 6.5, "grad-norm": math.inf}, 3, 24)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        '{"kind": "train", "iteration": 3, "consumed_samples": 24, "lm_loss": 6.5, "grad_norm": null}\n'
    )
    file.close()


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 8))
    unbroken = path.read_bytes()
    _write(path, range(5, 8), start_iteration=4)
    assert path.read_bytes() == unbroken
    _write(path, range(5, 6), start_iteration=4)
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 5))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert len(read_metrics(path)) == (4 if cut == 1 else 3)
    _write(path, range(4, 5), start_iteration=3)
    assert path.read_bytes() == whole


def test_a_new_run_in_the_same_folder_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 5))
    _write(path, range(1, 3))
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2]


def test_an_evaluation_has_a_line_of_its_own_and_one_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for loss in (2.0, 3.0):  # the second start finds the run complete and evaluates again
        file = MetricsFile(path, start_iteration=2)
        if loss == 2.0:
            file.log({"lm loss": 5.0}, 2, 16)
        file.log(evaluation_values({"lm loss": loss}), 2, 16, kind="validation")
        file.log(evaluation_values({"lm loss": loss}, "test"), 2, 16, kind="test")
        file.close()
    rows = read_metrics(path)
    assert [(row["kind"], row["iteration"]) for row in rows] == [("train", 2), ("validation", 2), ("test", 2)]
    assert rows[1]["lm_loss_validation"] == rows[2]["lm_loss_test"] == 3.0
    assert rows[1]["lm_loss_validation_ppl"] == pytest.approx(math.exp(3.0))


def _logging(folder: Path, **changes: Any) -> Logging:
    return Logging(**{"tensorboard_dir": str(folder)} | changes)


def _events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_has_megatrons_tags(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    logging = _logging(tmp_path, tensorboard_log_interval=2)
    sink = TensorBoardSink(logging, tensorboard_tags_off(logging))
    train = {
        "learning-rate": 0.5,
        "decoupled-learning-rate": 0.25,
        "batch-size": 8,
        "lm loss": 6.0,
        "loss-scale": 1.0,
        "grad-norm": 1.0,
        "num-zeros": 3.0,
        "params-norm": 2.0,
        "iteration-time": 0.1,
        "skipped": 0,
        "tokens": 512,
    }
    for iteration in (1, 2, 3, 4):
        sink.log(train, iteration, 8 * iteration)
    sink.log(evaluation_values({"lm loss": 5.0}), 3, 24, kind="validation")
    sink.close()
    events = _events(tmp_path)
    both = ["learning-rate", "batch-size", "lm loss", "loss-scale", "grad-norm", "num-zeros", "params-norm"]
    expected = {name for tag in [*both, "lm loss validation"] for name in (tag, f"{tag} vs samples")}
    assert events.keys() == expected | {"decoupled-learning-rate"}
    assert events["lm loss"] == [(2, 6.0), (4, 6.0)]
    assert events["lm loss vs samples"] == [(16, 6.0), (32, 6.0)]
    assert events["lm loss validation"] == [(3, 5.0)]
    assert events["lm loss validation vs samples"] == [(24, 5.0)]


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("tensorboard", {"tensorboard_dir": "events"}, "--tensorboard-dir needs the package tensorboard"),
        ("wandb", {"wandb_project": "p"}, "--wandb-project needs the package wandb"),
        ("swanlab", {"swanlab_project": "p"}, "--swanlab-project needs the package swanlab"),
    ],
)
def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, flags: dict[str, str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=message) as error:
        build_sinks(Logging(**flags), {}, tmp_path / "metrics.jsonl", 0)
    assert f"pip install 'tessel[{module}]'" in str(error.value)
    assert list(tmp_path.iterdir()) == []


class _FakeService(ModuleType):
    """Stands for wandb or swanlab: keeps what it is given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = False

    def init(self, **arguments: Any) -> SimpleNamespace:
        self.started = arguments
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((values, step)),
            finish=lambda: setattr(self, "finished", True),
        )


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_services_get_the_same_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    service = _FakeService(name)
    monkeypatch.setitem(sys.modules, name, service)
    logging = Logging(**{f"{name}_project": "mine", "tensorboard_log_interval": 2})
    sinks = build_sinks(logging, {"seed": 1}, tmp_path / "metrics.jsonl", 0, frozenset({"tokens"}))
    for sink in sinks:
        sink.log({"lm loss": 6.0, "tokens": 512}, 1, 8)
        sink.log({"lm loss": 5.0, "tokens": 512}, 2, 16)
        sink.log({"lm loss validation": 4.0}, 3, 24, kind="validation")
        sink.close()
    assert service.started["project"] == "mine"
    assert service.started["config"] == {"seed": 1}
    samples = [{"samples vs steps": n} if name == "wandb" else {} for n in (16, 24)]
    assert service.logged == [({"lm loss": 5.0} | samples[0], 2), ({"lm loss validation": 4.0} | samples[1], 3)]
    assert service.finished
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_wandb_gets_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    service = _FakeService("wandb")
    monkeypatch.setitem(sys.modules, "wandb", service)
    WandbSink(Logging(wandb_project="p", wandb_exp_name="n", wandb_entity="e", wandb_save_dir="d"), {})
    assert service.started == {"project": "p", "name": "n", "entity": "e", "dir": "d", "config": {}}


def test_progress_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(train_iters=10) as progress:
        progress.update(1, loss=6.0, tokens_per_s=100.0)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_progress_shows_the_run_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from tessel.train import progress as module

    screen = io.StringIO()
    monkeypatch.setattr(module, "console", lambda: Console(file=screen, force_terminal=True, width=120))
    monkeypatch.setattr(module, "stdout_is_terminal", lambda: True)
    with RunProgress(train_iters=10, start_iteration=4) as progress:
        progress.update(6, loss=6.25, tokens_per_s=1234.0)
    shown = screen.getvalue()
    for part in ("6/10", "loss 6.2500", "1,234 tokens/s"):
        assert part in shown


def test_rows_are_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 3))
    for line in path.read_text().splitlines():
        assert isinstance(json.loads(line, parse_constant=pytest.fail), dict)
