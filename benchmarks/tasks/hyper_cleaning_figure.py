"""The picture of data hyper-cleaning."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.data.images import Data
from benchmarks.harness.report import Run
from benchmarks.harness.style import COLOURS, STYLE, curves, histogram

PICTURES = (3, 7)
IN_SAMPLE = "validation"  # the anchor whose validation loss is its training loss


def draw(
    runs: Sequence[Run], anchors: Sequence[str], load: Callable[[int], Data], shape: Sequence[int], label: str
) -> Figure:
    """Loss and accuracy against time, the learnt weights, and the images with the lowest ones.

    Args:
      runs: those that finished, one of a method with a finite outer loss among them.
      anchors: names of those drawn as dashed lines, at their last value.
      load: seed -> data.
      shape: of an image.
      label: of the axis of x.

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
        weights = left.subplots()
        histogram(weights, np.asarray(best.outcome.x), np.asarray(data.clean))
        weights.set_xlabel(label)
        right.suptitle("Lowest weights: given label → true label")
        gallery(right, np.asarray(best.outcome.x), data, shape)
    return figure


def gallery(figure: SubFigure, x: np.ndarray, data: Data, shape: Sequence[int]) -> None:
    """The images with the lowest weights, each with its given and its true label."""
    images, given = (np.asarray(part) for part in data.batch.inner)
    for axes, index in zip(figure.subplots(*PICTURES).flat, np.argsort(x), strict=False):
        axes.imshow(images[index].reshape(shape), cmap="gray_r")
        axes.set_title(f"{given[index]} → {data.truth[index]}", color="black" if data.clean[index] else COLOURS[4])
        axes.axis("off")
