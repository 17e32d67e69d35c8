"""`tessel plot`: the curves of runs side by side, in one PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessel.config.verbs import PlotConfig
from tessel.errors import TesselError, UsageError
from tessel.runtime.files import atomic_write, require_path
from tessel.runtime.log import log
from tessel.train.sinks import TRAIN, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS_FILE = "metrics.jsonl"
# Okabe and Ito's colours, which people with any colour vision can tell apart; the pale yellow is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")
X_LABELS = {"iteration": "iteration", "samples": "samples", "tokens": "tokens", "time": "training time (minutes)"}
PANEL_INCHES = (8.0, 4.5)
DOTS_PER_INCH = 150


@dataclass(frozen=True)
class Curve:
    """One metric of one run: training figures as they came, and those of evaluations."""

    label: str
    x: list[float]
    y: list[float]
    evaluated_x: list[float]
    evaluated_y: list[float]


def plot(cfg: PlotConfig) -> None:
    """`tessel plot`: draw each of --metric in a panel of its own, with a curve for each run.

    Raises:
        TesselError: a run is not there, or holds no metrics.
        UsageError: a metric that no run has; a number of points that cannot be.
    """
    if cfg.smooth < 0:
        raise UsageError(f"--smooth {cfg.smooth}: a number of points cannot be negative; 0 chooses one.")
    runs = {label: _rows(path) for label, path in _labels(cfg.runs).items()}
    panels = {metric: _curves(runs, metric, cfg.x) for metric in cfg.metric}
    _draw(panels, cfg)
    log(f"wrote {cfg.output}")


def _labels(runs: Sequence[str]) -> dict[str, Path]:
    """Runs by the shortest ends of their paths that tell them apart."""
    paths = [require_path(run, "a run to plot").absolute() for run in dict.fromkeys(runs)]
    folders = [path if path.is_dir() else path.parent for path in paths]
    for num_parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = ["/".join(folder.parts[-num_parts:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return dict(zip(labels, paths, strict=True))
    return {str(path): path for path in paths}


def _rows(path: Path) -> list[dict[str, Any]]:
    file = path / METRICS_FILE if path.is_dir() else path
    rows = read_metrics(require_path(file, "the metrics of a run"))
    if not rows:
        raise TesselError(f"{file} holds no metrics yet: let the run take a step, or name another run.")
    return rows


def key_of(metric: str) -> str:
    """The name in the metrics file: Megatron's tags ("lm loss", "grad-norm") have underscores there."""
    return metric.strip().replace(" ", "_").replace("-", "_")


def _curves(runs: dict[str, list[dict[str, Any]]], metric: str, x_axis: str) -> list[Curve]:
    key = key_of(metric)
    curves = [_curve(label, rows, key, x_axis) for label, rows in runs.items()]
    if not any(curve.y or curve.evaluated_y for curve in curves):
        found = sorted({name for rows in runs.values() for row in rows for name in row} - {"kind", "iteration"})
        raise UsageError(f"--metric {metric}: no such figure in these runs; they have {', '.join(found)}.")
    return curves


def _curve(label: str, rows: list[dict[str, Any]], key: str, x_axis: str) -> Curve:
    position = _positions(rows, x_axis)
    trained = [(position(row), row[key]) for row in rows if row["kind"] == TRAIN and row.get(key) is not None]
    evaluated = {position(row): row[f"{key}_validation"] for row in rows if row.get(f"{key}_validation") is not None}
    return Curve(label, *_unzip(trained), *_unzip(sorted(evaluated.items())))


def _unzip(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = list(points)
    return [x for x, _ in points], [y for _, y in points]


def _positions(rows: list[dict[str, Any]], x_axis: str) -> Callable[[dict[str, Any]], float]:
    """Where on the horizontal axis a row lies."""
    if x_axis == "iteration":
        return lambda row: row["iteration"]
    if x_axis == "samples":
        return lambda row: row["consumed_samples"]
    field, unit = {"tokens": ("tokens", 1.0), "time": ("iteration_time", 60.0)}[x_axis]
    train_rows = sorted((row for row in rows if row["kind"] == TRAIN), key=lambda row: row["iteration"])
    totals = accumulate((row.get(field) or 0.0) / unit for row in train_rows)
    reached = {row["iteration"]: total for row, total in zip(train_rows, totals, strict=True)}
    return lambda row: reached.get(row["iteration"], 0.0)


def smoothed(values: Sequence[float], num_points: int) -> list[float]:
    """The mean of about `num_points` values around each, of as many on either side, so that nothing lags."""
    sums = [0.0, *accumulate(values)]
    means = []
    for index in range(len(values)):
        reach = min(num_points // 2, index, len(values) - 1 - index)
        means.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return means


def _draw(panels: dict[str, list[Curve]], cfg: PlotConfig) -> None:
    # Without pyplot: no state of its own, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL_INCHES[0], PANEL_INCHES[1] * len(panels)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes_of = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (metric, curves) in zip(axes_of, panels.items(), strict=True):
        _draw_panel(axes, metric, curves, cfg)
    axes_of[-1].set_xlabel(X_LABELS[cfg.x])
    if cfg.title:
        figure.suptitle(cfg.title)
    with atomic_write(cfg.output) as temporary:
        canvas.print_figure(temporary, format="png", dpi=DOTS_PER_INCH)


def _draw_panel(axes: Axes, metric: str, curves: list[Curve], cfg: PlotConfig) -> None:
    for index, curve in enumerate(curves):
        colour = COLOURS[index % len(COLOURS)]
        style = STYLES[index // len(COLOURS) % len(STYLES)]
        num_points = cfg.smooth or max(1, len(curve.y) // 20)
        if num_points > 1:
            axes.plot(curve.x, curve.y, color=colour, alpha=0.25, linewidth=0.8)
        if curve.y:
            label = f"{curve.label}  {curve.y[-1]:.4g}"
            axes.plot(curve.x, smoothed(curve.y, num_points), style, color=colour, linewidth=1.8, label=label)
        if curve.evaluated_y:
            label = f"{curve.label}, evaluation  {curve.evaluated_y[-1]:.4g}"
            axes.scatter(
                curve.evaluated_x, curve.evaluated_y, s=40, color=colour, edgecolors="white", label=label, zorder=3
            )
    axes.set_ylabel(metric)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    axes.xaxis.set_major_formatter(short_number)
    axes.legend(frameon=False, fontsize="small", title="last value", title_fontsize="small", alignment="left")


def short_number(value: float, _position: float | None = None) -> str:
    """1500 -> 1.5k, 2000000 -> 2M: axes of tokens would be unreadable otherwise."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
