"""Learning rates: learn the schedule of T steps of SGD on digits, for a network that starts anew each time.

    min_x  F(x) = E f(y_T(x))          f(y) = mean over validation of CE_i(y)
    y_t = y_{t−1} − exp(x_t) ∇_y g(y_{t−1}, minibatch)                               t = 1..T, N = T

    g(y, minibatch) = mean over its images of CE_j(y) + l2 / 2 · ‖y‖²

or, with N = 3, a rate that goes from exp(x_1) to exp(x_2) geometrically, and the momentum sigmoid(x_3).

x is not in g: a minimum of g would not depend on it, and the implicit function theorem gives zero. What follows y along
the steps sees it. Forward mode along N directions is exact, in a memory that grows with N and not with T: that is small
for three numbers, and larger than that of reverse mode for N = T. Neighbours in a schedule move alike, so that few
directions, constant on blocks of steps, hold most of the gradient.

Reference: Maclaurin, Duvenaud, Adams, arXiv 1502.03492; forward mode for it: Franceschi et al., arXiv
1703.01785, and Micaelli, Storkey, arXiv 2007.07869, which shares rates between steps.
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
from matplotlib.figure import Figure

import bilevax as bx
from benchmarks.data.images import Data, load
from benchmarks.harness.grid import choice
from benchmarks.harness.plugin import Function, InnerProblem, restarted
from benchmarks.harness.report import COSTS, Run
from benchmarks.harness.runner import Method, Options, Task, outer_loops, perform
from benchmarks.harness.style import ANCHOR_COLOURS, STYLE, curves
from benchmarks.networks.dense import MODELS
from benchmarks.networks.model import hits, mean_cross_entropy
from benchmarks.tasks.condensation_methods import Row
from benchmarks.tasks.methods import Shared, first_weights
from bilevax.typing import Array, Key, PyTree

TASK = "learning-rates"
SPLIT = {"train": 1000, "validation": 400}
MODEL = MODELS["mlp"]
L2 = 1e-4
STEPS = 64
MINIBATCH = 20
OUTER_STEPS = 150
OUTER_RATE = 0.05
CLIP = 0.1  # the largest norm of an outer gradient: with rates too high, SGD and its derivatives explode
FIRST_RATE = 0.1
NETWORKS = 10  # fresh ones, in each evaluation
GRID = np.geomspace(0.1, 3, 16)  # rates that are tried by hand

COLUMNS = {
    "validation_loss": ("valid.\nloss", "{:.3f}".format),
    "test_loss": ("test\nloss", "{:.3f}".format),
    "test_accuracy": ("test\naccuracy", "{:.3f}".format),
    **{name: column for name, column in COSTS.items() if name != "cross_products"},
}
CAPTION = (
    f"Means over {NETWORKS} fresh networks, trained with the last x. The first rows are the best of a grid of rates,\n"
    f"{GRID[0]:g} to {GRID[-1]:g}, on the validation loss in the table; the others start from {FIRST_RATE:g}.\n"
)


class Schedule(NamedTuple):
    """What x says about SGD.

    Attributes:
      optimizer: x -> SGD.
      rates: x -> its learning rates, [T].
      steps: x -> what a hand would set, by name.
      start: the first x.
      tried: name -> values of x, [candidates, N], of which a hand would take the best.
    """

    optimizer: Callable[[Array], optax.GradientTransformation]
    rates: Callable[[Array], Array]
    steps: Callable[[np.ndarray], dict[str, float]]
    start: np.ndarray
    tried: Mapping[str, np.ndarray]


TIMES = np.arange(STEPS) / STEPS
EACH = Schedule(
    optimizer=lambda x: optax.sgd(lambda t: jnp.exp(x[t])),
    rates=jnp.exp,
    steps=lambda x: {"rate": float(np.exp(x[0]))},
    start=np.full(STEPS, np.log(FIRST_RATE)),
    tried={
        "constant": np.log(GRID[:, None] * np.ones(STEPS)),
        "cosine": np.log(GRID[:, None] * (1 + np.cos(np.pi * TIMES)) / 2),
    },
)


def _line(x: Array, t: Any) -> Array:
    return jnp.exp(x[0] + (x[1] - x[0]) * t / STEPS)


def _tried(decay: float) -> np.ndarray:
    """All rates with three momenta."""
    return np.array([(np.log(rate), np.log(rate) - decay, logit) for rate in GRID for logit in (-2.0, 0.0, 2.0)])


LINE = Schedule(
    optimizer=lambda x: optax.sgd(lambda t: _line(x, t), momentum=jax.nn.sigmoid(x[2])),
    rates=lambda x: _line(x, np.arange(STEPS)),
    steps=lambda x: {"rate": float(np.exp(x[0])), "momentum": float(1 / (1 + np.exp(-x[2])))},
    start=np.array([np.log(FIRST_RATE), np.log(FIRST_RATE), 0.0]),
    tried={"constant": _tried(0.0), "decaying": _tried(3.0)},
)
SCHEDULES = {"each-step": EACH, "line": LINE}


class Training(NamedTuple):
    """The inner problem.

    Attributes:
      loss: g.
      optimizer: x -> SGD.
      size: N.
      steps: T.
    """

    loss: bx.curvature.ModelLoss
    optimizer: Callable[[Array], optax.GradientTransformation]
    size: int
    steps: int = STEPS


SAMPLE = bx.sampling.minibatch(MINIBATCH)


def training(schedule: Schedule) -> Training:
    """SGD by this schedule."""
    loss = bx.curvature.ModelLoss(MODEL.logits, bx.curvature.softmax_cross_entropy, lambda x, batch: batch, l2=L2)
    return Training(loss, schedule.optimizer, len(schedule.start))


def no_gradient(training: Training) -> bx.problem.InnerSolver:
    """Trains, and differentiates nothing."""
    return bx.inner.no_gradient(training.loss, training.optimizer, training.steps, sample=SAMPLE)


def reverse(training: Training) -> bx.problem.InnerSolver:
    """The exact gradient by reverse mode."""
    return bx.inner.reverse(training.loss, training.optimizer, training.steps, sample=SAMPLE)


def truncated(training: Training, part: int) -> bx.problem.InnerSolver:
    """Reverse mode through the last steps, one part of so many: the rates of the others get no gradient."""
    last = training.steps // part
    first = no_gradient(training._replace(steps=training.steps - last))
    return bx.inner.chain(first, reverse(training._replace(steps=last)))


def implicit(training: Training) -> bx.problem.InnerSolver:
    """Takes y_T for a minimum, which does not depend on how it was reached."""
    identity = bx.ihvp.identity()
    return bx.inner.implicit(training.loss, training.optimizer, training.steps, ihvp=identity, sample=SAMPLE)


def forward(training: Training, directions: int, **choices: Any) -> bx.problem.InnerSolver:
    """Forward gradients, by default along random signs."""
    return bx.inner.forward_gradient(
        training.loss, training.optimizer, training.steps, directions=directions, sample=SAMPLE, **choices
    )


def exact(training: Training) -> bx.problem.InnerSolver:
    """The exact gradient by forward mode along each entry of x."""
    return forward(training, training.size, sampler=bx.inner.random_directions.coordinate)


def blocks(training: Training, directions: int, blocks: int) -> bx.problem.InnerSolver:
    """Forward gradients that are exact for what is constant on blocks of steps; the blocks count as directions."""
    return forward(training, directions, guide=bx.inner.guides.blocks(blocks))


ROWS = (
    Row("forward-exact", exact),
    Row("forward", forward, {"directions": 8}),
    Row("forward-blocks-4", blocks, {"directions": 8, "blocks": 4}),
    Row("forward-blocks-16", blocks, {"directions": 20, "blocks": 16}),
    Row("reverse", reverse),
    Row("truncated", truncated, {"part": 4}),
    Row("implicit", implicit),
)


def foreign(function: Function) -> Row:
    """The row of a function of a plugin."""

    def solver(training: Training) -> Any:
        curvature = bx.curvature.gauss_newton
        problem = InnerProblem(training.loss, training.optimizer, training.steps, FIRST_RATE, curvature)
        return function.hypergradient(problem._replace(sample=SAMPLE, ihvp_sample=SAMPLE, cross_sample=SAMPLE))

    return Row(function.name, solver)


def renewed(hypergrad: bx.problem.Hypergradient) -> bx.problem.Hypergradient:
    """The hypergradient from a fresh network, drawn with the key."""

    def estimate(key: Key | None, state: Any, x: Array, batch: bx.Batch) -> tuple:
        network_key, key = jax.random.split(bx.sampling.needed(key, "a fresh network"))
        pixels = batch.inner[0].shape[1]
        return hypergrad.estimate(key, restarted(state, MODEL.init(network_key, pixels)), x, batch)

    return bx.problem.Hypergradient(hypergrad.init, estimate)


def outer_loss(x: Array, y: PyTree, batch: tuple) -> Array:
    """f, the validation loss."""
    return mean_cross_entropy(MODEL, y, batch)


def measure(schedule: Schedule) -> Callable[[Array, Data], dict[str, Array]]:
    """A function (x, data) -> losses and accuracy of fresh networks trained by x, the same for each x of a seed."""
    solve = bx.differentiable(no_gradient(training(schedule)))

    def one(x: Array, batch: bx.Batch, test: tuple, key: Key) -> dict[str, Array]:
        network_key, key = jax.random.split(key)
        y = solve(x, MODEL.init(network_key, test[0].shape[1]), batch.inner, key)
        losses = {
            name: mean_cross_entropy(MODEL, y, part) for name, part in (("validation", batch.outer), ("test", test))
        }
        return {f"{name}_loss": loss for name, loss in losses.items()} | {"test_accuracy": hits(MODEL, y, *test).mean()}

    @jax.jit
    def mean(x: Array, batch: bx.Batch, test: tuple, keys: Key) -> dict[str, Array]:
        return jax.tree.map(jnp.mean, jax.vmap(functools.partial(one, x, batch, test))(keys))

    def measured(x: Array, data: Data) -> dict[str, Array]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(data.seed), 1), NETWORKS)
        return mean(x, data.batch, data.test, keys)

    return measured


def by_hand(schedule: Schedule, runs: Sequence[Run]) -> list[Run]:
    """The same runs; those of schedules that are tried by hand with their choice, and whether it is at an end."""

    def told(run: Run, tried: np.ndarray) -> Run:
        steps = [schedule.steps(x) for x in tried]
        taken = int(np.abs(tried - np.asarray(run.outcome.x)).sum(axis=1).argmin())
        grid = {name: [each[name] for each in steps] for name in steps[0]}
        return dataclasses.replace(run, configuration={**run.configuration, **choice(grid, steps[taken])})

    return [told(run, schedule.tried[run.method]) if run.method in schedule.tried else run for run in runs]


def draw(schedule: Schedule, runs: Sequence[Run]) -> Figure:
    """Validation loss against outer steps and time, and the schedules of the first seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
        steps, seconds, rates = figure.subplots(1, 3)
        anchors = [*schedule.tried]
        curves(steps, runs, anchors, "validation_loss", "outer_step")
        curves(seconds, runs, anchors, "validation_loss")
        steps.set(xlabel="outer step", ylabel="validation loss", yscale="log")
        seconds.set(xlabel="run time without compilation (s)", yscale="log")
        figure.legend(*steps.get_legend_handles_labels(), loc="outside upper center", ncols=5)
        colours = iter(ANCHOR_COLOURS)
        for run in (run for run in runs if run.seed == runs[0].seed):
            style = {"color": next(colours), "linestyle": "--"} if run.method in anchors else {}
            rates.plot(np.arange(STEPS) + 1, schedule.rates(run.outcome.x), **style)
        rates.set(xlabel="step of SGD", ylabel=f"learning rate, seed {runs[0].seed}", yscale="log")
    return figure


DEFAULTS = Options(tuple(row.name for row in ROWS), budget=120.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Learning rates: learn the schedule of 64 steps of SGD for a network on digits.

    The anchors, schedules with the best of some rates on the validation loss, always run. Methods that need more
    directions than x has entries do not.
    """

    schedule: Literal["each-step", "line"] = "each-step"
    """A rate for each step, or three numbers: the first rate, the last one, and the momentum."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        names = [row.name for row in self._fitting()]
        self.common.check_methods(names if self.common.methods != DEFAULTS.methods else [*DEFAULTS.methods])

    def _fitting(self) -> list[Row]:
        size = len(SCHEDULES[self.schedule].start)
        return [row for row in ROWS if row.settings.get("directions", 0) <= size]

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        schedule = SCHEDULES[self.schedule]
        steps = self.common.steps(OUTER_STEPS)
        methods = self._methods(schedule, steps)
        read = functools.partial(load, "digits", corruption=0, **SPLIT)
        task = Task(
            title=f"Learning rates of {STEPS} steps on digits ({self.schedule}, {len(schedule.start)} numbers)",
            folder=f"{TASK}-{self.schedule}",
            outer_steps=steps,
            methods=[method.name for method in methods],
            anchors=[*schedule.tried],
            runs=functools.partial(outer_loops, TASK, methods, read, steps, self.common),
            columns=COLUMNS,
            caption=CAPTION,
            draw=functools.partial(draw, schedule),
            settle=functools.partial(by_hand, schedule),
        )
        return perform(task, self.common, self)

    def _methods(self, schedule: Schedule, steps: int) -> list[Method]:
        measured = measure(schedule)

        def best(tried: np.ndarray, data: Data) -> Array:
            losses = [measured(jnp.asarray(x), data)["validation_loss"].item() for x in tried]
            return jnp.asarray(tried[np.nanargmin(losses)])

        def start(x: Callable[[Data], Array]) -> Callable[[Data], tuple[Array, PyTree]]:
            return lambda data: (x(data), first_weights(MODEL, data))

        inner, first = training(schedule), jnp.asarray(schedule.start)
        adam = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(optax.linear_schedule(OUTER_RATE, 0, steps)))
        shared = Shared(
            outer_loss=outer_loss,
            optimizer=adam,
            start=start(lambda data: first),
            evaluate=lambda data, carry: {name: value.item() for name, value in measured(carry.x, data).items()},
            around=renewed,
            configuration={
                **{"schedule": self.schedule, **SPLIT, "l2": L2},
                **{"inner_steps": STEPS, "minibatch": MINIBATCH, "first_rate": FIRST_RATE},
                "outer_optimizer": {"adam": {"linear_schedule": OUTER_RATE}, "clip_by_global_norm": CLIP},
            },
        )
        anchors = {
            name: shared.fixed(start=start(functools.partial(best, tried))) for name, tried in schedule.tried.items()
        }
        rows = self.common.chosen(self._fitting(), foreign)
        return [
            *(anchor.method(name, no_gradient, inner, {}) for name, anchor in anchors.items()),
            *(shared.method(row.name, row.solver, inner, row.settings) for row in rows),
        ]
