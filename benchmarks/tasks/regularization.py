"""Logistic regression with a penalty of its own for each feature: learn the penalties on other examples.

    min_x  F(x) = f(y*(x)) = mean over the outer rows of log(1 + exp(−b aᵀy*))            x in the box [−14, 6]^d
    y*(x) = argmin_y g(x, y) = mean over the inner rows of log(1 + exp(−b aᵀy)) + ½ Σ_j exp(x_j) y_j²

The methods solve for z = y / s with s_j = (L + exp(x_j))^(−½), where L bounds the curvature of the mean: the Hessian in
z has no eigenvalue above 1, so that a step size of 1 fits all of the box. The bilevel problem stays what it is.

Reference: Pedregosa, "Hyperparameter optimization with approximate gradient", arXiv 1602.02355, section 5; a penalty
for each feature: Grazzi et al., arXiv 2006.16218, section 5.
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
from jax.experimental.sparse import BCOO
from matplotlib.figure import Figure
from scipy.sparse import csr_matrix
from sklearn.preprocessing import normalize

import bilevax as bx
from benchmarks.data import download
from benchmarks.harness.loop import Carry
from benchmarks.harness.plugin import Function, InnerProblem, finished
from benchmarks.harness.report import COSTS, Run
from benchmarks.harness.runner import Method, Options, Task, outer_loops, perform
from benchmarks.harness.style import COLOURS, STYLE, curves
from benchmarks.tasks.logistic import Examples, exact
from bilevax.typing import Array

TASK = "regularization"
BOX = (-14.0, 6.0)
INNER_STEPS = 10
INNER = {"learning_rate": 1.0, "momentum": 0.9}
OUTER = {"learning_rate": 0.5}
WORDS = 5000
DENSE = 0.2  # share of nonzeros from which on a matrix is stored with its zeros

COLUMNS = {
    "exact_loss": ("F(x)", "{:.5f}".format),
    "exact_gradient": ("|∇F(x)|²", "{:.1e}".format),
    "outer_loss": ("own\nouter loss", "{:.5f}".format),
    **COSTS,
}
CAPTION = (
    "F(x) and |∇F(x)|²: at the last x, with the inner problem solved to 1e-10, whatever the method did itself;\n"
    "own outer loss: at the y of the method. All in float64.\n"
)


class Data(NamedTuple):
    """One data set.

    Attributes:
      inner: rows to train on.
      outer: rows to validate on.
      batch: the same as JAX arrays, (features [N, d], labels [N]) twice.
    """

    inner: Examples
    outer: Examples
    batch: bx.Batch


def official(name: str, features: int) -> tuple[Examples, Examples]:
    """The published training part as inner rows, and the published test part as outer rows."""
    return Examples(*download.libsvm(name, features)), Examples(*download.libsvm(f"{name}.t", features))


def halves(rows: Examples, seed: int) -> tuple[Examples, Examples]:
    """A random half as inner rows, and the other as outer rows."""
    order = np.random.default_rng(seed).permutation(len(rows.labels))
    inner, outer = (Examples(rows.features[part], rows.labels[part]) for part in np.array_split(order, 2))
    return inner, outer


def frequent_words(full: bool) -> Examples:
    """20 Newsgroups as two classes, groups 1 to 10 against 11 to 20; rows of log(1 + count) with norm one."""
    counts, groups = download.libsvm("news20", 62061)
    if not full:
        most = np.sort(np.argsort(-counts.getnnz(axis=0), kind="stable")[:WORDS])
        counts = counts[:, most]
    return Examples(csr_matrix(normalize(counts.log1p())), np.where(groups <= 10, -1.0, 1.0))


class RegularizationSetting(NamedTuple):
    """A data set.

    Attributes:
      rows: `rows(seed, full)`, inner and outer rows.
      curvature: L, a bound of λ_max(AᵀA) / 4N.
      outer_steps: of each run.
    """

    rows: Callable[[int, bool], tuple[Examples, Examples]]
    curvature: float
    outer_steps: int


SETTINGS = {
    "ijcnn1": RegularizationSetting(lambda seed, full: official("ijcnn1", 22), 0.06, 100),
    "a9a": RegularizationSetting(lambda seed, full: official("a9a", 123), 1.6, 60),
    "w8a": RegularizationSetting(lambda seed, full: halves(Examples(*download.libsvm("w8a", 300)), seed), 0.7, 60),
    "news20": RegularizationSetting(lambda seed, full: halves(frequent_words(full), seed), 0.01, 60),
}


def load(setting: RegularizationSetting, full: bool, seed: int) -> Data:
    """Reads the rows, and makes arrays of them: sparse ones where most entries are zero."""

    def arrays(rows: Examples) -> tuple[Any, Array]:
        dense = rows.features.nnz > DENSE * np.prod(rows.features.shape)
        features = jnp.asarray(rows.features.toarray()) if dense else BCOO.from_scipy_sparse(rows.features)
        return features, jnp.asarray(rows.labels)

    inner, outer = setting.rows(seed, full)
    return Data(inner, outer, bx.Batch(outer=arrays(outer), inner=arrays(inner)))


def scale(curvature: float, x: Any) -> Any:
    """The scale s = y / z, [d]."""
    return (curvature + jnp.exp(x)) ** -0.5


def outer_loss(curvature: float, x: Array, z: Array, batch: tuple) -> Array:
    """f, the mean logistic loss."""
    features, labels = batch
    return jnp.mean(jax.nn.softplus(-labels * (features @ (scale(curvature, x) * z))))


def inner_loss(curvature: float, x: Array, z: Array, batch: tuple) -> Array:
    """g, the mean logistic loss with its penalties."""
    y = scale(curvature, x) * z
    return outer_loss(curvature, x, z, batch) + jnp.sum(jnp.exp(x) * y**2) / 2


def boxed(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, followed by a projection of x on the box."""

    def update(grad: Array, state: Any, x: Array) -> tuple[Array, Any]:
        step, state = optimizer.update(grad, state, x)
        return optax.projections.projection_box(x + step, *BOX) - x, state

    return optax.GradientTransformation(optimizer.init, update)


def evaluate(curvature: float, rows: Data, carry: Carry) -> dict[str, float | None]:
    """F(x) and |∇F(x)|², exact."""
    x = np.asarray(carry.x)
    if not np.isfinite(x).all():
        return dict.fromkeys(("exact_loss", "exact_gradient", "residual"), float("nan"))
    y = np.nan_to_num(np.asarray(scale(curvature, carry.x) * carry.estimator.y), posinf=0, neginf=0)
    at = exact(rows.inner, rows.outer, x, y)
    return {"exact_loss": at.value, "exact_gradient": at.gradient @ at.gradient, "residual": at.residual}


class Row(NamedTuple):
    """A row of the table: `solver(loss, optimizer, **settings)` builds the inner solver."""

    name: str
    solver: Callable[..., bx.problem.InnerSolver]
    settings: Mapping[str, Any]


def implicit(
    ihvp: Callable[..., bx.problem.IHVP], loss: Any, optimizer: Any, **settings: Any
) -> bx.problem.InnerSolver:
    """Implicit differentiation with an inverse-Hessian-vector product of these settings."""
    return bx.inner.implicit(loss, optimizer, INNER_STEPS, ihvp=ihvp(**settings))


def truncated(loss: Any, optimizer: Any, steps: int) -> bx.problem.InnerSolver:
    """Differentiates through the last of the inner steps."""
    first = bx.inner.no_gradient(loss, optimizer, INNER_STEPS - steps)
    return bx.inner.chain(first, bx.inner.reverse(loss, optimizer, steps))


def foreign(function: Function) -> Row:
    """The row of a function of a plugin."""

    def solver(loss: Any, optimizer: Any) -> Any:
        step_size, curvature = INNER["learning_rate"], bx.curvature.hessian
        return function.hypergradient(InnerProblem(loss, optimizer, INNER_STEPS, step_size, curvature))

    return Row(function.name, solver, {})


METHODS = (
    Row("identity", functools.partial(implicit, bx.ihvp.identity), {"scale": 1.0}),
    Row("neumann", functools.partial(implicit, bx.ihvp.neumann), {"terms": 10, "step_size": 1.0}),
    Row("cg", functools.partial(implicit, bx.ihvp.cg), {"maxiter": 10}),
    Row("truncated", truncated, {"steps": 5}),
    Row("reverse", bx.inner.reverse, {"steps": INNER_STEPS}),
)


def method(row: Row, curvature: float, configuration: Mapping[str, Any]) -> Method:
    """The row on one problem."""
    inner, outer = (functools.partial(loss, curvature) for loss in (inner_loss, outer_loss))
    return Method(
        name=row.name,
        hypergradient=lambda: finished(outer, row.solver(inner, optax.sgd(**INNER), **row.settings)),
        optimizer=boxed(optax.adam(**OUTER)),
        start=lambda rows: (jnp.zeros(rows.inner.features.shape[1]),) * 2,
        batch=lambda rows: rows.batch,
        evaluate=functools.partial(evaluate, curvature),
        configuration={
            **configuration,
            "settings": row.settings,
            "box": BOX,
            "curvature": curvature,
            "inner_steps": INNER_STEPS,
            "inner_optimizer": {"sgd": INNER},
            "outer_optimizer": {"adam": OUTER},
        },
    )


def draw(runs: Sequence[Run]) -> Figure:
    """F and |∇F|² against time, and the learnt penalties of the best run."""
    best = min((run for run in runs if run.finite), key=lambda run: (run.seed, run.outcome.metrics["exact_loss"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), dpi=150, layout="constrained")
        value, gradient, penalties = figure.subplots(1, 3)
        for axes, metric, label in ((value, "exact_loss", "F(x)"), (gradient, "exact_gradient", "|∇F(x)|²")):
            curves(axes, runs, (), metric)
            axes.set(xlabel="run time without compilation (s)", ylabel=label)
        gradient.set_yscale("log")
        figure.legend(*value.get_legend_handles_labels(), loc="outside upper center", ncols=8)
        penalties.hist(np.asarray(best.outcome.x), np.linspace(*BOX, 41).tolist(), color=COLOURS[0])
        penalties.set(xlabel="outer variable x (penalty = exp x)", ylabel="features")
        penalties.set_title(f"Learnt penalties ({best.method}, seed {best.seed})")
    return figure


DEFAULTS = Options(tuple(row.name for row in METHODS))


@dataclasses.dataclass(frozen=True)
class Config:
    """Regularization: learn one penalty for each feature of a logistic regression, on rows that it is not trained on.

    ijcnn1 and a9a have their published parts, and no seed changes anything; w8a and news20 are split in halves by it.
    news20 is made two classes, groups 1 to 10 against 11 to 20, and keeps the 5,000 words that are in most documents.
    """

    data: Literal["ijcnn1", "a9a", "w8a", "news20"] = "ijcnn1"
    """A public data set of LIBSVM."""
    full: bool = False
    """All 62,061 words of news20."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in METHODS])
        if self.full and self.data != "news20":
            raise ValueError(f"full is about the words of news20; got it with data={self.data}. Drop --full.")

    def run(self) -> int:
        """Runs everything in float64, prints the table and writes the files; returns the exit code."""
        setting = SETTINGS[self.data]
        steps = self.common.steps(setting.outer_steps)
        rows = self.common.chosen(METHODS, foreign)
        methods = [method(row, setting.curvature, {"data": self.data, "full": self.full}) for row in rows]
        task = Task(
            title=f"Penalties of a logistic regression on {self.data}",
            folder=f"{TASK}-{self.data}{'-full' * self.full}",
            outer_steps=steps,
            methods=[row.name for row in rows],
            anchors=(),
            runs=functools.partial(
                outer_loops, TASK, methods, functools.partial(load, setting, self.full), steps, self.common
            ),
            columns=COLUMNS,
            caption=CAPTION,
            draw=draw,
        )
        with jax.enable_x64(True):
            return perform(task, self.common, self)
