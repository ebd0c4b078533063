"""Poisoning: alter a few training images, within a box, so that a model trained on them fails on others.

    max_x  F(x) = mean over validation of CE_j(y*(x))        |x − x_0| ≤ radius and 0 ≤ x ≤ 1, for every pixel
    y*(x) = argmin_y g(x, y) = mean over training of CE_i(y) + l2 / 2 · ‖y‖²

x are the altered images themselves, which start at the true ones x_0 and keep their labels; all others stay. What
counts is a model trained anew on the altered set, not the y that followed x.

Reference: Muñoz-González et al., "Towards poisoning of deep learning algorithms with back-gradient optimization",
arXiv 1708.08689, section 3. There the images take false labels; here the labels stay true.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

import bilevax as bx
from benchmarks.data.images import IMAGES, Data, ImageName, check_full, load
from benchmarks.harness.loop import Carry
from benchmarks.harness.report import COSTS, Run, mean_and_error
from benchmarks.harness.runner import Method, Options, Task, outer_loops, perform
from benchmarks.harness.style import COLOURS, STYLE, curves
from benchmarks.networks.dense import MODELS
from benchmarks.networks.model import Model, hits, mean_cross_entropy
from benchmarks.tasks.estimators import ESTIMATORS, MOMENTUM, PLAIN, Inner, foreign
from benchmarks.tasks.methods import Shared, first_weights
from bilevax.typing import Array, PyTree

TASK = "poisoning"
L2 = 1e-3
OUTER = {"learning_rate": 0.05}
PICTURES = 8  # of altered images


class PoisoningSetting(NamedTuple):
    """What suits a data set.

    Attributes:
      split: sizes of its parts.
      poisons: altered images among those to train on.
      outer_steps: of each run.
      inner_steps: in each of them.
      anew: steps of the training that is measured.
    """

    split: Mapping[str, int]
    poisons: int
    outer_steps: int
    inner_steps: int
    anew: int


SMALL = PoisoningSetting({"train": 500, "validation": 300}, 25, 150, 20, 400)
LARGE = PoisoningSetting({"train": 2000, "validation": 1000}, 100, 60, 10, 200)
# For a GPU.
FULL = PoisoningSetting({"train": 20_000, "validation": 5000}, 600, 500, 20, 1000)

COLUMNS = {
    "validation_error": ("valid.\nerror", "{:.3f}".format),
    "test_error": ("test\nerror", "{:.3f}".format),
    "anew_loss": ("valid.\nloss", "{:.3f}".format),
    "change": ("mean\nchange", "{:.3f}".format),
    **COSTS,
}
CAPTION = (
    "none: no image altered; random: each pixel moved by the radius, up or down. Errors and loss: of a model trained\n"
    "anew, from its first weights, on the altered set. mean change: of a pixel of an altered image.\n"
)


def poisoned(x: Array, batch: tuple) -> tuple[Array, Array]:
    """The training images, the first ones replaced by x, and their labels."""
    images, labels = batch
    return jnp.concatenate([x, images[len(x) :]]), labels


def inner_loss(model: Model) -> bx.curvature.ModelLoss:
    """g, the training loss with the altered images; x [poisons, pixels]."""
    return bx.curvature.ModelLoss(model.logits, bx.curvature.softmax_cross_entropy, poisoned, l2=L2)


def within(optimizer: optax.GradientTransformation, radius: float) -> optax.GradientTransformation:
    """The optimizer, followed by a projection on images in [0, 1] that differ by `radius` at most from the first ones.

    The state holds the first images.
    """

    def init(x: Array) -> tuple[Any, Array]:
        return optimizer.init(x), x

    def update(grad: Array, state: tuple[Any, Array], x: Array) -> tuple[Array, Any]:
        own, first = state
        step, own = optimizer.update(grad, own, x)
        return optax.projections.projection_box(x + step, *box(first, radius)) - x, (own, first)

    return optax.GradientTransformation(init, update)


def box(first: Array, radius: float) -> tuple[Array, Array]:
    """The smallest and the largest value of each pixel."""
    return jnp.maximum(first - radius, 0), jnp.minimum(first + radius, 1)


def true_images(poisons: int, data: Data) -> Array:
    """The images that are altered, as they were, [poisons, pixels]."""
    return data.batch.inner[0][:poisons]


def scattered(poisons: int, radius: float, data: Data) -> Array:
    """The same with each pixel moved by the radius, up or down at random."""
    first = true_images(poisons, data)
    signs = jax.random.rademacher(jax.random.key(data.seed), first.shape, first.dtype)
    return jnp.clip(first + radius * signs, *box(first, radius))


def evaluation(model: Model, inner: Inner, anew: int) -> Callable[[Data, Carry], dict[str, float | None]]:
    """A function (data, carry) -> errors and loss of a model trained anew on the images in the carry."""
    train = jax.jit(bx.differentiable(bx.inner.no_gradient(inner.loss, inner.optimizer, anew)))

    def evaluate(data: Data, carry: Carry) -> dict[str, float | None]:
        y = train(carry.x, model.init(jax.random.key(data.seed), carry.x.shape[1]), data.batch.inner)
        change = jnp.abs(carry.x - true_images(len(carry.x), data)).mean()
        return {
            "validation_error": 1 - hits(model, y, *data.batch.outer).mean().item(),
            "test_error": 1 - hits(model, y, *data.test).mean().item(),
            "anew_loss": mean_cross_entropy(model, y, data.batch.outer).item(),
            "change": change.item(),
        }

    return evaluate


ANCHORS = ("none", "random")
METHODS = ESTIMATORS


def at_equal_time(runs: Sequence[Run], metric: str) -> tuple[float, dict[str, list[float]]]:
    """The seconds after which the first run had ended, and what each method had reached then, one number a seed."""
    seconds = min(run.outcome.curve["seconds"][-1] for run in runs)
    reached: dict[str, list[float]] = {}
    for run in runs:
        curve = run.outcome.curve
        last = max(np.searchsorted(curve["seconds"], seconds, side="right").item() - 1, 0)
        reached.setdefault(run.method, []).append(curve[metric][last])
    return seconds, reached


def bars(axes: Axes, runs: Sequence[Run], metric: str) -> None:
    """What each method had reached when the fastest one ended."""
    seconds, reached = at_equal_time(runs, metric)
    for place, (method, values) in enumerate(reached.items()):
        mean, error = mean_and_error(values)
        axes.barh(place, mean, xerr=error, color=COLOURS[place % len(COLOURS)])
        axes.text(0, place, f" {method}", va="center", color="white")
    axes.set(xlabel=f"test error after {seconds:.2g} s of each", yticks=[])
    axes.invert_yaxis()


def draw(runs: Sequence[Run], read: Callable[[int], Data], shape: Sequence[int]) -> Figure:
    """Loss and error against time, error after equal time, and altered images of the strongest run."""
    learnt = [run for run in runs if run.method not in ANCHORS and run.finite]
    best = max(learnt, key=lambda run: (-run.seed, run.outcome.metrics["anew_loss"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.5, 1)).flat
        loss, error, equal = top.subplots(1, 3)
        for axes, metric, label in ((loss, "anew_loss", "validation loss"), (error, "test_error", "test error")):
            curves(axes, runs, ANCHORS, metric)
            axes.set(xlabel="run time without compilation (s)", ylabel=label)
        figure.legend(*error.get_legend_handles_labels(), loc="outside upper center", ncols=8)
        bars(equal, learnt, "test_error")
        bottom.suptitle(f"Images before and after ({best.method}, seed {best.seed})")
        gallery(bottom, np.asarray(best.outcome.x), read(best.seed), shape)
    return figure


def gallery(figure: SubFigure, x: np.ndarray, data: Data, shape: Sequence[int]) -> None:
    """The first altered images below the true ones, with their label."""
    for line, images in zip(figure.subplots(2, PICTURES), (data.batch.inner[0], x), strict=True):
        for axes, image, label in zip(line, images, data.truth, strict=False):
            axes.imshow(np.asarray(image).reshape(shape), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(f"{label}", fontsize="small")
            axes.axis("off")


DEFAULTS = Options(tuple(row.name for row in METHODS))


@dataclasses.dataclass(frozen=True)
class Config:
    """Poisoning: alter 5 % of the training images so that a model trained on them fails, and see how far that goes.

    The anchors (no image altered, and random changes) always run. For one GPU: `--data mnist --full --budget 3600`.
    """

    data: ImageName = "digits"
    """Images: scikit-learn's embedded digits, or a public data set."""
    model: Literal["linear", "mlp"] = "linear"
    """Softmax regression, or a network with one hidden layer of 32 units."""
    radius: float = 0.5
    """How far a pixel may move; pixels lie in [0, 1]."""
    full: bool = False
    """20,000 training images of a public data set, for a GPU."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in METHODS])
        if not 0 < self.radius <= 1:
            raise ValueError(f"radius must lie in (0, 1]; got {self.radius:g}. Pass, say, --radius 0.5.")
        check_full(self.data, self.full)

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        images = IMAGES[self.data]
        setting = FULL if self.full else SMALL if images.small else LARGE
        steps = self.common.steps(setting.outer_steps)
        methods = self._methods(setting)

        def read(seed: int) -> Data:
            return load(self.data, seed, corruption=0, **{**images.split, **setting.split})

        task = Task(
            title=f"Poisoning of {self.data}, {self.model} model, "
            f"{setting.poisons} of {setting.split['train']} images altered by up to {self.radius:g}",
            folder=f"{TASK}-{self.data}-{self.model}{'-full' * self.full}",
            outer_steps=steps,
            methods=[method.name for method in methods],
            anchors=ANCHORS,
            runs=functools.partial(outer_loops, TASK, methods, read, steps, self.common),
            columns=COLUMNS,
            caption=CAPTION,
            draw=lambda runs: draw(runs, read, images.shape),
        )
        return perform(task, self.common, self)

    def _methods(self, setting: PoisoningSetting) -> list[Method]:
        model, poisons = MODELS[self.model], setting.poisons
        inner = Inner(inner_loss(model), model.curvature, IMAGES[self.data].rates[self.model], setting.inner_steps)
        first = functools.partial(true_images, poisons)

        def outer_loss(x: Array, y: PyTree, batch: tuple) -> Array:
            return -mean_cross_entropy(model, y, batch)

        def start(x: Callable[[Data], Array]) -> Callable[[Data], tuple[Array, PyTree]]:
            return lambda data: (x(data), first_weights(model, data))

        attack = Shared(
            outer_loss=outer_loss,
            optimizer=within(optax.adam(**OUTER), self.radius),
            start=start(first),
            evaluate=evaluation(model, inner, setting.anew),
            configuration={
                **{"data": self.data, "model": self.model, "radius": self.radius, "poisons": poisons},
                **setting.split,
                **{"l2": L2, "inner_steps": inner.steps, "anew": setting.anew},
                "inner_optimizer": {"sgd": {"learning_rate": inner.learning_rate, "momentum": MOMENTUM}},
                "outer_optimizer": {"adam": OUTER},
            },
        )
        starts = {"none": first, "random": functools.partial(scattered, poisons, self.radius)}
        still = {name: attack.fixed(start=start(starts[name])) for name in ANCHORS}
        rows = self.common.chosen(METHODS, foreign)
        return [
            *(shared.method(name, PLAIN.solver, inner, PLAIN.settings(inner)) for name, shared in still.items()),
            *(attack.method(row.name, row.solver, inner, row.settings(inner)) for row in rows),
        ]
