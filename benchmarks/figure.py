"""The picture of data hyper-cleaning."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.corrupted import Data
from benchmarks.report import Run, mean_and_error

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
IMAGES = (3, 7)
IN_SAMPLE = "validation"  # the anchor whose validation loss is its training loss


def draw(runs: Sequence[Run], anchors: Sequence[str], load: Callable[[int], Data]) -> Figure:
    """Loss and accuracy against time, the learnt weights, and the images with the lowest ones.

    Args:
      runs: those that finished, one of a method with a finite outer loss among them.
      anchors: names of those drawn as dashed lines, at their last value.
      load: seed -> data.

    Returns:
      A figure, ready for `savefig`.
    """
    learnt = [run for run in runs if run.method not in anchors and run.finite]
    best = min(learnt, key=lambda run: (run.seed, run.outcome.metrics["outer_loss"]))
    data = load(best.seed)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.6), dpi=150, layout="constrained")
        top, bottom = figure.subfigures(2, 1, squeeze=False).flat
        left, right = bottom.subfigures(1, 2, squeeze=False).flat
        loss, accuracy = top.subplots(1, 2)
        curves(loss, [run for run in runs if run.method != IN_SAMPLE], anchors, "outer_loss")
        loss.set(xlabel="run time without compilation (s)", ylabel="validation loss", yscale="log")
        loss.yaxis.set(
            major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), major_formatter="{x:g}", minor_locator=NullLocator()
        )
        curves(accuracy, runs, anchors, "test_accuracy")
        accuracy.set(xlabel="run time without compilation (s)", ylabel="test accuracy")
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside upper center", ncols=8)
        left.suptitle(f"Learnt weights ({best.method}, seed {best.seed})")
        histogram(left.subplots(), np.asarray(best.outcome.x), np.asarray(data.clean))
        right.suptitle("Lowest weights: given label → true label")
        gallery(right, np.asarray(best.outcome.x), data)
    return figure


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


def gallery(figure: SubFigure, x: np.ndarray, data: Data) -> None:
    """The images with the lowest weights, each with its given and its true label."""
    images, given = (np.asarray(part) for part in data.batch.inner)
    side = int(np.sqrt(images.shape[1]))
    for axes, index in zip(figure.subplots(*IMAGES).flat, np.argsort(x), strict=False):
        axes.imshow(images[index].reshape(side, side), cmap="gray_r")
        axes.set_title(f"{given[index]} → {data.truth[index]}", color="black" if data.clean[index] else COLOURS[4])
        axes.axis("off")
