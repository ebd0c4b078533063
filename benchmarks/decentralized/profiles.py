"""Performance profiles: how often a method is within a factor of the cheapest, over all tasks.

E. D. Dolan and J. J. Moré. Benchmarking optimization software with performance profiles. Mathematical Programming,
2002.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, PercentFormatter

from benchmarks.decentralized.levels import LOSSES
from benchmarks.decentralized.measured import Measured, measured
from benchmarks.decentralized.records import Results
from benchmarks.harness.style import COLOURS, STYLE

PANELS = {"derivatives": "times the fewest derivative evaluations", "megabytes": "times the fewest bytes"}
FEWEST = 3  # methods of a task that counts
MOST = 64.0  # times the cheapest: the end of the axis
GREY = "#C8C8C8"
GAP = 0.055  # between two labels, of the height
EXACT = ("sldbo", "s3ldbo-0.1", "s3ldbo-ed-0.1", "sparkle-ed", "d-soba")  # solid
SAMPLED = ("dsvrbgd", "dsvrbgd-ed", "gt-sgd", "mdbo")  # dotted, of minibatches


class Profile(NamedTuple):
    """Of one method.

    Attributes:
      ratios: its cost over the least of all methods, for each task, target and seed; inf where it does not arrive.
      tasks: on how many it ran.
    """

    ratios: Sequence[float]
    tasks: int

    def at(self, factors: np.ndarray) -> np.ndarray:
        """The share within these factors of the least."""
        return np.searchsorted(np.sort(self.ratios), factors, side="right") / len(self.ratios)


def groups(results: Results) -> dict[str, Measured]:
    """The runs of each task on one graph that has several methods, and SLDBO, whose end sets the targets."""
    found = {job: measured(results, job) for job in results}
    return {job: runs for job, runs in found.items() if runs.base is not None and len(runs.methods) >= FEWEST}


def costs(runs: Measured, cost: str) -> Iterator[dict[str, float]]:
    """The cost of every method for each target of F and each seed; inf where it does not arrive."""
    for level in LOSSES:
        spent = {method: runs.spent(method, level, cost) for method in runs.methods}
        for seed in sorted(set().union(*spent.values())):
            every = {method: seeds[seed] for method, seeds in spent.items() if seed in seeds}
            yield {method: one.amount if one.reached else math.inf for method, one in every.items()}


def profiles(results: Results, cost: str) -> dict[str, Profile]:
    """Of all methods; targets that none reaches, or that cost nothing, are left out."""
    ratios: dict[str, list[float]] = {}
    tasks: dict[str, set[str]] = {}
    for job, runs in groups(results).items():
        for every in costs(runs, cost):
            least = min(every.values())
            if not 0 < least < math.inf:
                continue
            for method, amount in every.items():
                ratios.setdefault(method, []).append(amount / least)
                tasks.setdefault(method, set()).add(job)
    return {method: Profile(found, len(tasks[method])) for method, found in ratios.items()}


def looks(methods: Mapping[str, Profile]) -> dict[str, tuple[str, str]]:
    """Colour and line of the methods that are named in the picture."""
    exact = [name for name in EXACT if name in methods]
    predicted = [name for name in methods if name.startswith("s3ldbo-predicted") and name.endswith("-0.1")]
    exact = [*exact[: len(COLOURS) - len(predicted)], *predicted]
    sampled = [name for name in SAMPLED if name in methods]
    return {
        **{name: (colour, "-") for name, colour in zip(exact, COLOURS, strict=False)},
        **{name: (colour, ":") for name, colour in zip(sampled, reversed(COLOURS), strict=False)},
    }


def spread(heights: Sequence[float]) -> list[float]:
    """Heights from 0 to 1 in this order, GAP apart at least where there is room, and not far from these."""
    order = np.argsort(heights, kind="stable")
    gap = min(GAP, 1 / max(1, len(heights) - 1))
    steps = gap * np.arange(len(heights))
    upward = np.maximum.accumulate(np.asarray(heights)[order] - steps)  # each at least a gap above the one below it
    placed = np.minimum(upward + steps, 1.0 - steps[::-1])
    found = np.empty(len(heights))
    found[order] = placed
    return found.tolist()


def panel(axes: Axes, found: Mapping[str, Profile], label: str) -> None:
    """One cost: those without a name in grey, and the names of the others beside their ends."""
    factors, style = np.geomspace(1.0, MOST, 400), looks(found)
    for method, profile in found.items():
        if method not in style:
            axes.plot(factors, profile.at(factors), color=GREY, linewidth=0.8, linestyle="-", zorder=1)
    for method, (colour, line) in style.items():
        axes.plot(factors, found[method].at(factors), color=colour, linestyle=line, linewidth=1.8, zorder=2)
    every = max(profile.tasks for profile in found.values())
    ends = [float(found[method].at(factors[-1:])[0]) for method in style]
    means = [float(found[method].at(factors).mean()) for method in style]  # ends that are the same stand in this order
    heights = spread([end + mean / 1e3 for end, mean in zip(ends, means, strict=True)])
    for (method, (colour, line)), end, height in zip(style.items(), ends, heights, strict=True):
        tasks = found[method].tasks
        words = method + f" ({tasks} task{'s' * (tasks > 1)})" * (tasks < every)
        beside = axes.get_yaxis_transform()
        axes.plot((1, 1.03, 1.07), (end, height, height), line, color=colour, transform=beside, clip_on=False)
        axes.text(1.085, height, words, color=colour, va="center", fontsize=8, transform=beside)
    axes.set(xscale="log", xlim=(1, MOST), ylim=(0, 1.02), xlabel=label)
    ticks = [2.0**power for power in range(int(math.log2(MOST)) + 1)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set(minor_locator=NullLocator(), minor_formatter=NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def draw(results: Results) -> Figure | None:
    """Evaluations beside bytes; None where no runs have targets."""
    found = {cost: profiles(results, cost) for cost in PANELS}
    if not all(found.values()):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.6), dpi=110, layout="constrained")
        both = figure.subplots(1, len(PANELS), sharey=True)
        for axes, (cost, label) in zip(both, PANELS.items(), strict=True):
            panel(axes, found[cost], label)
        both[0].set(ylabel="tasks, targets and seeds that are reached")
    return figure
