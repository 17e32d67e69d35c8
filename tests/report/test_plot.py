"""Which points `tessel plot` draws, and its picture and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessel.config.verbs import PlotConfig
from tessel.errors import TesselError, UsageError
from tessel.report import plot


def write_run(folder: Path, losses: list[float | None], evaluated: dict[int, float] | None = None) -> Path:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for iteration, loss in enumerate(losses, 1):
        row = {"kind": "train", "iteration": iteration, "consumed_samples": iteration * 4, "lm_loss": loss}
        rows.append(row | {"tokens": 100, "iteration_time": 30.0, "grad_norm": 1.0})
        if iteration in (evaluated or {}):
            value = (evaluated or {})[iteration]
            rows.append({"kind": "validation", "iteration": iteration, "consumed_samples": iteration * 4})
            rows[-1]["lm_loss_validation"] = value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("axis", "x", "evaluated_x"),
    [
        ("iteration", [1, 2, 4], [2, 4]),
        ("samples", [4, 8, 16], [8, 16]),
        ("tokens", [100, 200, 400], [200, 400]),
        ("time", [0.5, 1.0, 2.0], [1.0, 2.0]),
    ],
)
def test_points_of_a_curve(tmp_path: Path, axis: str, x: list[float], evaluated_x: list[float]) -> None:
    run = write_run(tmp_path / "run", [4.0, 3.0, None, 2.0], {2: 3.5, 4: 2.5})
    (curve,) = plot._curves({"run": plot._rows(run)}, "lm loss", axis)
    assert curve == plot.Curve("run", x, [4.0, 3.0, 2.0], evaluated_x, [3.5, 2.5])


def test_smoothing_is_a_mean_of_both_sides() -> None:
    assert plot.smoothed([1.0, 2.0, 6.0, 7.0, 8.0], 3) == [1.0, 3.0, 5.0, 7.0, 8.0]
    assert plot.smoothed([1.0, 2.0], 1) == [1.0, 2.0]
    straight = [float(value) for value in range(9)]
    assert plot.smoothed(straight, 5) == straight


def test_labels_are_as_short_as_tells_runs_apart(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, [1.0])) for name in ("a/run", "b/run")]
    assert list(plot._labels(runs)) == ["a/run", "b/run"]
    assert list(plot._labels(runs[:1])) == ["run"]


def test_the_picture_is_a_png_with_a_panel_for_each_metric(tmp_path: Path) -> None:
    from matplotlib.image import imread

    runs = tuple(str(write_run(tmp_path / name, [4.0, 3.0, 2.0], {3: 2.5})) for name in ("a", "b"))
    heights = []
    for metrics in (("lm loss",), ("lm loss", "grad-norm")):
        plot.plot(PlotConfig(runs=runs, output=str(tmp_path / "out" / "plot.png"), metric=metrics, title="Two runs"))
        image = imread(tmp_path / "out" / "plot.png", format="png")
        heights.append(image.shape[0])
        assert image[..., :3].min() < 0.5
    assert heights[1] == 2 * heights[0]


def test_a_metric_that_no_run_has_is_an_error_that_names_what_there_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [1.0])
    with pytest.raises(
        UsageError, match=r"--metric speed: no such figure in these runs; they have .*grad_norm.*lm_loss"
    ):
        plot.plot(PlotConfig(runs=(str(run),), output=str(tmp_path / "plot.png"), metric=("speed",)))
    assert not (tmp_path / "plot.png").exists()


def test_runs_that_are_not_there_or_empty_are_errors(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    with pytest.raises(TesselError, match="holds no metrics yet"):
        plot.plot(PlotConfig(runs=(str(run),)))
    with pytest.raises(TesselError, match=r"a run to plot: .*rum does not exist. .* holds run"):
        plot.plot(PlotConfig(runs=(str(tmp_path / "rum"),)))
    with pytest.raises(UsageError, match="--smooth -1"):
        plot.plot(PlotConfig(runs=(str(run),), smooth=-1))
