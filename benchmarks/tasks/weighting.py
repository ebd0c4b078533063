"""Learning how much each text of a training set counts: what the tasks with texts share.

    min_x  f(y*(x)) = mean loss over a small clean set
    y*(x) = argmin_y g(x, y) = mean over the training texts of w_i(x) · loss_i(y) + l2 / 2 · ‖y‖²

All batches are drawn at random: of the inner steps, the curvature, the cross term and the outer loss each its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich import filesize
from sklearn.metrics import roc_auc_score

import bilevax as bx
from benchmarks.harness.loop import Carry
from benchmarks.harness.plugin import Function, InnerProblem, finished
from benchmarks.harness.report import Columns, Run
from benchmarks.harness.runner import Method
from benchmarks.harness.style import STYLE, curves, histogram
from benchmarks.tasks import forms
from benchmarks.tasks.methods import draw_outer
from bilevax.typing import Array, PyTree

L2 = 1e-4
DAMPING = 1e-2
# What a method keeps from one outer step to the next, factors for example; temporary memory comes on top of it.
STATE: Columns = {"state_bytes": ("kept\nmemory", lambda number: filesize.decimal(round(number)))}
EPS_ROOT = 1e-12  # with which Adam can be differentiated where a gradient has always been zero
SCORES = forms.scores(L2, learning_rate=0.1)


class Examples(NamedTuple):
    """Texts of a training or clean set.

    Attributes:
      number: [N], which entry of x belongs to a text.
      inputs: what the model takes: ids [N, T] or hidden states [N, T, width], and real [N, T], 0 at padding.
      targets: [N] labels, or [N, T] words to come.
      features: [N, ...], what a network of weights reads.
    """

    number: Array
    inputs: tuple[Array, Array]
    targets: Array
    features: Array


class Data(NamedTuple):
    """What a task trains on.

    Attributes:
      seed: of all that is drawn.
      batch: outer = the clean texts, inner = the training texts.
      good: bool [N], which training texts deserve their weight; the learner does not know.
      test: what the task tests on.
      y: first parameters.
    """

    seed: int
    batch: bx.Batch
    good: np.ndarray
    test: Any
    y: PyTree


class Weighting(NamedTuple):
    """How x makes weights.

    Attributes:
      start: `start(data) -> x`.
      scores: `scores(x, examples) -> [N]`, from which the form makes weights.
      form: how it does, and how x moves.
    """

    start: Callable[[Data], PyTree]
    scores: Callable[[PyTree, Examples], Array]
    form: forms.Form = SCORES

    def weights(self, x: PyTree, examples: Examples) -> Array:
        """Of the texts, [N]."""
        return self.form.weights(self.scores(x, examples))


def _layers(data: Data) -> dict[str, Array]:
    inputs, hidden = data.batch.inner.features.shape[1], 16
    first = jax.random.normal(jax.random.key(data.seed), (inputs, hidden)) / jnp.sqrt(inputs)
    return {"first": first, "bias": jnp.zeros(hidden), "last": jnp.zeros(hidden)}


def _network(x: dict[str, Array], examples: Examples) -> Array:
    return jnp.tanh(examples.features @ x["first"] + x["bias"][None]) @ x["last"]


def each(form: forms.Form) -> Weighting:
    """An entry of x for each text, with weights of 1/2 at first."""
    return Weighting(
        lambda data: form.start(jnp.full(len(data.good), 0.5)), lambda x, examples: x[examples.number], form
    )


EACH = each(SCORES)
NETWORK = Weighting(_layers, _network)


class Problem(NamedTuple):
    """One bilevel problem, and how both levels are solved.

    Attributes:
      inner_loss: g, whose weights are those of the weighting.
      outer_loss: f(x, y, examples).
      optimizer: makes the inner steps.
      steps: inner steps in each outer one.
      sizes: texts in a batch of the `inner` steps, the `curvature`, the `cross` term, and the `outer` loss.
      positions: `positions(examples) -> [N, T]`, 1 at words and 0 at padding.
      step_size: of a Neumann series.
    """

    inner_loss: bx.curvature.ModelLoss
    outer_loss: Callable[..., Array]
    optimizer: optax.GradientTransformation
    steps: int
    sizes: Mapping[str, int]
    positions: Callable[[Examples], Array]
    step_size: float


def implicit(ihvp: Callable[..., bx.problem.IHVP], problem: Problem, **settings: Any) -> bx.problem.InnerSolver:
    """Implicit differentiation with an inverse-Hessian-vector product of these settings, each with its own batch."""
    draw = {name: bx.sampling.minibatch(size) for name, size in problem.sizes.items()}
    made = ihvp(sample=draw["curvature"], **settings)
    return bx.inner.implicit(
        problem.inner_loss,
        problem.optimizer,
        problem.steps,
        ihvp=made,
        sample=draw["inner"],
        cross_sample=draw["cross"],
        warm_start=False,
    )


def no_gradient(problem: Problem, steps: int) -> bx.problem.InnerSolver:
    """Makes so many inner steps, and differentiates none of them."""
    sample = bx.sampling.minibatch(problem.sizes["inner"])
    return bx.inner.no_gradient(problem.inner_loss, problem.optimizer, steps, sample=sample)


def truncated(problem: Problem, steps: int) -> bx.problem.InnerSolver:
    """Differentiates through the last of the inner steps."""
    sample = bx.sampling.minibatch(problem.sizes["inner"])
    last = bx.inner.reverse(problem.inner_loss, problem.optimizer, steps, sample=sample)
    return bx.inner.chain(no_gradient(problem, problem.steps - steps), last)


def identity(sample: Any, **settings: Any) -> bx.problem.IHVP:
    """Needs no batch."""
    return bx.ihvp.identity(**settings)


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      name: in lower case, also the name of its files.
      solver: `solver(problem, **settings(problem))` builds the inner solver.
      settings: `settings(problem)`.
      start: `start(data) -> [N]`, the weights of an anchor, which stay; None for a method that learns them.
    """

    name: str
    solver: Callable[..., bx.problem.InnerSolver]
    settings: Callable[[Problem], Mapping[str, Any]]
    start: Callable[[Data], Array] | None = None


def foreign(function: Function) -> Row:
    """The row of a function of a plugin."""

    def solver(problem: Problem) -> Any:
        draw = {name: bx.sampling.minibatch(size) for name, size in problem.sizes.items()}
        return function.hypergradient(
            InnerProblem(
                problem.inner_loss,
                problem.optimizer,
                problem.steps,
                problem.step_size,
                bx.curvature.gauss_newton,
                sample=draw["inner"],
                ihvp_sample=draw["curvature"],
                cross_sample=draw["cross"],
                warm_start=False,
            )
        )

    return Row(function.name, solver, lambda problem: {})


def kronecker(problem: Problem) -> dict[str, Any]:
    """Fresh factors in each outer step, of words and not of padding; they are inverted anew in one step of five."""
    return {"damping": DAMPING, "positions": problem.positions, "inverse_every": 5}


GAUSS_NEWTON = {"damping": DAMPING, "curvature": bx.curvature.gauss_newton}
METHODS = (
    Row("identity", functools.partial(implicit, identity), lambda problem: {"scale": 1.0}),
    Row(
        "neumann",
        functools.partial(implicit, bx.ihvp.neumann),
        lambda problem: {"terms": 3, "step_size": problem.step_size, **GAUSS_NEWTON},
    ),
    Row("cg", functools.partial(implicit, bx.ihvp.cg), lambda problem: {"maxiter": 3, **GAUSS_NEWTON}),
    Row("truncated", truncated, lambda problem: {"steps": min(2, problem.steps)}),
    Row("diagonal", functools.partial(implicit, bx.ihvp.diagonal), lambda problem: {}),
    Row("kfac", functools.partial(implicit, bx.ihvp.kfac), kronecker),
    Row("ekfac", functools.partial(implicit, bx.ihvp.ekfac), kronecker),
    Row(
        "kfac-factored",
        functools.partial(implicit, bx.ihvp.kfac),
        lambda problem: {**kronecker(problem), "inverse": bx.curvature.kronecker.factored},
    ),
)

# Plain training with fixed weights, for as many steps.
anchor = functools.partial(Row, solver=no_gradient, settings=lambda problem: {"steps": problem.steps})
uniform = anchor("uniform", start=lambda data: jnp.ones(len(data.good)))
oracle = functools.partial(anchor, start=lambda data: jnp.where(data.good, 1.0, 0.0))


def method(
    row: Row,
    pose: Callable[[Weighting], Problem],
    weighting: Weighting,
    evaluate: Callable[[Data, Carry], dict[str, float | None]],
    configuration: Mapping[str, Any],
) -> Method:
    """The row on the problem that `pose` makes of a weighting; `evaluate` tests y."""
    learns = row.start is None
    form = weighting.form
    used = weighting if learns else each(form)
    problem = pose(used)
    settings = row.settings(problem)
    names = {
        key: value if isinstance(value, int | float) else getattr(value, "__name__", type(value).__name__)
        for key, value in settings.items()
    }

    def start(data: Data) -> tuple[PyTree, PyTree]:
        return used.start(data) if row.start is None else form.start(row.start(data)), data.y

    def numbers(data: Data, carry: Carry) -> dict[str, float | None]:
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(carry.estimator.solver))
        return {**evaluate(data, carry), "auc": auc(used, data, carry.x) if learns else None, "state_bytes": state}

    return Method(
        name=row.name,
        hypergradient=lambda: draw_outer(
            finished(problem.outer_loss, row.solver(problem, **settings)), problem.sizes["outer"]
        ),
        optimizer=form.optimizer if learns else optax.set_to_zero(),
        start=start,
        batch=lambda data: data.batch,
        evaluate=numbers,
        configuration={
            **configuration,
            "settings": names,
            "l2": form.l2,
            "inner_steps": problem.steps,
            "sizes": problem.sizes,
            "outer_optimizer": form.named if learns else None,
        },
    )


def auc(weighting: Weighting, data: Data, x: PyTree) -> float:
    """The area under the curve with which the weights tell good training texts from others; NaN if not finite."""
    scores = np.asarray(weighting.scores(x, data.batch.inner))
    return float(roc_auc_score(data.good, scores)) if np.isfinite(scores).all() else float("nan")


def draw(
    runs: Sequence[Run],
    anchors: Sequence[str],
    metrics: Mapping[str, str],
    kinds: tuple[str, str],
    weighting: Weighting,
    load: Callable[[int], Data],
) -> Figure:
    """Metrics against time, and the scores of the run with the smallest outer loss.

    Args:
      runs: those that finished, one of a method with a finite outer loss among them.
      anchors: names of those drawn as dashed lines, at their last value.
      metrics: metric -> label.
      kinds: names of good training texts and of the others.
      weighting: of the methods.
      load: seed -> data.

    Returns:
      A figure, ready for `savefig`.
    """
    learnt = [run for run in runs if run.method not in anchors and run.finite]
    best = min(learnt, key=lambda run: (run.seed, run.outcome.metrics["outer_loss"]))
    data = load(best.seed)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), dpi=150, layout="constrained")
        *left, right = figure.subplots(1, 1 + len(metrics))
        for axes, (metric, label) in zip(left, metrics.items(), strict=True):
            curves(axes, runs, anchors, metric)
            axes.set(xlabel="run time without compilation (s)", ylabel=label)
        figure.legend(*left[0].get_legend_handles_labels(), loc="outside upper center", ncols=10)
        histogram(right, np.asarray(weighting.scores(best.outcome.x, data.batch.inner)), data.good)
        right.legend(
            [f"{number} {kind}" for number, kind in zip((data.good.sum(), (~data.good).sum()), kinds, strict=True)]
        )
        right.set(xlabel=weighting.form.label, ylabel="training texts")
        right.set_title(f"Learnt weights ({best.method}, seed {best.seed})")
    return figure
