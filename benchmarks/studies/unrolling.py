"""The hypergradient of T inner steps, as T grows: its error, its memory and its time, for every kind of inner solver.

Hyper-cleaning of digits by a network with one hidden layer, T steps of SGD with momentum from its first weights:
F(x) = f(x, y_T(x)). Exact is the derivative of these very steps, in float64. Each estimate is made with other random
directions until a few are there or its seconds are spent; its error is the root of their mean squared error.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import filesize
from rich.console import Console

import bilevax as bx
from benchmarks.data.images import load
from benchmarks.harness import files
from benchmarks.harness.clock import Spent, timed
from benchmarks.harness.folder import Folder, prepared
from benchmarks.harness.loop import Outcome
from benchmarks.harness.plugin import finished
from benchmarks.harness.report import Columns, Run, table
from benchmarks.harness.resuming import kept
from benchmarks.harness.runner import Options
from benchmarks.harness.timing import compiled, relative_error
from benchmarks.networks.dense import perceptron, random_layers
from benchmarks.networks.model import Model
from benchmarks.studies import unrolling_tails
from benchmarks.studies.unrolling_figure import draw
from benchmarks.studies.unrolling_methods import ROWS, Row, foreign
from benchmarks.tasks.estimators import MOMENTUM, Inner
from benchmarks.tasks.hyper_cleaning import inner_loss, numbered, outer_loss
from bilevax.typing import Array, Key, PyTree

TASK = "unrolling"
STEPS = (10, 32, 100, 320, 1000, 3200, 10_000)
QUICK_STEPS = (10, 100, 320)
QUICK_METHODS = ("store-all", "two-level", "truncated-32", "kfac", "forward-16", "guided-kfac-16")
SPLIT: dict[str, Any] = {"train": 256, "validation": 256, "corruption": 0.5}
RATE = 0.05  # with momentum 0.9, about as far as plain steps of 0.5
MOST_ESTIMATES = 8
CAPTION = """\
error: relative, of the hypergradient to the exact one (the same T steps, float64); root mean square of up to 8 draws.
cosine: to the same, the mean of the draws.
memory: the compiler's peak of temporary arrays; a program over the limit is compiled, not run. time: of one estimate.
store-all, every-step, two-level: reverse mode. -b: b random directions; guided: one of them is a guess, by Kronecker
factors or from the last 32 steps. hadamard-256: all directions that there are, 16 at once. tail: plain steps of about
the same length, against their own exact hypergradient. A method is left out (–) where it would take too long, and
where T leaves it nothing to forget.
"""


class Problem(NamedTuple):
    """What is differentiated at.

    Attributes:
      x: logits of the weights, 0.
      y: first weights of the network.
      batch: images with labels and numbers.
    """

    x: Array
    y: PyTree
    batch: bx.Batch


class Estimates(NamedTuple):
    """What a method did at one T; None where it was not run.

    Attributes:
      temp_bytes: of the compiled program.
      error: root mean square of the relative errors.
      cosine: to the exact hypergradient, the mean; 0 for an estimate of zero.
      seconds, cpu_seconds: of one estimate, the medians.
      estimates: how many were made.
    """

    temp_bytes: int | None = None
    error: float | None = None
    cosine: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    estimates: int = 0


def network(hidden: int) -> Model:
    """One hidden layer with tanh."""
    return Model(functools.partial(random_layers, hidden), perceptron, bx.curvature.gauss_newton)


def problem(net: Model, seed: int) -> Problem:
    """At the beginning of cleaning."""
    batch = numbered(load("digits", seed, **SPLIT).batch)
    images, labels, _ = batch.inner
    return Problem(jnp.zeros(len(labels)), net.init(jax.random.key(seed), images.shape[1]), batch)


def program(net: Model, solver: Any) -> Callable:
    """One hypergradient from the start: (key, problem) -> (grad, y_T)."""
    hypergrad = finished(functools.partial(outer_loss, net), solver)

    def estimate(key: Key, at: Problem) -> tuple[Array, PyTree]:
        grad, state, _ = hypergrad.estimate(key, hypergrad.init(at.x, at.y, at.batch), at.x, at.batch)
        return grad, state.y

    return estimate


def exact(net: Model, inner: Inner, plain: bool, at: Problem) -> np.ndarray:
    """The derivative of all steps in float64; plain: without momentum."""
    optimizer = optax.sgd(inner.learning_rate / (1 - MOMENTUM)) if plain else inner.optimizer
    solver = bx.inner.reverse(inner.loss, optimizer, inner.steps, checkpoint=bx.inner.two_level)
    with jax.enable_x64(True):
        at = jax.tree.map(lambda leaf: jnp.asarray(leaf, float) if leaf.dtype == np.float32 else leaf, at)
        return np.asarray(jax.jit(program(net, solver))(jax.random.key(0), at)[0])


def estimated(run: Callable, keys: Key, at: Problem, answer: np.ndarray, budget: float) -> dict[str, Any]:
    """Makes estimates until the keys or the seconds are spent, one at least; the numbers of `Estimates`."""
    grads, spent = [], []
    for key in keys:
        (grad, _), one = timed(functools.partial(run, key, at))
        grads.append(np.asarray(grad, float))
        spent.append(one)
        if sum(one.seconds for one in spent) > budget:
            break
    sizes = np.linalg.norm(grads, axis=1) * np.linalg.norm(answer)
    errors, cosines = relative_error(grads, answer), grads @ answer / np.where(sizes > 0, sizes, 1)
    return {
        "error": float(np.sqrt(np.mean(errors**2))),
        "cosine": float(np.mean(cosines)),
        **Spent(*np.median(spent, axis=0).tolist()).named(),
        "estimates": len(grads),
    }


def expected(steps: int, found: Sequence[Mapping[int, Estimates]]) -> float:
    """Seconds of one estimate, in proportion to T from the largest T before; zero where nothing is known."""
    known = [(before, row.seconds) for rows in found for before, row in rows.items() if row.seconds is not None]
    if not known:
        return 0.0
    before, seconds = max(known)
    return seconds * steps / before


@dataclasses.dataclass(frozen=True)
class Config:
    """Error, memory and time of the hypergradient of T inner steps, as T grows."""

    methods: tuple[str, ...] = tuple(row.name for row in ROWS)
    """Methods to compare."""
    plugin: str | None = None
    """A Python file of yours, which is executed, or an importable module: the HYPERGRADIENTS that it defines are
    compared as well, all of them unless --methods names some; see docs/testing.md."""
    steps: tuple[int, ...] = STEPS
    """Numbers T of inner steps."""
    unrolled: tuple[int, ...] = ()
    """Numbers K of last steps: instead of all this, compares what tails add to the derivative of the last K of 600
    plain steps, on minibatches of several sizes. Only --hidden, --seeds, --seed, --quick, --results and --checkpoint
    count then."""
    hidden: int = 32
    """Hidden units of the network; 32 make 2,410 weights."""
    budget: float = 3.0
    """Seconds for the estimates of a method at one T and seed: more than one, and up to 8, are made while they last."""
    longest: float = 60.0
    """A method is left out where one estimate would last longer, in seconds, going by the T before."""
    memory: float = 1.0
    """Gibibytes; a program that needs more is compiled, but not run."""
    seeds: int = 1
    """How many seeds, of the data, the first weights and the keys."""
    seed: int = 0
    """The first seed."""
    quick: bool = False
    """T = 10, 100, 320 and six methods, where none are named; one seed, and one estimate at each T. With --unrolled its
    first and last K, one weight decay and one size of minibatches."""
    results: Path = Path("results")
    """Folder of the results; files go to its subfolder unrolling, or unrolling-quick."""
    checkpoint: Path | None = None
    """Folder in which the command keeps what is done, so that the same command goes on where it was killed."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self._options.check_methods([row.name for row in ROWS])
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps must be ints >= 1; got {self.steps}. Pass, say, --steps 10 100 1000.")
        most = unrolling_tails.STEPS
        if not all(1 <= number < most for number in self.unrolled):
            raise ValueError(f"unrolled must be ints from 1 to {most - 1}; got {self.unrolled}. Pass --unrolled 1 10.")
        for name, least in (("hidden", 1), ("seeds", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be an int >= {least}; got {value}. Pass --{name} {least} or more.")
        for name in ("budget", "longest", "memory"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be a number > 0; got {value:g}. Pass, say, --{name} 2.")

    def run(self) -> int:
        """Compares everything, prints the tables and writes the files; returns the exit code."""
        console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
        seeds = range(self.seed, self.seed + (1 if self.quick else self.seeds))
        if self.unrolled:
            return unrolling_tails.run(network(self.hidden), self.unrolled, seeds, self, console)
        found: dict[tuple[str, int], dict[int, Estimates]] = {}
        code, folder = 0, prepared(self, TASK, console, steps=self._steps)
        try:
            for steps in self._steps:
                console.print(f"[dim]T = {steps:,} …")
                work = functools.partial(self._at, steps, seeds, found)
                for name, seed, estimates in kept(self).once(f"T{steps}", work, Estimates):
                    found.setdefault((name, seed), {})[steps] = estimates
        except KeyboardInterrupt:
            console.print(f"[yellow]Interrupted at T = {steps:,}, which is dropped; what was before is kept.")
            code = 130
        if found:
            self._report([self._run(name, seed, rows) for (name, seed), rows in found.items()], folder, console)
        return code

    @property
    def _steps(self) -> tuple[int, ...]:
        return QUICK_STEPS if self.quick and self.steps == STEPS else tuple(sorted(self.steps))

    @property
    def _options(self) -> Options:
        shortened = self.quick and self.methods == tuple(row.name for row in ROWS)
        return Options(QUICK_METHODS if shortened else self.methods, plugin=self.plugin)

    @property
    def _rows(self) -> list[Row]:
        return self._options.chosen(ROWS, foreign)

    def _at(
        self, steps: int, seeds: Sequence[int], found: Mapping[tuple[str, int], Mapping[int, Estimates]]
    ) -> list[tuple[str, int, Estimates]]:
        """All methods at one T."""
        return [*self._each_at(steps, seeds, found)]

    def _each_at(
        self, steps: int, seeds: Sequence[int], found: Mapping[tuple[str, int], Mapping[int, Estimates]]
    ) -> Iterator[tuple[str, int, Estimates]]:
        net = network(self.hidden)
        inner = Inner(inner_loss(net), net.curvature, RATE, steps)
        problems = {seed: problem(net, seed) for seed in seeds}
        rows = [row for row in self._rows if steps >= row.least]
        for row in rows:
            self._options.rehearse(
                row.name,
                lambda key, at, row=row: program(net, row.solver(inner))(key, at),
                jax.random.key(0),
                problems[self.seed],
            )
        answers = {
            (seed, plain): exact(net, inner, plain, at)
            for plain in {row.plain for row in rows}
            for seed, at in problems.items()
        }
        for row in rows:
            if expected(steps, [found.get((row.name, seed), {}) for seed in seeds]) > self.longest:
                yield from ((row.name, seed, Estimates()) for seed in seeds)
                continue
            key = jax.random.key(self.seed)
            run, _, temp_bytes = compiled(program(net, row.solver(inner)), (key, problems[self.seed]))
            for seed, at in problems.items():
                if temp_bytes is not None and temp_bytes > self.memory * 2**30:
                    yield row.name, seed, Estimates(temp_bytes)
                    continue
                keys = jax.random.split(jax.random.key(seed), MOST_ESTIMATES)
                numbers = estimated(run, keys, at, answers[seed, row.plain], 0.0 if self.quick else self.budget)
                yield row.name, seed, Estimates(temp_bytes, **numbers)

    def _run(self, name: str, seed: int, rows: Mapping[int, Estimates]) -> Run:
        chosen = {"hidden": self.hidden, "split": SPLIT, "rate": RATE, "momentum": MOMENTUM, "steps": self._steps}
        chosen |= self._options.origin(name)
        curve = {"steps": list(rows)} | {
            field: [getattr(row, field) for row in rows.values()] for field in Estimates._fields
        }
        metrics = {f"{field}_{steps}": value for steps, row in rows.items() for field, value in row._asdict().items()}
        return Run(TASK, name, seed, chosen, Outcome((), metrics, curve))

    def _report(self, runs: Sequence[Run], folder: Folder, console: Console) -> None:
        for run in runs:
            run.write(folder)
        tables: dict[str, tuple[str, Callable[[float], str]]] = {
            "error": ("Relative error", "{:.2g}".format),
            "cosine": ("Cosine", "{:.3f}".format),
            "temp_bytes": ("Temporary memory", lambda number: filesize.decimal(round(number))),
            "seconds": ("Seconds of an estimate", "{:.3g}".format),
            "cpu_seconds": ("CPU seconds of an estimate", "{:.3g}".format),
        }
        order = {row.name: number for number, row in enumerate(self._rows)}
        runs = sorted(runs, key=lambda run: (order[run.method], run.seed))
        for field, (title, form) in tables.items():
            columns: Columns = {f"{field}_{steps}": (f"T = {steps:,}", form) for steps in self._steps}
            console.print(table(title, [_complete(run, columns) for run in runs], columns, ()))
        console.print(CAPTION, style="dim", soft_wrap=True, markup=False)
        figure = draw(runs, {row.name: row.family for row in self._rows})
        files.save(figure, folder.path / f"{TASK}.png")
        console.print(f"JSON files and the plot: {folder.words}", markup=False, soft_wrap=True)


def _complete(run: Run, columns: Columns) -> Run:
    """With None where a method was not asked."""
    metrics = dict.fromkeys(columns) | run.outcome.metrics
    return dataclasses.replace(run, outcome=run.outcome._replace(metrics=metrics))
