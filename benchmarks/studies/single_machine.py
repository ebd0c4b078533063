"""Single-machine methods on one yardstick: the penalties of a logistic regression from small batches.

    min_x  F(x) = f(y*(x)) = mean over the outer rows of log(1 + exp(−b aᵀy*))
    y*(x) = argmin_y g(x, y) = mean over the inner rows of log(1 + exp(−b aᵀy)) + ½ Σ_j exp(x_j) y_j²

The problem of `regularization` without its scaling and its box, as the published comparisons have it: batches of 64
consecutive rows, float32, 2¹⁷ iterations from one random point, and F at the end with the inner problem solved.

Reference: Dagréou et al., arXiv 2201.13409, section 4; start point, batches and step sizes of the rows `published` are
those of the benchmark suite that belongs to it (github.com/benchopt/benchmark_bilevel).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import bilevax as bx
from benchmarks.harness import timing
from benchmarks.harness.clock import Spent, timed
from benchmarks.harness.loop import Outcome, Progress, goes_on
from benchmarks.harness.plugin import ALGORITHMS, Function
from benchmarks.harness.report import COSTS, Run
from benchmarks.harness.resuming import NOWHERE, Kept, kept
from benchmarks.harness.runner import Advance, Options, Task, perform
from benchmarks.harness.style import STYLE, curves
from benchmarks.tasks.logistic import Examples, exact
from benchmarks.tasks.regularization import SETTINGS
from bilevax.typing import Array, Key, Scalar

TASK = "single-machine"
BATCH = 64
ITERATIONS = 2**17
CHUNKS = 8
QUICK_ITERATIONS = 60
START = 2442  # seed of the published start point
BOX = (-12.0, 1.0)  # of the tuned rows: a penalty above 2 / (step size of y) makes y diverge
REFERENCE = {"soba": 0.3629, "amigo": 0.2087}  # F of the published code on ijcnn1, seeds ± 3e-4

COLUMNS = {"exact_loss": ("F(x)", "{:.5f}".format), "exact_gradient": ("|∇F(x)|²", "{:.1e}".format), **COSTS}
CAPTION = (
    "F(x) and |∇F(x)|²: at the last x, in float64 with the inner problem solved to 1e-10, whatever the method did.\n"
    "Gradients and products: on batches of 64 rows, but for the full passes of srba and vrbo.\n"
)
PUBLISHED = "The published code ends at F(x) = {soba:.4f} (soba) and {amigo:.4f} (amigo) after 2^17 iterations.\n"


class Data(NamedTuple):
    """One data set: inner and outer rows, and the same as float32 arrays, (features [N, d], labels [N]) twice."""

    inner: Examples
    outer: Examples
    batch: bx.Batch


class Row(NamedTuple):
    """A method.

    Attributes:
      name: in the table.
      make: `make(problem, step_sizes, sample, rows, **options)`, with the number of inner rows.
      steps: `Levels` of (a, p): the step size a / (k + 1)^p at iteration k.
      options: of the method.
      tuned: whether x takes steps of Adam of these sizes, in a box, or plain steps.
      sample: `sample(size)`, how its batches are drawn.
      batch: what it is handed of the data.
    """

    name: str
    make: Callable[..., bx.problem.Algorithm]
    steps: bx.Levels
    options: Mapping[str, Any] = {}
    tuned: bool = True
    sample: Callable[[int], Any] | None = None
    batch: Callable[[bx.Batch], bx.Batch] = lambda batch: batch


def blocks(size: int) -> Any:
    """Draws `size` consecutive rows, the last block overlapping the one before it."""

    def sample(key: Key, t: Scalar, data: Any) -> Any:
        number = -(-len(data[1]) // size)
        return _block(jax.random.randint(key, (), 0, number), size, data)

    return sample


def blocks_in_order(size: int) -> Any:
    """The same, but a first pass in the order of the file: in a recording that is not random."""

    def sample(key: Key, k: Array, data: Any) -> Any:
        number = -(-len(data[1]) // size)
        return _block(jnp.where(k < number, k, jax.random.randint(key, (), 0, number)), size, data)

    return sample


def _block(i: Array, size: int, data: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * size, size), data)


def trimmed(batch: bx.Batch) -> bx.Batch:
    """As many rows as make whole blocks: of 64 inner rows or a few more, and equally many blocks of outer rows."""
    number = len(batch.inner[1]) // BATCH
    return jax.tree.map(lambda leaf: leaf[: len(leaf) // number * number], batch)


def saba(problem: bx.BilevelProblem, sizes: bx.Levels, sample: Any, rows: int) -> bx.problem.Algorithm:
    """SABA draws the blocks of its table itself."""
    return bx.algorithms.saba(problem, sizes, blocks=rows // BATCH)


def recursive(make: Callable[..., bx.problem.Algorithm]) -> Callable[..., bx.problem.Algorithm]:
    """A method with full passes, one for each half of the batches that the data have."""

    def made(
        problem: bx.BilevelProblem, sizes: bx.Levels, sample: Any, rows: int, **options: Any
    ) -> bx.problem.Algorithm:
        return make(problem, sizes, sample=sample, every=max(1, rows // (2 * BATCH)), **options)

    return made


def plain(make: Callable[..., bx.problem.Algorithm]) -> Callable[..., bx.problem.Algorithm]:
    """A method that does not ask how many rows there are."""

    def made(
        problem: bx.BilevelProblem, sizes: bx.Levels, sample: Any, rows: int, **options: Any
    ) -> bx.problem.Algorithm:
        return make(problem, sizes, sample=sample, **options)

    return made


def without_v(make: Callable[..., bx.problem.Algorithm]) -> Callable[..., bx.problem.Algorithm]:
    """A method that has no v, and no step of it."""
    return lambda problem, sizes, **options: make(problem, bx.Levels(sizes.x, sizes.y), **options)


def sizes(x: float, y: float, *, x_power: float = 0.5, y_power: float = 0.0, v: float | None = None) -> bx.Levels:
    """Step sizes (a, p); those of v are those of y, or a constant."""
    return bx.Levels((x, x_power), (y, y_power), (y, y_power) if v is None else (v, 0.0))


def foreign(function: Function) -> Row:
    """The row of a function of a plugin, with the step sizes of most rows."""

    def make(problem: bx.BilevelProblem, sizes: bx.Levels, sample: Any, rows: int) -> bx.problem.Algorithm:
        return function.algorithm(problem, sizes, sample=sample)

    return Row(function.name, make, sizes(0.1, 0.25))


algorithms = bx.algorithms
METHODS = (
    Row(
        "soba-published",
        plain(algorithms.soba),
        sizes(100 / 32, 1 / 32, y_power=0.5),
        tuned=False,
        sample=blocks_in_order,
    ),
    Row("amigo-published", plain(algorithms.amigo), sizes(10 / 8, 1 / 8, x_power=0.0), tuned=False),
    Row("soba", plain(algorithms.soba), sizes(0.1, 1.0, y_power=0.2)),
    Row("saba", saba, sizes(0.1, 0.25), batch=trimmed),
    Row("sustain", plain(algorithms.sustain), sizes(0.1, 0.25), {"momentum": 0.1}),
    Row("srba", recursive(algorithms.srba), sizes(0.1, 0.25)),
    Row("fsla", plain(algorithms.fsla), sizes(0.1, 0.5, y_power=0.2), {"momentum": 0.1}),
    Row("mrbo", plain(algorithms.mrbo), sizes(0.1, 0.25, v=0.25), {"momentum": 0.1}),
    Row("vrbo", recursive(algorithms.vrbo), sizes(0.1, 0.25), {"steps": 3, "terms": 5}),
    Row("stocbio", plain(algorithms.stocbio), sizes(0.1, 0.25), {"steps": 3}),
    Row("amigo", plain(algorithms.amigo), sizes(0.1, 0.25), {"steps": 3}),
    Row("bsa", plain(algorithms.bsa), sizes(0.1, 0.5, y_power=0.5, v=0.25), {"steps": 3}),
    Row("ttsa", plain(algorithms.ttsa), sizes(0.1, 0.5, x_power=0.6, y_power=0.4, v=0.25)),
    Row("f2sa", plain(without_v(algorithms.f2sa)), sizes(0.1, 0.25), {"multiplier": 30.0, "steps": 3}),
    Row("pzobo", plain(without_v(algorithms.pzobo)), sizes(0.1, 0.25), {"steps": 3}),
)


def outer_loss(x: Array, y: Array, batch: tuple) -> Array:
    """f, the mean logistic loss."""
    features, labels = batch
    return jnp.mean(jax.nn.softplus(-labels * (features @ y)))


def inner_loss(x: Array, y: Array, batch: tuple) -> Array:
    """g, the mean logistic loss with its penalties."""
    return outer_loss(x, y, batch) + jnp.exp(x) @ y**2 / 2


PROBLEM = bx.BilevelProblem(outer_loss, inner_loss)


def load(name: str, seed: int) -> Data:
    """Reads the rows, and makes float32 arrays of them."""
    inner, outer = SETTINGS[name].rows(seed, False)

    def arrays(rows: Examples) -> tuple:
        return jnp.asarray(rows.features.toarray(), jnp.float32), jnp.asarray(rows.labels, jnp.float32)

    return Data(inner, outer, bx.Batch(outer=arrays(outer), inner=arrays(inner)))


def start(features: int) -> tuple[Array, Array]:
    """The published start point: y normal, and penalties exp x uniform on [0, 1]."""
    with jax.threefry_partitionable(True):
        y_key, x_key = jax.random.split(jax.random.key(START))
        y = jax.random.normal(y_key, (features,), jnp.float32)
        return jnp.log(jax.random.uniform(x_key, (features,), jnp.float32)), y


def method(row: Row, rows: int) -> bx.problem.Algorithm:
    """The row on data with so many inner rows."""
    x, y, v = (bx.single_loop.decay(a, p) if p else a for a, p in row.steps)
    x = boxed(optax.adam(x)) if row.tuned else x
    return row.make(PROBLEM, bx.Levels(x, y, v), (row.sample or blocks)(BATCH), rows, **row.options)


def boxed(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, followed by a projection of x on the box."""

    def update(grad: Array, state: Any, x: Array) -> tuple[Array, Any]:
        step, state = optimizer.update(grad, state, x)
        return optax.projections.projection_box(x + step, *BOX) - x, state

    return optax.GradientTransformation(optimizer.init, update)


class Program(NamedTuple):
    """A compiled chunk of iterations: `chunk(state, key, batch) -> (state, calls)`."""

    chunk: Callable
    compiling: Spent
    temp_bytes: int | None


def compiled(algorithm: bx.problem.Algorithm, state: Any, batch: bx.Batch, size: int) -> Program:
    """Compiles `size` iterations; the batch stays an argument."""

    def chunk(state: Any, key: Key, batch: bx.Batch) -> tuple[Any, bx.problem.Calls]:
        def step(state: Any, _: None) -> tuple[Any, bx.problem.Calls]:
            state, info = algorithm.step(key, state, batch)  # which folds in k
            return state, info.calls

        state, calls = jax.lax.scan(step, state, length=size)
        return state, jax.tree.map(jnp.sum, calls)

    return Program(*timing.compiled(chunk, (state, jax.random.key(0), batch)))


def evaluate(data: Data, state: Any) -> dict[str, float]:
    """F(x) and |∇F(x)|², exact."""
    x = np.asarray(state.x, float)
    if not np.isfinite(x).all():
        return dict.fromkeys(("exact_loss", "exact_gradient"), float("nan"))
    y = np.asarray(state.y, float)
    at = exact(data.inner, data.outer, x, y if np.isfinite(y).all() else np.zeros_like(y))
    return {"exact_loss": at.value, "exact_gradient": at.gradient @ at.gradient}


def drive(
    row: Row, data: Data, seed: int, iterations: int, budget: float, advance: Advance, kept: Kept = NOWHERE
) -> Outcome:
    """Runs one method, until the iterations or the seconds are spent or x is not finite."""
    batch, features = row.batch(data.batch), data.batch.inner[0].shape[1]
    algorithm = method(row, len(batch.inner[1]))
    state = algorithm.init(*start(features), batch)
    size = iterations // CHUNKS if iterations % CHUNKS == 0 else iterations
    program = compiled(algorithm, state, batch, size)
    state, done = kept.restored(state, Progress(), Spent)
    keep = kept.keeper()
    advance(done.number * size)
    while (done.number + 1) * size <= iterations and goes_on(done, budget, "exact_loss"):
        (state, calls), more = timed(functools.partial(program.chunk, state, jax.random.key(seed), batch))
        spent, counts = done.spent.plus(more), {name: count.item() for name, count in calls._asdict().items()}
        point = {"outer_step": (done.number + 1) * size, **spent.named()} | evaluate(data, state)
        done = done.plus(spent, point, counts)
        keep(done.number, state, done)
        advance(size)
    metrics = done.metrics | {**program.compiling.named("compile_"), "temp_bytes": program.temp_bytes}
    return Outcome(state.x, metrics, dict(done.curve))


def rehearsal(row: Row, batch: bx.Batch) -> Any:
    """Two iterations from the start, where what they hand on must stay of one kind."""
    batch, features = row.batch(batch), batch.inner[0].shape[1]
    algorithm = method(row, len(batch.inner[1]))
    first = algorithm.init(*start(features), batch)
    return jax.lax.scan(
        lambda state, key: algorithm.step(key, state, batch), first, jax.random.split(jax.random.key(0))
    )


def runs(name: str, rows: Sequence[Row], iterations: int, options: Options, advance: Advance) -> Iterator[Run]:
    """Each method on each seed, in order."""
    datasets = {seed: load(name, seed) for seed in options.all_seeds}
    origins = {row.name: options.origin(row.name) for row in rows}
    for row in rows:
        options.rehearse(row.name, functools.partial(rehearsal, row), datasets[options.seed].batch)
    for row in rows:
        for seed, data in datasets.items():
            work = functools.partial(drive, row, data, seed, iterations, options.budget, advance)
            outcome = kept(options).by_steps(f"{row.name}-seed{seed}", work, Outcome)
            configuration = {
                **origins[row.name],
                "data": name,
                "batch": BATCH,
                "step_sizes": row.steps._asdict(),
                "options": dict(row.options),
                "outer_optimizer": "adam" if row.tuned else "sgd",
                "box": BOX if row.tuned else None,
                "first_pass_in_order": row.sample is blocks_in_order,
                "start": START,
                "outer_steps": iterations,
                "budget": options.budget,
            }
            yield Run(TASK, row.name, seed, configuration, outcome)


def draw(finished: Sequence[Run]) -> Figure:
    """F and |∇F|² against time."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), dpi=150, layout="constrained")
        value, gradient = figure.subplots(1, 2)
        for axes, metric, label in ((value, "exact_loss", "F(x)"), (gradient, "exact_gradient", "|∇F(x)|²")):
            curves(axes, finished, (), metric)
            axes.set(xlabel="run time without compilation (s)", ylabel=label, xscale="log")
        gradient.set_yscale("log")
        figure.legend(*value.get_legend_handles_labels(), loc="outside upper center", ncols=8)
    return figure


DEFAULTS = Options(tuple(row.name for row in METHODS), budget=600.0, kind=ALGORITHMS)


@dataclasses.dataclass(frozen=True)
class Config:
    """All single-machine methods on the penalties of a logistic regression, from batches of 64 rows.

    The rows `published` have the step sizes that a published comparison chose on ijcnn1. In the others, whose step
    sizes were chosen here on ijcnn1, x takes steps of Adam in a box. 2^17 iterations take seconds to minutes.
    """

    data: Literal["ijcnn1", "a9a", "w8a"] = "ijcnn1"
    """A public data set of LIBSVM."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in METHODS])

    def run(self) -> int:
        """Runs everything in float32, prints the table and writes the files; returns the exit code."""
        wanted = self.common.outer_steps or ITERATIONS
        iterations = min(wanted, QUICK_ITERATIONS) if self.common.quick else wanted
        rows = self.common.chosen(METHODS, foreign)
        task = Task(
            title=f"Single-machine methods on {self.data}, batches of {BATCH}",
            folder=f"{TASK}-{self.data}",
            outer_steps=iterations,
            methods=[row.name for row in rows],
            anchors=(),
            runs=functools.partial(runs, self.data, rows, iterations, self.common),
            columns=COLUMNS,
            caption=CAPTION + PUBLISHED.format(**REFERENCE) * (self.data == "ijcnn1"),
            draw=draw,
        )
        with jax.enable_x64(False):
            return perform(task, self.common, self)
