"""The picture of decentralized hyper-cleaning."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.figure import STYLE, curves, histogram
from benchmarks.report import Run

COSTS = {
    "derivatives": "derivative evaluations of an agent",
    "megabytes": "sent by an agent (MB)",
    "rounds": "rounds of communication",
    "seconds": "run time without compilation (s)",
}


def draw(runs: Sequence[Run], clean: Callable[[int], np.ndarray]) -> Figure:
    """Validation loss and test accuracy against four costs, and the learnt weights of the run with the lowest loss.

    Args:
      runs: those that finished, one with a finite outer loss among them.
      clean: seed -> which training labels are true.

    Returns:
      A figure, ready for `savefig`.
    """
    finite = [run for run in runs if run.finite]
    best = min(finite, key=lambda run: (run.seed, run.outcome.metrics["outer_loss"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 8.5), dpi=150, layout="constrained")
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(5, 2)).flat
        panels = top.subplots(2, len(COSTS), sharex="col", sharey="row")
        for (losses, accuracies), (cost, label) in zip(panels.T, COSTS.items(), strict=True):
            curves(losses, finite, (), "outer_loss", cost)
            curves(accuracies, finite, (), "test_accuracy", cost)
            losses.set(xscale="log", yscale="log")
            accuracies.set(xlabel=label)
        panels[0, 0].set(ylabel="validation loss")
        panels[0, 0].yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 3, 5, 7)), major_formatter="{x:g}", minor_locator=NullLocator()
        )
        panels[1, 0].set(ylabel="test accuracy")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7)
        bottom.suptitle(f"Learnt weights ({best.method}, seed {best.seed})")
        histogram(bottom.subplots(), np.asarray(best.outcome.x), clean(best.seed))
    return figure
