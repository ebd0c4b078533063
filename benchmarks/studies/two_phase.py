"""A cheap, biased estimator first and an unbiased one after it, on the cleaning of digits.

    min_x  F(x) = f(x, y_T(x))      y_T: T steps of SGD with momentum on g from y = 0, in every outer step anew

f and g are those of hyper-cleaning. F is a function of x alone, so that `exact`, which differentiates all T steps,
descends it; the implicit methods take y_T for the minimum of g, and forward gradients are right in the mean only.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import tyro
from matplotlib.figure import Figure

import bilevax as bx
from benchmarks.data.images import load
from benchmarks.harness.plugin import Function
from benchmarks.harness.report import Run
from benchmarks.harness.runner import Method, Options, Task, outer_loops, perform
from benchmarks.harness.style import STYLE, curves
from benchmarks.networks.dense import MODELS
from benchmarks.tasks import hyper_cleaning
from benchmarks.tasks.estimators import Inner
from benchmarks.tasks.hyper_cleaning import COLUMNS, Row, inner_loss
from bilevax.typing import Array, PyTree

TASK = "two-phase"
SPLIT: dict[str, Any] = {"train": 512, "validation": 256, "corruption": 0.5}
RATE, INNER_STEPS, OUTER_STEPS = 0.3, 30, 150
DIRECTIONS, DAMPING = 16, 1e-2
SHARE = 2 / 3  # of the outer steps that the first phase takes
SMALLEST_GAP = 3e-3  # below it the scale of the picture is linear
MODEL = MODELS["linear"]
CAPTION = f"""\
Softmax regression, {INNER_STEPS} inner steps from y = 0 in each outer step; {DIRECTIONS} directions. outer loss: F, on
the images to validate on. two-phase: kfac for {SHARE:.0%} of the outer steps, then forward-gradient; guided: by kfac.
above exact: outer loss minus that of exact on the same seed, whose standard error is thus free of the spread of data.
"""


def fresh(x: Array) -> PyTree:
    """The first y of every outer step."""
    return MODEL.init(jax.random.key(0), 64)


def implicit(inner: Inner, ihvp: bx.problem.IHVP) -> bx.problem.InnerSolver:
    """All inner steps, and the implicit rule at their end."""
    return bx.inner.implicit(inner.loss, inner.optimizer, inner.steps, ihvp=ihvp, initial=fresh)


def reverse(inner: Inner) -> bx.problem.InnerSolver:
    """Differentiates all inner steps."""
    return bx.inner.reverse(inner.loss, inner.optimizer, inner.steps, initial=fresh)


def cg(inner: Inner, maxiter: int) -> bx.problem.InnerSolver:
    """Implicit, by conjugate gradients."""
    return implicit(inner, bx.ihvp.cg(maxiter=maxiter))


def kfac(inner: Inner, damping: float) -> bx.problem.InnerSolver:
    """Implicit, by Kronecker factors."""
    return implicit(inner, bx.ihvp.kfac(damping=damping))


def forward_gradient(inner: Inner, directions: int, **settings: Any) -> bx.problem.InnerSolver:
    """Pushes random directions through all inner steps."""
    return bx.inner.forward_gradient(
        inner.loss, inner.optimizer, inner.steps, directions=directions, initial=fresh, **settings
    )


def guided(inner: Inner, directions: int, damping: float) -> bx.problem.InnerSolver:
    """The same, one direction of which is the implicit hypergradient by Kronecker factors."""
    guess = bx.inner.implicit(inner.loss, ihvp=bx.ihvp.kfac(damping=damping))
    return forward_gradient(inner, directions, guide=bx.inner.guides.at_solution(guess))


class Phases(NamedTuple):
    """A method of one phase or two: the rows whose hypergradients follow each other."""

    name: str
    rows: Sequence[Row]


EXACT = Row("exact", reverse, lambda inner: {})
CG = Row("cg", cg, lambda inner: {"maxiter": 20})
KFAC = Row("kfac", kfac, lambda inner: {"damping": DAMPING})
FORWARD = Row("forward-gradient", forward_gradient, lambda inner: {"directions": DIRECTIONS})
GUIDED = Row("guided", guided, lambda inner: {"directions": DIRECTIONS, "damping": DAMPING})
METHODS = (
    *(Phases(row.name, (row,)) for row in (EXACT, CG, KFAC, FORWARD, GUIDED)),
    Phases("two-phase", (KFAC, FORWARD)),
    Phases("two-phase-guided", (KFAC, GUIDED)),
)


def foreign(function: Function) -> Phases:
    """The row of a function of a plugin, in one phase."""

    def solver(inner: Inner) -> Any:
        return function.hypergradient(inner.given._replace(initial=fresh))

    return Phases(function.name, (Row(function.name, solver, lambda inner: {}),))


def method(phases: Phases, inner: Inner, outer_steps: int, configuration: Mapping[str, Any]) -> Method:
    """One row of the table, with the data, the outer optimizer and the scores of hyper-cleaning."""
    switch_at = round(SHARE * outer_steps)
    chosen = {**configuration, "phases": [row.name for row in phases.rows], "switch_at": switch_at}
    parts = [hyper_cleaning.method(row, MODEL, inner, chosen) for row in phases.rows]

    def hypergradient() -> bx.problem.Hypergradient:
        made = [part.hypergradient() for part in parts]
        return made[0] if len(made) == 1 else bx.two_phase(switch_at, *made)

    settings = {row.name: row.settings(inner) for row in phases.rows}
    return parts[0]._replace(
        name=phases.name,
        hypergradient=hypergradient,
        configuration={**parts[0].configuration, "settings": settings},
    )


def beside_exact(runs: Iterable[Run]) -> Iterator[Run]:
    """The same runs with `gap`: F at each point of the curve minus that of the exact run, if there was one, then."""
    exact: dict[int, list[float]] = {}
    for run in runs:
        losses = run.outcome.curve["outer_loss"]
        if run.method == EXACT.name:
            exact[run.seed] = losses
        reference = exact.get(run.seed, [])
        gaps = [loss - other for loss, other in zip(losses, reference, strict=False)]
        gaps += [None] * (len(losses) - len(gaps))
        outcome = run.outcome._replace(
            metrics={**run.outcome.metrics, "gap": gaps[-1]}, curve={**run.outcome.curve, "gap": gaps}
        )
        yield dataclasses.replace(run, outcome=outcome)


def draw(runs: Sequence[Run], switch_at: int) -> Figure:
    """F against outer steps and against time, and how far it is above that of the exact runs.

    Args:
      runs: those that finished, one with a finite outer loss among them.
      switch_at: outer step at which two phases change.

    Returns:
      A figure, ready for `savefig`.
    """
    finite = [run for run in runs if run.finite]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4), dpi=150, layout="constrained")
        steps, gap, time = figure.subplots(1, 3)
        curves(steps, finite, (), "outer_loss", "outer_step")
        curves(gap, finite, (), "gap", "outer_step")
        curves(time, finite, (), "outer_loss")
        for axes in (steps, gap):
            axes.axvline(switch_at, color="#BBBBBB", linewidth=1)
            axes.set(xlabel="outer steps", ylabel="F, the validation loss")
        gap.set(ylabel="F above that of exact, same seed")
        gap.set_yscale("symlog", linthresh=SMALLEST_GAP)
        time.set(xlabel="run time without compilation (s)", ylabel="F, the validation loss", xscale="log")
        figure.legend(*steps.get_legend_handles_labels(), loc="outside right upper")
    return figure


DEFAULTS = Options(tuple(phases.name for phases in METHODS), budget=120.0, seeds=3)


@dataclasses.dataclass(frozen=True)
class Config:
    """Two estimators one after the other, against each of them alone and against the exact hypergradient."""

    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task. Quick: one seed."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([phases.name for phases in METHODS])

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        options = self.common
        if options.quick:
            options = dataclasses.replace(options, seeds=1)
        steps = options.steps(OUTER_STEPS)
        inner = Inner(inner_loss(MODEL), MODEL.curvature, RATE, INNER_STEPS)
        chosen = options.chosen(METHODS, foreign)
        methods = [method(phases, inner, steps, SPLIT) for phases in chosen]
        read: Callable = functools.partial(load, "digits", **SPLIT)
        task = Task(
            title=f"Two phases, digits, {SPLIT['corruption']:.0%} of labels redrawn",
            folder=TASK,
            outer_steps=steps,
            methods=[phases.name for phases in chosen],
            anchors=(),
            runs=lambda advance: beside_exact(outer_loops(TASK, methods, read, steps, options, advance)),
            columns={"gap": ("above\nexact", "{:.4f}".format), **COLUMNS},
            caption=CAPTION,
            draw=functools.partial(draw, switch_at=round(SHARE * steps)),
        )
        return perform(task, options, self)
