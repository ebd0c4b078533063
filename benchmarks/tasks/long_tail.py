"""Long-tailed classes: learn how much a training image counts from its loss, on a few images of every class.

    min_x  f(y*(x)) = mean over a balanced validation set of CE_j(y*)
    y*(x) = argmin_y g(x, y) = mean over training of w(ℓ_i; x) · CE_i(y) + l2 / 2 · ‖y‖²

x are the weights of a network w with one hidden layer, from the loss ℓ_i of an image to its weight; ℓ_i is taken at the
y with which an outer step starts, and the weights of a batch are scaled to a mean of one. The training set has few
images of the last classes.

Reference: Shu et al., "Meta-Weight-Net", arXiv 1902.07379, sections 2 and 4.1.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import bilevax as bx
from benchmarks.data.images import IMAGES, ImageName, check_full, shares
from benchmarks.harness.loop import Carry
from benchmarks.harness.report import COSTS, Run
from benchmarks.harness.runner import Method, Options, Task, outer_loops, perform
from benchmarks.harness.style import COLOURS, STYLE, curves
from benchmarks.networks.classifiers import classifier
from benchmarks.networks.dense import MODELS, affine, layer, random_layers
from benchmarks.networks.model import Model, hits, mean_cross_entropy
from benchmarks.tasks.estimators import ESTIMATORS, MOMENTUM, PLAIN, Inner, foreign
from benchmarks.tasks.methods import Shared
from bilevax.typing import Array, Key, PyTree

TASK = "long_tail"
OUTER_RATE = 0.1  # the first step size of Adam, which decays to zero along a cosine over the outer steps
CLASSES, TAIL = 10, 3  # all of them, and the last ones
HIDDEN = {"weights": 100, "mlp": 64}  # units of the weight network, and of the classifier


class LongTailSetting(NamedTuple):
    """What suits a data set.

    Attributes:
      largest, smallest: training images of the first and of the last class.
      validation: images of each class.
      test: images in all; None for all there are.
      outer_steps: of each run.
      inner_steps: in each of them.
      l2: weight decay.
    """

    largest: int
    smallest: int
    validation: int
    test: int | None
    outer_steps: int
    inner_steps: int
    l2: float


SMALL, LARGE = LongTailSetting(120, 3, 5, None, 300, 10, 1e-2), LongTailSetting(1000, 10, 10, 2000, 60, 10, 1e-3)
CONVOLUTIONAL_RATE = 0.05  # of the inner steps of the convolutional models; the others have that of the data set
MINIBATCH = 200  # images of an inner step of the convolutional models; the others take all
# For a GPU: an imbalance of 100.
FULL: dict[str, Any] = {"largest": 4900, "smallest": 49, "test": None, "outer_steps": 2000}

COLUMNS = {
    "test_accuracy": ("test\nacc.", "{:.3f}".format),
    "tail_accuracy": ("tail\nacc.", "{:.3f}".format),
    "outer_loss": ("outer\nloss", "{:.3f}".format),
    **COSTS,
}
CAPTION = (
    "test: mean over the classes of the accuracy on each; tail: over the three rarest alone. uniform: all images\n"
    "count the same; balanced: all classes do; validation: trained on the balanced images alone.\n"
)


class Data(NamedTuple):
    """What one seed trains and is tested on.

    Attributes:
      seed: of the draw.
      batch: outer = validation (images [N, pixels], labels [N]), inner = training.
      test: images and labels.
    """

    seed: int
    batch: bx.Batch
    test: tuple[Array, Array]

    @property
    def counts(self) -> np.ndarray:
        """Training images of each class, [CLASSES]."""
        return np.bincount(self.batch.inner[1], minlength=CLASSES)


def load(name: str, setting: LongTailSetting, seed: int) -> Data:
    """Draws a balanced validation set and training images whose numbers fall geometrically from class to class."""
    (images, labels), others = IMAGES[name].read(1)
    random = np.random.default_rng(seed)
    counts = np.geomspace(setting.largest, setting.smallest, CLASSES).round().astype(int)
    parts = []
    for label, count in enumerate(counts):
        own = random.permutation(np.flatnonzero(labels == label))
        parts.append(np.split(own, [setting.validation, setting.validation + count]))
    validation, train, rest = map(np.concatenate, zip(*parts, strict=True))
    tests, test_labels = (images, labels) if others is None else others
    tested = rest if others is None else random.permutation(len(test_labels))[: setting.test]

    def part(rows: np.ndarray, images: np.ndarray, labels: np.ndarray) -> tuple[Array, Array]:
        return shares(images[rows]), jnp.asarray(labels[rows], jnp.int32)

    batch = bx.Batch(outer=part(validation, images, labels), inner=part(train, images, labels))
    return Data(seed, batch, part(tested, tests, test_labels))


def weight_network(key: Key) -> PyTree:
    """The first x."""
    first, last = jax.random.split(key)
    return {"first": layer(first, 1, HIDDEN["weights"]), "last": layer(last, HIDDEN["weights"], 1)}


def learnt(x: PyTree, losses: Array) -> Array:
    """Weights of images with these losses [N], between 0 and 1."""
    hidden = jax.nn.relu(affine(x["first"], losses[:, None]))
    return jax.nn.sigmoid(affine(x["last"], hidden)[:, 0])


def scaled(weights: Array) -> Array:
    """The same with a mean of one."""
    return weights / weights.mean()


def inner_loss(model: Model, l2: float, weights: Callable[[Any, Array], Array]) -> bx.curvature.ModelLoss:
    """g, the weighted training loss; a batch is (images, labels, what `weights(x, ·)` reads)."""
    return bx.curvature.ModelLoss(
        model=model.logits,
        loss=bx.curvature.softmax_cross_entropy,
        split=lambda x, batch: batch[:2],
        weights=lambda x, batch: scaled(weights(x, batch[2])),
        l2=l2,
    )


def with_losses(hypergradient: bx.problem.Hypergradient, model: Model) -> bx.problem.Hypergradient:
    """The hypergradient on batches of images and labels, to which it adds the losses at the warm y as constants."""

    def extended(y: PyTree, inner: tuple) -> tuple:
        images, labels = inner
        return images, labels, bx.curvature.softmax_cross_entropy.value(model.logits(y, images), labels)

    def init(x: PyTree, y: PyTree, batch: bx.Batch | None = None, *, opt_state: Any = None) -> Any:
        given = None if batch is None else bx.Batch(batch.outer, extended(y, batch.inner))
        return hypergradient.init(x, y, given)

    def estimate(key: Key | None, state: Any, x: PyTree, batch: bx.Batch) -> tuple:
        return hypergradient.estimate(key, state, x, bx.Batch(batch.outer, extended(state.y, batch.inner)))

    return bx.problem.Hypergradient(init, estimate)


def by_class(model: Model, y: PyTree, data: Data) -> np.ndarray:
    """Test accuracy on each class, [CLASSES]."""
    right, labels = np.asarray(hits(model, y, *data.test)), np.asarray(data.test[1])
    return np.array([right[labels == label].mean() for label in range(CLASSES)])


def evaluate(model: Model, data: Data, carry: Carry) -> dict[str, float | None]:
    """Mean accuracy over all classes, and over the rarest."""
    accuracies = by_class(model, carry.estimator.y, data)
    return {"test_accuracy": accuracies.mean().item(), "tail_accuracy": accuracies[-TAIL:].mean().item()}


# Weights that do not change, [N], of the images that are trained on.
ANCHORS: dict[str, Callable[[Data], bx.Batch]] = {
    "uniform": lambda data: bx.Batch(data.batch.outer, (*data.batch.inner, jnp.ones(len(data.batch.inner[1])))),
    "balanced": lambda data: bx.Batch(
        data.batch.outer, (*data.batch.inner, jnp.asarray(1 / data.counts, jnp.float32)[data.batch.inner[1]])
    ),
    "validation": lambda data: bx.Batch(data.batch.outer, (*data.batch.outer, jnp.ones(len(data.batch.outer[1])))),
}
METHODS = ESTIMATORS


def draw(runs: Sequence[Run], read: Callable[[int], Data]) -> Figure:
    """Accuracies against time, and what the weight networks of the first seed make of a loss."""
    learners = [run for run in runs if run.method not in ANCHORS]
    seed = next(run.seed for run in learners if run.finite)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
        (accuracy, tail), (weight, classes) = figure.subplots(2, 2)
        for axes, metric in ((accuracy, "test_accuracy"), (tail, "tail_accuracy")):
            curves(axes, runs, [*ANCHORS], metric)
        accuracy.set(xlabel="run time without compilation (s)", ylabel="test accuracy, mean over classes")
        tail.set(xlabel="run time without compilation (s)", ylabel=f"test accuracy, the {TAIL} rarest classes")
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside upper center", ncols=8)
        losses = np.linspace(0, 2, 200, dtype=np.float32)
        for run in learners:
            if run.seed == seed:
                weight.plot(losses, learnt(run.outcome.x, jnp.asarray(losses)))
        weight.set(xlabel="loss of a training image", ylabel=f"its weight before scaling, seed {seed}")
        counts = read(seed).counts
        classes.bar(np.arange(CLASSES), counts, color=COLOURS[0])
        classes.set(xlabel="class", ylabel="training images", xticks=range(CLASSES), yscale="log")
    return figure


DEFAULTS = Options(tuple(row.name for row in METHODS))


@dataclasses.dataclass(frozen=True)
class Config:
    """Long-tailed classes: learn a network from the loss of a training image to its weight, on few balanced images.

    The anchors (equal images, equal classes, and the balanced images alone) always run. For one GPU: `--data cifar10
    --model resnet18 --full --budget 3600`.
    """

    data: ImageName = "digits"
    """Images: scikit-learn's embedded digits, or a public data set; CIFAR-10 from lossy JPEG."""
    model: Literal["linear", "mlp", "cnn", "resnet", "resnet18"] = "mlp"
    """Softmax regression, a network with one hidden layer of 64 units, or convolutional ones with minibatches."""
    full: bool = False
    """4,900 images of the first class and 49 of the last, and 2,000 outer steps, for a GPU."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in METHODS])
        check_full(self.data, self.full)

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        setting = (SMALL if IMAGES[self.data].small else LARGE)._replace(**(FULL if self.full else {}))
        steps = self.common.steps(setting.outer_steps)
        methods = self._methods(setting, steps)
        read = functools.partial(load, self.data, setting)
        task = Task(
            title=f"Long-tailed {self.data}, {self.model}, {setting.largest} to {setting.smallest} images a class",
            folder=f"{TASK}-{self.data}-{self.model}{'-full' * self.full}",
            outer_steps=steps,
            methods=[method.name for method in methods],
            anchors=[*ANCHORS],
            runs=functools.partial(outer_loops, TASK, methods, read, steps, self.common),
            columns=COLUMNS,
            caption=CAPTION,
            draw=lambda runs: draw(runs, read),
        )
        return perform(task, self.common, self)

    def _methods(self, setting: LongTailSetting, steps: int) -> list[Method]:
        model = classifier(self.model)
        if self.model == "mlp":
            model = model._replace(init=functools.partial(random_layers, HIDDEN["mlp"]))
        rate = IMAGES[self.data].rates[self.model] if self.model in MODELS else CONVOLUTIONAL_RATE
        minibatch = None if self.model in MODELS and not self.full else MINIBATCH
        weighted = Inner(inner_loss(model, setting.l2, learnt), model.curvature, rate, setting.inner_steps, minibatch)
        fixed = weighted._replace(loss=inner_loss(model, setting.l2, lambda x, weights: weights))

        def outer_loss(x: PyTree, y: PyTree, batch: tuple) -> Array:
            return mean_cross_entropy(model, y, batch)

        def start(data: Data) -> tuple[PyTree, PyTree]:
            x_key, y_key = jax.random.split(jax.random.key(data.seed))
            return weight_network(x_key), model.init(y_key, data.batch.inner[0].shape[1])

        shared = Shared(
            outer_loss=outer_loss,
            optimizer=optax.adam(optax.cosine_decay_schedule(OUTER_RATE, steps)),
            start=start,
            evaluate=functools.partial(evaluate, model),
            configuration={
                **{"data": self.data, "model": self.model, "hidden": HIDDEN, "minibatch": minibatch},
                **setting._asdict(),
                "inner_optimizer": {"sgd": {"learning_rate": rate, "momentum": MOMENTUM}},
                "outer_optimizer": {"adam": {"cosine_decay_schedule": OUTER_RATE}},
            },
        )
        learning = shared._replace(around=lambda hypergradient: with_losses(hypergradient, model))
        anchors = {name: shared.fixed(batch=batch) for name, batch in ANCHORS.items()}
        return [
            *(one.method(name, PLAIN.solver, fixed, PLAIN.settings(fixed)) for name, one in anchors.items()),
            *(
                learning.method(row.name, row.solver, weighted, row.settings(weighted))
                for row in self.common.chosen(METHODS, foreign)
            ),
        ]
