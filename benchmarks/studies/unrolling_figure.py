"""The picture of growing T: error, memory and time against T, and error against memory."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.report import Run
from benchmarks.harness.style import COLOURS, STYLE

MARKERS = "osD^vP*X"
GREY, BROWN = "#777777", "#8B4513"
LABELS = {
    "steps": "inner steps T",
    "error": "relative error of the hypergradient",
    "temp_mebibytes": "temporary memory (MiB)",
    "seconds": "time of an estimate (s)",
}
PANELS = (("steps", "error"), ("temp_mebibytes", "error"), ("steps", "temp_mebibytes"), ("steps", "seconds"))


def draw(runs: Sequence[Run], families: Mapping[str, str]) -> Figure:
    """Four panels with a line for each method; in error against memory, the largest T has the largest marker.

    Args:
      runs: one for each method and seed; the curves are means over the seeds.
      families: method -> its family, which has one colour.

    Returns:
      A figure, ready for `savefig`.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    colours = dict(zip(dict.fromkeys(families.values()), (GREY, *COLOURS, "#000000", BROWN), strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 9), dpi=150, layout="constrained")
        panels = figure.subplots(2, 2).flat
        for axes, (first, second) in zip(panels, PANELS, strict=True):
            for method in methods:
                family = [name for name in methods if families[name] == families[method]]
                marker = MARKERS[family.index(method) % len(MARKERS)]
                line(
                    axes,
                    [run for run in runs if run.method == method],
                    first,
                    second,
                    colours[families[method]],
                    marker,
                )
            axes.set(xlabel=LABELS[first], ylabel=LABELS[second], xscale="log", yscale="log")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def line(axes: Axes, runs: Sequence[Run], first: str, second: str, colour: str, marker: str) -> None:
    """One method: a point for each T."""
    points = np.stack([mean(runs, name) for name in (first, second)])
    x, y = points[:, np.isfinite(points).all(axis=0)]
    axes.plot(x, y, "-", color=colour, marker=marker, markersize=4, linewidth=1, label=runs[0].method)
    if first != "steps":
        axes.plot(x[-1:], y[-1:], color=colour, marker=marker, markersize=9)


def mean(runs: Sequence[Run], name: str) -> np.ndarray:
    """Over the seeds, for each T; NaN where a method was not run."""
    key, unit = ("temp_bytes", 2**20) if name == "temp_mebibytes" else (name, 1)
    return np.mean([np.array(run.outcome.curve[key], float) for run in runs], axis=0) / unit
