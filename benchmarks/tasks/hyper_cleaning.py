"""Data hyper-cleaning: learn a weight for each training example, so that false labels lose their influence.

    min_x  f(y*(x)) = mean over validation of CE_j(y*)
    y*(x) = argmin_y g(x, y) = mean over training of sigmoid(x_i) · CE_i(y) + l2 / 2 · ‖y‖²

Reference: Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", arXiv 1703.01785,
section 5.1.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from sklearn.metrics import roc_auc_score

import bilevax as bx
from benchmarks.data.images import IMAGES, Data, ImageName, check_full, load
from benchmarks.harness.loop import Carry
from benchmarks.harness.report import COSTS
from benchmarks.harness.runner import Method, Options, Task, outer_loops, perform
from benchmarks.networks.classifiers import classifier, ladder
from benchmarks.networks.dense import MODELS
from benchmarks.networks.model import Model, accuracy, mean_cross_entropy
from benchmarks.tasks import forms
from benchmarks.tasks.estimators import ESTIMATORS, MOMENTUM, Inner, foreign, no_gradient
from benchmarks.tasks.hyper_cleaning_figure import draw
from benchmarks.tasks.methods import Shared, draw_outer, first_weights
from bilevax.typing import Array, PyTree

TASK = "hyper_cleaning"
L2 = 1e-3
SCORES = forms.scores(L2, learning_rate=0.1)
CORRUPTION = 0.5


class CleaningSetting(NamedTuple):
    """What suits a data set: outer steps of each run, and inner steps in each of them."""

    outer_steps: int
    inner_steps: int


SMALL, LARGE = CleaningSetting(300, 20), CleaningSetting(40, 10)
MINIBATCH = 200  # images of an inner step of the convolutional models; the others take all images
MINIBATCH_STEPS = 10  # inner steps of the models that take minibatches
# Their quick runs: outer steps, and methods unless some are named; each takes long to compile.
QUICK_STEPS, QUICK_METHODS = 10, ("identity", "kfac")
# For a GPU: the sizes of the published runs.
FULL = {"train": 45_000, "validation": 5000}
FULL_STEPS = 1000
# What the code beside arXiv 2603.29108 chooses: all batches of one size, plain SGD on both levels.
PUBLISHED = forms.published(learning_rate=1.0)
PUBLISHED_RATE, PUBLISHED_BATCH = 1e-3, 128
FULL_PUBLISHED = {"train": 50_000, "validation": 5000}  # which CIFAR-10 has not
WIDTHS = {"mlp": 256, "lenet": 84}  # published ones of the networks whose width and depth can be told

COLUMNS = {
    "test_accuracy": ("test\nacc.", "{:.3f}".format),
    "auc": ("weight\nAUC", "{:.3f}".format),
    "outer_loss": ("outer\nloss", "{:.3f}".format),
    **COSTS,
}
CAPTION = (
    "corrupted: trained on all labels as given; clean: on the true ones only; validation: on the validation images\n"
    "alone. outer loss: on the validation images; weight AUC: of true against false labels.\n"
)
GAUSS_NEWTON = (
    "neumann, cg: with the Gauss–Newton matrix in place of the Hessian, which is not positive definite here.\n"
)


def inner_loss(model: Model, form: forms.Form = SCORES) -> bx.curvature.ModelLoss:
    """g, the weighted training loss; x [N], and a batch is (images, labels, their numbers in x)."""
    return bx.curvature.ModelLoss(
        model=model.logits,
        loss=bx.curvature.softmax_cross_entropy,
        split=lambda x, batch: batch[:2],
        weights=lambda x, batch: form.weights(x[batch[2]]),
        l2=form.l2,
    )


def outer_loss(model: Model, x: Array, y: PyTree, batch: tuple) -> Array:
    """f, the validation loss."""
    return mean_cross_entropy(model, y, batch)


def evaluate(
    model: Model, learns: bool, data: Data, carry: Carry, form: forms.Form = SCORES
) -> dict[str, float | None]:
    """Test accuracy, and the AUC with which learnt weights tell true labels from false ones."""
    test_accuracy = accuracy(model, carry.estimator.y, *data.test)
    scores: dict[str, float | None] = {"test_accuracy": test_accuracy, "auc": None}
    if learns:
        weights = np.asarray(form.weights(carry.x))
        scores["auc"] = float(roc_auc_score(data.clean, weights)) if np.isfinite(weights).all() else float("nan")
    return scores


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: in lower case, also the name of its files.
      solver: `solver(inner, **settings)` builds the inner solver.
      settings: `settings(inner)`, what it is built with.
      weights: `weights(data)`, the first of the examples, [N].
      batch: `batch(data)`, what it trains and validates on.
      learns: whether the outer optimizer moves x.
    """

    name: str
    solver: Callable[..., bx.problem.InnerSolver]
    settings: Callable[[Inner], Mapping[str, Any]]
    weights: Callable[[Data], Array] = lambda data: jnp.full(data.clean.shape, 0.5)
    batch: Callable[[Data], bx.Batch] = lambda data: data.batch
    learns: bool = True


METHODS = tuple(Row(*estimator) for estimator in ESTIMATORS)

# Plain training with fixed weights, for as many steps.
anchor = functools.partial(Row, solver=no_gradient, settings=lambda inner: {"steps": inner.steps}, learns=False)

ANCHORS = (
    anchor("corrupted", weights=lambda data: jnp.ones(data.clean.shape)),
    anchor("clean", weights=lambda data: jnp.where(data.clean, 1.0, 0.0)),
    anchor(
        "validation",
        weights=lambda data: jnp.ones(len(data.batch.outer[1])),
        batch=lambda data: bx.Batch(data.batch.outer, data.batch.outer),
    ),
)


def standardized(data: Data) -> Data:
    """The images with mean 0 and variance 1 over all pixels of the training ones."""
    images = data.batch.inner[0]
    mean, spread = images.mean(), images.std() + 1e-4
    parts = ((found - mean) / spread for found in (data.batch.outer[0], images, data.test[0]))
    outer, inner, test = parts
    return data._replace(
        batch=bx.Batch((outer, data.batch.outer[1]), (inner, data.batch.inner[1])), test=(test, data.test[1])
    )


def numbered(batch: bx.Batch) -> bx.Batch:
    """The training images with their numbers, by which a minibatch finds its weights."""
    return bx.Batch(batch.outer, (*batch.inner, jnp.arange(len(batch.inner[1]))))


def method(
    row: Row,
    model: Model,
    inner: Inner,
    configuration: Mapping[str, Any],
    form: forms.Form = SCORES,
    outer_batch: int | None = None,
) -> Method:
    """The row on one problem; with a minibatch of the validation images in each outer step, if its size is given."""
    drawn = {} if outer_batch is None else {"around": functools.partial(draw_outer, size=outer_batch)}
    shared = Shared(
        outer_loss=functools.partial(outer_loss, model),
        optimizer=form.optimizer,
        start=lambda data: (form.start(row.weights(data)), first_weights(model, data)),
        batch=lambda data: numbered(row.batch(data)),
        evaluate=functools.partial(evaluate, model, row.learns, form=form),
        configuration={
            **configuration,
            **{"l2": form.l2, "inner_steps": inner.steps, "minibatch": inner.minibatch, "outer_batch": outer_batch},
            "inner_optimizer": {"sgd": {"learning_rate": inner.learning_rate, "momentum": MOMENTUM}},
            "outer_optimizer": form.named,
        },
        **drawn,
    )
    return (shared if row.learns else shared.fixed()).method(row.name, row.solver, inner, row.settings(inner))


DEFAULTS = Options(tuple(row.name for row in METHODS))


@dataclasses.dataclass(frozen=True)
class Config:
    """Data hyper-cleaning: learn a weight for each training example, some of whose labels are redrawn at random.

    The anchors (plain training on the corrupted labels, on the clean subset, and on the validation images) always run.
    For one GPU: `--full --budget 3600`, also with `--model resnet18`.
    """

    data: ImageName = "digits"
    """Images: scikit-learn's embedded digits, or a public data set; CIFAR-10 from lossy JPEG."""
    model: Literal["linear", "mlp", "cnn", "lenet", "resnet", "resnet18"] = "linear"
    """Softmax regression, a network with one hidden layer of 32 units, a small convolutional one, LeNet, or residual
    ones with 8 and 18 layers; the convolutional ones take minibatches."""
    width: int | None = None
    """Units of each hidden layer of an mlp with ReLU, or of each hidden layer of lenet after its first."""
    depth: int | None = None
    """How many such layers; by default one."""
    corruption: float = CORRUPTION
    """Probability with which a training label is redrawn."""
    full: bool = False
    """The sizes of published runs, 45,000 training and 5,000 validation images and 1,000 outer steps, for a GPU."""
    as_published: bool = False
    """The settings of the code beside arXiv 2603.29108: weights in [0, 1] by projection, which start at 1/2; SGD 1e-3
    with momentum 0.9 that lives on, outer SGD 1 with momentum 0.9; batches of 128 at both levels, ten inner steps, no
    weight decay; images of mean 0 and variance 1; an mlp has 256 units with ReLU."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in METHODS])
        for name in ("width", "depth"):
            value = getattr(self, name)
            if value is not None and (self.model not in WIDTHS or value < 1):
                raise ValueError(
                    f"{name} must be an int >= 1, with {' or '.join(WIDTHS)}; got {value} with {self.model}. Pass, "
                    f"say, --model mlp --{name} 2."
                )
        if self.model == "lenet" and min(IMAGES[self.data].shape[:2]) < 16:
            raise ValueError(f"model lenet needs images of 16 pixels a side; got data={self.data}. Pass --data mnist.")
        if not 0 < self.corruption < 1:
            raise ValueError(
                f"corruption must be a probability, 0 < corruption < 1, for weights that tell true labels from false "
                f"ones; got {self.corruption:g}. Pass, say, --corruption 0.4."
            )
        check_full(self.data, self.full)

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        images, model, form = IMAGES[self.data], self._network, PUBLISHED if self.as_published else SCORES
        setting = SMALL if images.small else LARGE
        split = FULL if self.full else images.split
        split = FULL_PUBLISHED if self.full and self.as_published and self.data != "cifar10" else split
        minibatch = None if self.model in MODELS and not self.full else MINIBATCH
        minibatch = PUBLISHED_BATCH if self.as_published else minibatch
        inner_steps = MINIBATCH_STEPS if minibatch else setting.inner_steps
        rate = PUBLISHED_RATE if self.as_published else images.rates[self.model]
        inner = Inner(inner_loss(model, form), model.curvature, rate, inner_steps, minibatch)
        inner = inner._replace(cross=1) if self.as_published else inner
        outer_batch = PUBLISHED_BATCH if self.as_published else None
        steps = self.common.steps(FULL_STEPS if self.full else setting.outer_steps)
        steps = min(steps, QUICK_STEPS) if self.common.quick and minibatch else steps
        short = self.common.quick and minibatch and self.common.methods == DEFAULTS.methods
        options = dataclasses.replace(self.common, methods=QUICK_METHODS) if short else self.common
        rows = [*ANCHORS, *options.chosen(METHODS, lambda function: Row(*foreign(function)))]
        sizes = {"width": self.width, "depth": self.depth}
        configuration = {"data": self.data, "model": self.model, **sizes, "corruption": self.corruption, **split}
        methods = [method(row, model, inner, configuration, form, outer_batch) for row in rows]
        anchors = [row.name for row in ANCHORS]

        def read(seed: int) -> Data:
            data = load(self.data, seed, corruption=self.corruption, **split)
            return standardized(data) if self.as_published else data

        task = Task(
            title=f"Data hyper-cleaning of {self.data}, {self.model} model, {self.corruption:.0%} of labels redrawn"
            f"{', as published' * self.as_published}",
            folder=self._folder,
            outer_steps=steps,
            methods=[row.name for row in rows],
            anchors=anchors,
            runs=functools.partial(outer_loops, TASK, methods, read, steps, self.common),
            columns=COLUMNS,
            caption=CAPTION + (GAUSS_NEWTON if model.curvature is bx.curvature.gauss_newton else ""),
            draw=lambda runs: draw(runs, anchors, read, images.shape, form.label),
        )
        return perform(task, self.common, self)

    @property
    def _network(self) -> Model:
        """The model; of the width and depth that are told, or published."""
        told = self.width is not None or self.depth is not None or (self.as_published and self.model == "mlp")
        return ladder(self.model, self.width or WIDTHS[self.model], self.depth or 1) if told else classifier(self.model)

    @property
    def _folder(self) -> str:
        first = (self.data, self.model) == ("digits", "linear")
        share = "" if self.corruption == CORRUPTION else f"-{self.corruption:g}"
        sizes = "".join(f"-{value}-{name}" for name in ("width", "depth") if (value := getattr(self, name)) is not None)
        name = f"{TASK}{'' if first else f'-{self.data}-{self.model}'}{sizes}{share}"
        return f"{name}{'-full' * self.full}{'-as-published' * self.as_published}"
