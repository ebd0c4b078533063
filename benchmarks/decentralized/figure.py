"""The picture of a decentralized task."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from benchmarks.harness.report import Run
from benchmarks.harness.style import COLOURS, STYLE, curves

COSTS = {
    "derivatives": "derivative evaluations of an agent",
    "megabytes": "sent by an agent (MB)",
    "rounds": "rounds of communication",
    "seconds": "run time without compilation (s)",
}
LINES = {"axes.prop_cycle": cycler(linestyle=("-", ":", "--", "-.")) * cycler(color=COLOURS)}


class Panel(NamedTuple):
    """What is drawn: a key of the curves, its label, and "linear" or "log"."""

    metric: str
    label: str
    scale: str = "linear"


GRADIENT = Panel("exact_gradient", "|∇F(x)|²", "log")
LOSS = Panel("exact_loss", "F(x)", "log")


def draw(
    runs: Sequence[Run], panel: Panel, finish: Callable[[Figure, Sequence[Run]], None] | None, loss: Panel = LOSS
) -> Figure:
    """F(x) and a score against four costs.

    Args:
      runs: those that finished, one with a finite outer loss among them.
      panel: what the lower row shows.
      finish: `finish(part of the figure, finite runs)` draws below, if given.
      loss: what the upper row shows.

    Returns:
      A figure, ready for `savefig`.
    """
    finite = [_on_the_way(run) for run in runs if run.finite]
    with matplotlib.rc_context(STYLE | LINES):
        figure = Figure(figsize=(13, 8.5 if finish else 6.5), dpi=150, layout="constrained")
        parts = figure.subfigures(2 if finish else 1, 1, squeeze=False, height_ratios=(5, 2) if finish else (1,)).flat
        panels = parts[0].subplots(2, len(COSTS), sharex="col", sharey="row")
        for column, (cost, label) in zip(panels.T, COSTS.items(), strict=True):
            for axes, shown in zip(column, (loss, panel), strict=True):
                curves(axes, finite, (), shown.metric, cost)
                axes.set(xscale="log", yscale=shown.scale)
            column[1].set(xlabel=label)
            column[1].xaxis.set_minor_formatter(NullFormatter())
        for axes, shown in zip(panels[:, 0], (loss, panel), strict=True):
            axes.set(ylabel=shown.label)
        panels[0, 0].yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 3, 5, 7)), major_formatter="{x:g}", minor_locator=NullLocator()
        )
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7)
        if finish:
            finish(parts[1], finite)
    return figure


def _on_the_way(run: Run) -> Run:
    """Without the start, which has cost nothing and is not to be found on a logarithmic axis."""
    curve = {name: values[1:] for name, values in run.outcome.curve.items()}
    return dataclasses.replace(run, outcome=run.outcome._replace(curve=curve))
