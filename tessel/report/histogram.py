"""The lengths of a dataset's documents as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tessel.report.plot import COLOURS, DOTS_PER_INCH, PANEL_INCHES, short_number
from tessel.runtime.files import atomic_write

_NUM_BINS = 60


def draw_lengths(lengths: np.ndarray, title: str, path: str | Path) -> None:
    """Write a PNG: how many documents there are of each length, and the share of all tokens up to it.

    `lengths` i64[d] are tokens, by document; empty ones are counted in the legend alone.
    """
    # Without pyplot: no state of its own, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    filled = np.sort(lengths[lengths > 0])
    if len(filled):
        edges = _edges(int(filled[0]), int(filled[-1]))
        num_empty = len(lengths) - len(filled)
        label = f"documents ({len(filled):,}" + (f", and {num_empty:,} empty)" if num_empty else ")")
        axes.hist(filled, bins=edges.tolist(), color=COLOURS[0], alpha=0.75, label=label)
        axes.set_xscale("log")
        median = float(np.median(filled))
        axes.axvline(median, color=COLOURS[6], linewidth=1, linestyle=":", label=f"median {median:,.0f}")
        tokens = axes.twinx()
        shares = np.cumsum(filled, dtype=np.int64) / filled.sum(dtype=np.int64)
        some = np.unique(np.linspace(0, len(filled) - 1, 400).astype(np.int64))
        tokens.plot(filled[some], 100 * shares[some], color=COLOURS[1], linewidth=1.8, label="tokens up to this length")
        tokens.set_ylabel("% of all tokens")
        tokens.set_ylim(0, 102)
        handles = [*axes.get_legend_handles_labels()[0], *tokens.get_legend_handles_labels()[0]]
        axes.legend(handles=handles, frameon=False, fontsize="small", loc="upper left")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.25)
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("documents")
    axes.xaxis.set_major_formatter(short_number)
    axes.yaxis.set_major_formatter(short_number)
    axes.set_axisbelow(True)
    axes.spines[["top"]].set_visible(False)
    axes.set_title(title, fontsize="medium")
    with atomic_write(path) as temporary:
        canvas.print_figure(temporary, format="png", dpi=DOTS_PER_INCH)


def _edges(shortest: int, longest: int) -> np.ndarray:
    """Bins that grow by a constant factor, none narrower than a token."""
    edges = np.geomspace(shortest, longest + 1, _NUM_BINS + 1)
    whole = np.unique(np.round(edges))
    return whole if len(whole) > 1 else np.array([shortest, longest + 1])
