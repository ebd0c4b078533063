"""The pictures of hypergradients: quality against cost."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.harness.report import Run, mean_and_error
from benchmarks.harness.style import COLOURS, STYLE, curves

STAGES = ("start", "middle", "end")
MARKERS = "osD^vP*X<>phd"
LABELS = {"outer_loss": "validation loss", "test_accuracy": "test accuracy", "auc": "AUC of the weights"}
LINES = cycler(linestyle=("-", ":", "--")) * cycler(color=COLOURS)
TICKS = (0, 1, 3, 5, 10, 30)
COSTS = {"milliseconds": "time of an estimate (ms)", "products": "second-order products"}


def draw(runs: Sequence[Run], families: Mapping[str, str]) -> Figure:
    """The cosine at each stage against time and against products, one row of panels for each network and cost.

    Args:
      runs: those that finished.
      families: method -> its family, which has one colour and is joined by a line.

    Returns:
      A figure, ready for `savefig`.
    """
    nets = list(dict.fromkeys(run.configuration["net"] for run in runs))
    rows = [(net, cost) for net in nets for cost in COSTS]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 3.4 * len(rows)), dpi=150, layout="constrained")
        grid = figure.subplots(len(rows), len(STAGES), squeeze=False, sharey=True)
        for (net, cost), panels in zip(rows, grid, strict=True):
            chosen = [run for run in runs if run.configuration["net"] == net]
            for stage, axes in zip(STAGES, panels, strict=True):
                frontier(axes, chosen, families, cost, f"cosine_{stage}")
                axes.set(title=f"{net}, {stage} of training", xlabel=COSTS[cost])
            panels[0].set(ylabel="cosine to the exact hypergradient")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def frontier(axes: Axes, runs: Sequence[Run], families: Mapping[str, str], cost: str, metric: str) -> None:
    """Mean ± standard error over the seeds of each method against its cost."""
    methods = list(dict.fromkeys(run.method for run in runs))
    for number, family in enumerate(dict.fromkeys(families[method] for method in methods)):
        members = [
            [run.outcome.metrics for run in runs if run.method == name] for name in methods if families[name] == family
        ]
        mean, error = np.transpose([mean_and_error([metrics[metric] for metrics in member]) for member in members])
        spent = [np.mean([metrics[cost] for metrics in member]) for member in members]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.errorbar(spent, mean, error, color=colour, marker=marker, linestyle="-", label=family, linewidth=1)
    if cost == "products":
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(TICKS, map(str, TICKS))
    else:
        axes.set_xscale("log")
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())


def draw_end_to_end(runs: Sequence[Run]) -> Figure:
    """Validation loss, test accuracy and the AUC of the weights against time.

    Args:
      runs: those that finished, one with a finite outer loss among them.

    Returns:
      A figure, ready for `savefig`.
    """
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": LINES}):
        figure = Figure(figsize=(13, 4), dpi=150, layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, metric in zip(panels, ("outer_loss", "test_accuracy", "auc"), strict=True):
            curves(axes, [run for run in runs if run.finite], (), metric)
            axes.set(xlabel="run time without compilation (s)", ylabel=LABELS[metric], xscale="log")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
