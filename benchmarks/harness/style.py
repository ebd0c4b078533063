"""How figures look: colours, a style, and the panels that several of them have."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes

from benchmarks.harness.report import Run, mean_and_error

# The colours of Okabe and Ito, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
ANCHOR_COLOURS = ("#777777", "#000000", "#BBBBBB")
STYLE: Any = {
    "axes.prop_cycle": cycler(linestyle=("-", ":")) * cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "legend.frameon": False,
}


def curves(axes: Axes, runs: Sequence[Run], anchors: Sequence[str], metric: str, cost: str = "seconds") -> None:
    """The mean ± standard error over the seeds of each method against a cost, up to the shortest run."""
    anchor_colours = iter(ANCHOR_COLOURS)
    for method in dict.fromkeys(run.method for run in runs):
        lists = [run.outcome.curve for run in runs if run.method == method]
        length = min(len(curve[metric]) for curve in lists)
        spent = np.mean([curve[cost][:length] for curve in lists], axis=0)
        mean, error = mean_and_error([curve[metric][:length] for curve in lists])
        if method in anchors:
            axes.axhline(mean[-1], color=next(anchor_colours), linestyle="--", label=method)
        else:
            (line,) = axes.plot(spent, mean, label=method)
            axes.fill_between(spent, mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0)


def histogram(axes: Axes, x: np.ndarray, clean: np.ndarray) -> None:
    """How many examples got which x, true labels apart from false ones."""
    bins = np.linspace(x.min(), x.max(), 40).tolist()
    for part, colour, label in ((clean, COLOURS[0], "true"), (~clean, COLOURS[4], "false")):
        axes.hist(x[part], bins, color=colour, alpha=0.7, label=f"{part.sum()} {label} labels")
    axes.set(xlabel="outer variable x (weight = sigmoid x)", ylabel="training images")
    axes.legend()
