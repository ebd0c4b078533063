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

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from sklearn.metrics import roc_auc_score

import bilevax as bx
from benchmarks.corrupted import Data, load
from benchmarks.figure import draw
from benchmarks.loop import Carry
from benchmarks.report import COSTS
from benchmarks.runner import Method, Options, Task, outer_loops, perform

TASK = "hyper_cleaning"
L2 = 1e-3
MOMENTUM = 0.9
OUTER = {"learning_rate": 0.1}
HIDDEN = 32


class Setting(NamedTuple):
    """What suits a data set.

    Attributes:
      split: sizes of its parts.
      outer_steps: of each run.
      inner_steps: in each of them.
      learning_rates: of the inner steps, for each model.
    """

    split: Mapping[str, Any]
    outer_steps: int
    inner_steps: int
    learning_rates: Mapping[str, float]


DIGITS = {"train": 1000, "validation": 300, "corruption": 0.5}
MNIST = {"train": 4000, "validation": 500, "corruption": 0.5}
SETTINGS = {
    "digits": Setting(DIGITS, 300, 20, {"linear": 0.5, "mlp": 0.2}),
    "mnist": Setting(MNIST, 40, 10, {"linear": 0.1, "mlp": 0.1}),
    "fashion-mnist": Setting(MNIST, 40, 10, {"linear": 0.1, "mlp": 0.1}),
}

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
    "neumann and cg: with the Gauss–Newton matrix in place of the Hessian, which is not positive definite here.\n"
)


class Model(NamedTuple):
    """A classifier of images.

    Attributes:
      init: `init(key, pixels) -> y`.
      logits: `logits(y, images) -> [N, 10]`, images [N, pixels].
      curvature: what the implicit methods take for the Hessian of the training loss.
    """

    init: Callable[[chex.PRNGKey, int], chex.ArrayTree]
    logits: Callable[[chex.ArrayTree, chex.Array], chex.Array]
    curvature: Callable[..., Any]


def affine(y: chex.ArrayTree, images: chex.Array) -> chex.Array:
    """Softmax regression."""
    return images @ y["weights"] + y["bias"][None]


def zeros(key: chex.PRNGKey, pixels: int) -> chex.ArrayTree:
    """The first y of softmax regression."""
    return {"weights": jnp.zeros((pixels, 10)), "bias": jnp.zeros(10)}


def perceptron(y: chex.ArrayTree, images: chex.Array) -> chex.Array:
    """One hidden layer with tanh."""
    return affine(y["last"], jnp.tanh(affine(y["first"], images)))


def random_layers(key: chex.PRNGKey, pixels: int) -> chex.ArrayTree:
    """The first y of the perceptron: normal weights of variance 1 / inputs."""

    def layer(key: chex.PRNGKey, inputs: int, outputs: int) -> chex.ArrayTree:
        return {"weights": jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs), "bias": jnp.zeros(outputs)}

    first, last = jax.random.split(key)
    return {"first": layer(first, pixels, HIDDEN), "last": layer(last, HIDDEN, 10)}


MODELS = {
    "linear": Model(zeros, affine, bx.curvature.hessian),
    "mlp": Model(random_layers, perceptron, bx.curvature.gauss_newton),
}


def inner_loss(model: Model) -> bx.curvature.ModelLoss:
    """g, the weighted training loss; x [N]."""
    return bx.curvature.ModelLoss(
        model=model.logits,
        loss=bx.curvature.softmax_cross_entropy,
        split=lambda x, batch: batch,
        weights=lambda x, batch: jax.nn.sigmoid(x),
        l2=L2,
    )


def outer_loss(model: Model, x: chex.Array, y: chex.ArrayTree, batch: tuple) -> chex.Array:
    """f, the validation loss."""
    images, labels = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model.logits(y, images), labels))


@functools.partial(jax.jit, static_argnums=0)
def accuracy(model: Model, y: chex.ArrayTree, images: chex.Array, labels: chex.Array) -> chex.Array:
    """Share of the images that are classified right; NaN if a logit is not finite."""
    outputs = model.logits(y, images)
    return jnp.where(jnp.isfinite(outputs).all(), jnp.mean(jnp.argmax(outputs, axis=1) == labels), jnp.nan)


def evaluate(model: Model, learns: bool, data: Data, carry: Carry) -> dict[str, float | None]:
    """Test accuracy, and the AUC with which learnt weights tell true labels from false ones."""
    test_accuracy = accuracy(model, carry.estimator.y, *data.test).item()
    scores: dict[str, float | None] = {"test_accuracy": test_accuracy, "auc": None}
    if learns:
        weights = np.asarray(jax.nn.sigmoid(carry.x))
        scores["auc"] = float(roc_auc_score(data.clean, weights)) if np.isfinite(weights).all() else float("nan")
    return scores


class Inner(NamedTuple):
    """The inner problem and how it is solved: the loss g, its curvature, and SGD with momentum."""

    loss: bx.curvature.ModelLoss
    curvature: Callable[..., Any]
    learning_rate: float
    steps: int

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Makes the inner steps."""
        return optax.sgd(self.learning_rate, MOMENTUM)


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: in lower case, also the name of its files.
      solver: `solver(inner, **settings)` builds the inner solver.
      settings: `settings(inner)`, what it is built with.
      weights: `weights(data) -> x`, the first outer variable [N].
      batch: `batch(data)`, what it trains and validates on.
      learns: whether the outer optimizer moves x.
    """

    name: str
    solver: Callable[..., bx.InnerSolver]
    settings: Callable[[Inner], Mapping[str, Any]]
    weights: Callable[[Data], chex.Array] = lambda data: jnp.zeros(data.clean.shape)
    batch: Callable[[Data], bx.Batch] = lambda data: data.batch
    learns: bool = True


def implicit(ihvp: Callable[..., bx.IHVP], inner: Inner, **settings: Any) -> bx.InnerSolver:
    """Implicit differentiation with an inverse-Hessian-vector product of these settings."""
    return bx.inner.implicit(inner.loss, inner.optimizer, inner.steps, ihvp(**settings))


def reverse(inner: Inner, steps: int) -> bx.InnerSolver:
    """Differentiates through all inner steps."""
    return bx.inner.reverse(inner.loss, inner.optimizer, steps)


def no_gradient(inner: Inner, steps: int) -> bx.InnerSolver:
    """Makes the inner steps, and differentiates none of them."""
    return bx.inner.no_gradient(inner.loss, inner.optimizer, steps)


def truncated(inner: Inner, steps: int) -> bx.InnerSolver:
    """Differentiates through the last of the inner steps."""
    return bx.inner.chain(no_gradient(inner, inner.steps - steps), reverse(inner, steps))


METHODS = (
    Row("identity", functools.partial(implicit, bx.ihvp.identity), lambda inner: {"scale": inner.learning_rate}),
    Row(
        "neumann",
        functools.partial(implicit, bx.ihvp.neumann),
        lambda inner: {"steps": 10, "step_size": inner.learning_rate, "curvature": inner.curvature},
    ),
    Row("cg", functools.partial(implicit, bx.ihvp.cg), lambda inner: {"maxiter": 5, "curvature": inner.curvature}),
    Row("truncated", truncated, lambda inner: {"steps": 5}),
    Row("reverse", reverse, lambda inner: {"steps": inner.steps}),
)

# Plain training with fixed weights, for as many steps.
anchor = functools.partial(Row, solver=no_gradient, settings=lambda inner: {"steps": inner.steps}, learns=False)

# sigmoid(±30) is 1 or 0 in float32.
ANCHORS = (
    anchor("corrupted", weights=lambda data: jnp.full(data.clean.shape, 30.0)),
    anchor("clean", weights=lambda data: jnp.where(data.clean, 30.0, -30.0)),
    anchor(
        "validation",
        weights=lambda data: jnp.full(len(data.batch.outer[1]), 30.0),
        batch=lambda data: bx.Batch(data.batch.outer, data.batch.outer),
    ),
)


def method(row: Row, model: Model, inner: Inner, configuration: Mapping[str, Any]) -> Method:
    """The row on one problem."""
    settings = row.settings(inner)
    names = {key: getattr(value, "__name__", value) for key, value in settings.items()}

    def start(data: Data) -> tuple[chex.Array, chex.ArrayTree]:
        pixels = data.batch.inner[0].shape[1]
        return row.weights(data), model.init(jax.random.key(data.seed), pixels)

    return Method(
        name=row.name,
        hypergradient=lambda: bx.hypergradient(functools.partial(outer_loss, model), row.solver(inner, **settings)),
        optimizer=optax.adam(**OUTER) if row.learns else optax.set_to_zero(),
        start=start,
        batch=row.batch,
        evaluate=functools.partial(evaluate, model, row.learns),
        configuration={
            **configuration,
            "settings": names,
            "l2": L2,
            "inner_steps": inner.steps,
            "inner_optimizer": {"sgd": {"learning_rate": inner.learning_rate, "momentum": MOMENTUM}},
            "outer_optimizer": {"adam": OUTER} if row.learns else None,
        },
    )


DEFAULTS = Options(tuple(row.name for row in METHODS))


@dataclasses.dataclass(frozen=True)
class Config:
    """Data hyper-cleaning: learn a weight for each training example, half of whose labels are redrawn at random.

    The anchors (plain training on the corrupted labels, on the clean subset, and on the validation images) always run.
    """

    data: Literal["digits", "mnist", "fashion-mnist"] = "digits"
    """Images: scikit-learn's embedded digits, or a public data set."""
    model: Literal["linear", "mlp"] = "linear"
    """Softmax regression, or a network with one hidden layer of 32 units."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in METHODS])

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        setting, model = SETTINGS[self.data], MODELS[self.model]
        inner = Inner(inner_loss(model), model.curvature, setting.learning_rates[self.model], setting.inner_steps)
        steps = self.common.steps(setting.outer_steps)
        rows = [*ANCHORS, *(row for row in METHODS if row.name in self.common.methods)]
        configuration = {"data": self.data, "model": self.model, **setting.split}
        methods = [method(row, model, inner, configuration) for row in rows]
        anchors = [row.name for row in ANCHORS]
        read = functools.partial(load, self.data, **setting.split)
        first = (self.data, self.model) == ("digits", "linear")
        task = Task(
            title=f"Data hyper-cleaning of {self.data}, {self.model} model",
            folder=TASK if first else f"{TASK}-{self.data}-{self.model}",
            outer_steps=steps,
            methods=[row.name for row in rows],
            anchors=anchors,
            runs=functools.partial(outer_loops, TASK, methods, read, steps, self.common),
            columns=COLUMNS,
            caption=CAPTION + (GAUSS_NEWTON if self.model == "mlp" else ""),
            draw=lambda runs: draw(runs, anchors, read),
        )
        return perform(task, self.common)
