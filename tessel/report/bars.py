"""The accuracies of an evaluation as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessel.report.plot import COLOURS, DOTS_PER_INCH, PANEL_INCHES
from tessel.runtime.files import atomic_write

CHART = "accuracy.png"
_BAR_INCHES = 0.2


def draw_accuracies(results: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG: a bar for each subject, in its category's colour, with the standard error; a line for the whole.

    `results` is what results.json holds.
    """
    # Without pyplot: no state of its own, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    subjects, categories = results["subjects"], list(results["categories"])
    order = sorted(
        subjects, key=lambda name: (categories.index(subjects[name]["category"]), subjects[name]["accuracy"])
    )
    height = max(PANEL_INCHES[1], 1.5 + _BAR_INCHES * len(order))
    figure = Figure(figsize=(PANEL_INCHES[0], height), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, category in enumerate(categories):
        places = [i for i, name in enumerate(order) if subjects[name]["category"] == category]
        axes.barh(
            places,
            [subjects[order[i]]["accuracy"] for i in places],
            xerr=[subjects[order[i]]["stderr"] for i in places],
            color=COLOURS[number % len(COLOURS)],
            error_kw={"elinewidth": 0.8, "ecolor": "#555555"},
            label=f"{category}  {results['categories'][category]['accuracy']:.4f}",
        )
    total = results["total"]["accuracy"]
    axes.axvline(total, color=COLOURS[6], linewidth=1, linestyle=":", label=f"all  {total:.4f}")
    axes.set_yticks(range(len(order)), [name.replace("_", " ") for name in order], fontsize="x-small")
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy")
    axes.set_title(f"{results['task']}, by {results['rule']}", fontsize="medium")
    axes.grid(color="#dddddd", linewidth=0.6, axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize="small", loc="outside lower center", ncols=3)
    with atomic_write(path) as temporary:
        canvas.print_figure(temporary, format="png", dpi=DOTS_PER_INCH)
