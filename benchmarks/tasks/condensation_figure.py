"""The picture of data condensation: accuracy against outer steps and against memory, and the learnt images."""

from collections import defaultdict
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.harness.report import Run, mean_and_error
from benchmarks.harness.style import COLOURS, STYLE, curves

CLASSES = 10
MARKERS = "os^"  # one after each round of the colours


def chosen(runs: Sequence[Run]) -> list[Run]:
    """The runs, of each estimator and T those with the rate whose mean validation accuracy is highest."""
    methods: defaultdict[tuple, defaultdict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        methods[run.configuration["estimator"], run.configuration["inner_steps"]][run.method].append(run)

    def accuracy(runs: list[Run]) -> float:
        mean = np.mean([run.outcome.metrics["validation_accuracy"] for run in runs])
        return mean.item() if np.isfinite(mean) else -1.0

    return [run for rates in methods.values() for run in max(rates.values(), key=accuracy)]


def draw(runs: Sequence[Run], anchors: Sequence[str], shape: Sequence[int]) -> Figure:
    """For the longest training accuracy against outer steps and the images of the first seed; all in the third."""
    best = chosen(runs)
    longest = max(run.configuration["inner_steps"] for run in best)
    shown = [run for run in best if run.configuration["inner_steps"] == longest]
    pictured = [run for run in shown if run.seed == shown[0].seed and run.finite]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4 + 0.62 * len(pictured)), dpi=150, layout="constrained")
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(4, 0.62 * len(pictured))).flat
        steps, memory = top.subplots(1, 2)
        curves(steps, shown, anchors, "test_accuracy", "outer_step")
        steps.set(xlabel="outer step", ylabel="test accuracy", title=f"T = {longest}, mean ± standard error")
        figure.legend(*steps.get_legend_handles_labels(), loc="outside upper center", ncols=5)
        points(memory, [run for run in best if run.method not in anchors])
        bottom.suptitle(f"Learnt images, one of each class, seed {shown[0].seed}")
        gallery(bottom, pictured, shape)
    return figure


def points(axes: Axes, runs: Sequence[Run]) -> None:
    """Accuracy against temporary memory, the points of an estimator with several T joined by a line."""
    for number, estimator in enumerate(dict.fromkeys(run.configuration["estimator"] for run in runs)):
        own = [run for run in runs if run.configuration["estimator"] == estimator]
        place: list[tuple[float, ...]] = []
        for T in sorted({run.configuration["inner_steps"] for run in own}):
            metrics = [run.outcome.metrics for run in own if run.configuration["inner_steps"] == T]
            mean, error = mean_and_error([each["test_accuracy"] for each in metrics])
            place.append(((metrics[0]["temp_bytes"] or np.nan) / 2**20, mean.item(), error.item()))
        memory, accuracy, errors = zip(*place, strict=True)
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        axes.errorbar(memory, accuracy, errors, marker=marker, capsize=2, label=estimator)
    axes.legend(fontsize="small")
    axes.set(xlabel="temporary memory (MiB)", ylabel="test accuracy", xscale="log", title="cheap is left, good is up")
    axes.xaxis.set(
        major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), major_formatter="{x:g}", minor_locator=NullLocator()
    )


def gallery(figure: SubFigure, runs: Sequence[Run], shape: Sequence[int]) -> None:
    """A line of images for each run, the first one of each class."""
    for line, run in zip(figure.subplots(len(runs), CLASSES, squeeze=False), runs, strict=True):
        x = np.asarray(run.outcome.x)
        for axes, image in zip(line, x[:: len(x) // CLASSES], strict=True):
            axes.imshow(image.reshape(shape), cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(run.configuration["estimator"], rotation=0, ha="right", va="center", fontsize="small")
