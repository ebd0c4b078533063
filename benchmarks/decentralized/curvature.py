"""Curvature in the network: SLDBO whose y and v move along directions that the agents' own curvature has rescaled.

    min_x  mean_i f_i(y*(x))      y*(x) = argmin_y mean_i g_i(x, y),   g_i = softmax regression + exp(x) / 2 · ‖y‖²

x is the logarithm of one penalty; part of the training labels is false, so that it matters. The images are badly
conditioned: their Kronecker factors are not. Every row has as many pairs of steps to choose from; it takes those that
bring all three mean directions at the mean iterate to 1e-6 of their largest first value in the fewest iterations.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

import bilevax as bx
from benchmarks.data.images import ImageName, load
from benchmarks.decentralized.choices import PARTITIONS, TOPOLOGIES, parsed
from benchmarks.decentralized.cleaning import cross_entropy, divide
from benchmarks.decentralized.network import mean
from benchmarks.harness import timing
from benchmarks.harness.clock import timed
from benchmarks.harness.grid import choice
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Columns, Run
from benchmarks.harness.resuming import kept
from benchmarks.harness.runner import Advance, Common, Task, perform
from benchmarks.harness.style import COLOURS
from bilevax.typing import Array

TASK = "decentralized_curvature"
FIRST_PENALTY = 1e-3
DAMPING = 1e-3
TOL = 1e-6
ITERATIONS, QUICK_ITERATIONS = 3000, 1000
COLUMNS: Columns = {
    "iterations": ("iterations\nto 1e-6", "{:,.0f}".format),
    "residual": ("last\nresidual", "{:.1e}".format),
    "penalty": ("learnt\npenalty", "{:.8f}".format),
    "milliseconds": ("iteration\n(ms)", "{:.2f}".format),
    "seconds": ("run\n(s)", "{:.1f}".format),
    "cpu_seconds": ("CPU\n(s)", "{:.1f}".format),
}
CAPTION = """\
residual: the largest of ‖mean d_x‖, ‖mean d_y‖ and ‖mean d_v‖ at the mean iterate, each relative to its largest value
in the first {first} iterations; iterations to 1e-6: – where it is not reached in {iterations}. kfac, ekfac: y and v are
preconditioned with the factors of each agent's own images, damped by {damping:g}; kfac-v: v alone. In float64.
Steps: the best of nine pairs for each row; kfac-v: a tenth of Newton's for v.
"""


class Row(NamedTuple):
    """SLDBO with a step for x and two for y and v, as functions of one number, and the grids of both."""

    name: str
    lower: Callable[[Any], tuple[Any, Any]]
    x_grid: tuple[float, ...]
    grid: tuple[float, ...]


def curved(make: Callable[..., bx.problem.IHVP]) -> Callable[[Any], Any]:
    """A step in front of which the inverse of Kronecker factors stands."""
    ihvp = make(damping=DAMPING, fisher=bx.curvature.fisher.exact)
    return lambda size: bx.single_loop.preconditioned(size, ihvp)


SHARES = (0.03, 0.1, 0.3)  # of the steps of Newton's method
KFAC, EKFAC = curved(bx.ihvp.kfac), curved(bx.ihvp.ekfac)
ROWS = (
    Row("plain", lambda size: (size, size), (0.1, 0.3, 1.0), (0.3, 0.6, 1.2)),
    Row("kfac-v", lambda size: (size, KFAC(0.1)), (1.0, 3.0, 10.0), (0.6, 1.2, 2.4)),
    Row("kfac", lambda size: (KFAC(size), KFAC(size)), (0.3, 1.0, 3.0), SHARES),
    Row("ekfac", lambda size: (EKFAC(size), EKFAC(size)), (0.3, 1.0, 3.0), SHARES),
)
DEFAULTS = Common(tuple(row.name for row in ROWS))


def penalized() -> bx.BilevelProblem:
    """f_i and g_i of one agent; x is a number, y [pixels, 10]; a batch ends with the weights of its rows."""
    inner_loss = bx.curvature.ModelLoss(
        lambda y, images: images @ y,
        bx.curvature.softmax_cross_entropy,
        split=lambda x, batch: batch[:2],
        weights=lambda x, batch: batch[-1],
        l2=jnp.exp,
    )

    def outer_loss(x: Array, y: Array, batch: tuple) -> Array:
        images, labels, weights = batch
        return jnp.mean(weights * cross_entropy(y, images, labels))

    return bx.BilevelProblem(outer_loss, inner_loss)


class Path(NamedTuple):
    """Of a run: the lengths of the three mean directions before each iteration, and the last mean x."""

    lengths: Array  # [iterations, 3]
    x: Array


def roll(method: bx.problem.Algorithm, problem: bx.BilevelProblem, batch: bx.Batch, key: Any, iterations: int) -> Path:
    """Runs a method from the first penalty and y = 0."""
    images = batch.inner[0]
    x, y = bx.replicate((jnp.log(jnp.asarray(FIRST_PENALTY)), jnp.zeros((images.shape[-1], 10))), len(images))

    def lengths(state: bx.single_loop.State) -> Array:
        x, y, v = mean((state.x, state.y, state.v))
        d = jax.vmap(lambda data: bx.problem.directions(problem, x, y, v, data))(batch)
        return jnp.stack([jnp.linalg.norm(part) for part in mean(d)])

    def step(state: Any, _: None) -> tuple[Any, Array]:
        return method.step(key, state, batch)[0], lengths(state)

    state, found = jax.lax.scan(step, method.init(x, y, batch), None, iterations)
    return Path(found, jnp.mean(state.x))


def residuals(lengths: np.ndarray) -> np.ndarray:
    """The largest of the lengths [..., iterations, 3], each relative to its largest value at the start."""
    first = max(1, lengths.shape[-2] // 100)
    scale = np.maximum(lengths[..., :first, :].max(-2, keepdims=True), np.finfo(float).tiny)
    return (lengths / scale).max(-1)


def reached(residual: np.ndarray) -> int | None:
    """The first iteration at TOL, in a run that ends there too."""
    hits = np.flatnonzero(residual <= TOL)
    return int(hits[0]) if hits.size and residual[-1] <= TOL else None


@dataclasses.dataclass(frozen=True)
class Config:
    """Decentralized SLDBO with and without the curvature of each agent: iterations to 1e-6."""

    data: ImageName = "digits"
    """Images."""
    agents: int = 8
    """Number of agents."""
    topology: str = "ring"
    """Graph; see decentralized-hyper-cleaning."""
    partition: str = "dirichlet:1"
    """How images are divided; see decentralized-hyper-cleaning."""
    common: tyro.conf.OmitArgPrefixes[Common] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in ROWS])
        if self.agents < 1:
            raise ValueError(f"agents must be an int >= 1; got {self.agents}. Pass, say, --agents 8.")
        parsed("partition", self.partition, PARTITIONS)
        bx.topology.check(parsed("topology", self.topology, TOPOLOGIES)(self.agents, self.common.seed))

    @property
    def iterations(self) -> int:
        """Of each run."""
        return self.common.outer_steps or (QUICK_ITERATIONS if self.common.quick else ITERATIONS)

    def load(self, seed: int) -> bx.Batch:
        """The images of a seed, divided, in float64."""
        whole = load(self.data, seed, train=960, validation=320, corruption=0.3)
        batch = divide(whole, parsed("partition", self.partition, PARTITIONS)(self.agents, seed)).batch
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, float if leaf.dtype.kind == "f" else leaf.dtype), batch)

    def runs(self, advance: Advance) -> Iterator[Run]:
        """Tunes each row on the first seed, and runs it on all of them."""
        problem = penalized()
        graph = parsed("topology", self.topology, TOPOLOGIES)(self.agents, self.common.seed)
        key, work = jax.random.key(self.common.seed), kept(self)
        for row in ROWS:
            if row.name not in self.common.methods:
                continue

            def one(x_step: Any, size: Any, batch: bx.Batch, row: Row = row) -> Path:
                steps = bx.Levels(x_step, *row.lower(size))
                method = bx.decentralized.sldbo(problem, bx.gossip(graph), steps)
                return roll(method, problem, batch, key, self.iterations)

            x_steps, sizes = (jnp.asarray(part.ravel()) for part in np.meshgrid(row.x_grid, row.grid))
            tuning = functools.partial(self._tuned, one, x_steps, sizes)
            best = work.once(f"{row.name}-tuning", tuning)
            chosen = {
                **{name: getattr(self, name) for name in ("data", "agents", "topology", "partition")},
                **choice(
                    {"x": x_steps.tolist(), "y": sizes.tolist()},
                    {"x": float(x_steps[best]), "y": float(sizes[best])},
                ),
                "outer_steps": self.iterations,
                "budget": math.inf,
                "damping": DAMPING,
            }
            for seed in self.common.all_seeds:
                once = functools.partial(self._outcome, one, x_steps[best], sizes[best], seed)
                outcome = work.once(f"{row.name}-seed{seed}", once, Outcome)
                advance(self.iterations)
                yield Run(TASK, row.name, seed, chosen, outcome)

    def _tuned(self, one: Callable[..., Path], x_steps: Array, sizes: Array) -> int:
        """The place of the best pair on the first seed."""
        tuning = jax.jit(lambda x, size, batch: jax.lax.map(lambda pair: one(*pair, batch), (x, size)))
        found = residuals(np.asarray(tuning(x_steps, sizes, self.load(self.common.seed)).lengths))
        scores = [(reached(residual) or math.inf, np.nan_to_num(residual[-1], nan=np.inf)) for residual in found]
        return min(range(len(scores)), key=scores.__getitem__)

    def _outcome(self, one: Callable[..., Path], x_step: Array, size: Array, seed: int) -> Outcome:
        """A run with a pair on a seed."""
        arguments = x_step, size, self.load(seed)
        program, compiling, _ = timing.compiled(one, arguments)
        path, spent = timed(functools.partial(program, *arguments))
        residual = residuals(np.asarray(path.lengths))
        metrics = {
            "iterations": reached(residual),
            "residual": float(residual[-1]),
            "penalty": float(jnp.exp(path.x)),
            "milliseconds": 1e3 * spent.seconds / self.iterations,
            **spent.named(),
            **compiling.named("compile_"),
            "outer_steps": self.iterations,
        }
        every = max(1, self.iterations // 100)
        curve = {
            "outer_step": list(range(0, self.iterations, every)),
            "residual": residual[::every].tolist(),
        }
        return Outcome(np.asarray(path.x), metrics, curve)

    def run(self) -> int:
        """Runs everything in float64, prints the table and writes the files; returns the exit code."""
        task = Task(
            title=f"One penalty learnt by {self.agents} agents, {self.topology}, {self.data}, {self.partition}",
            folder=TASK,
            outer_steps=self.iterations,
            methods=[row.name for row in self.common.chosen(ROWS)],
            anchors=(),
            runs=self.runs,
            columns=COLUMNS,
            caption=CAPTION.format(first=max(1, self.iterations // 100), iterations=self.iterations, damping=DAMPING),
            draw=draw,
        )
        with jax.enable_x64(True):
            return perform(task, self.common, self)


def draw(runs: Any) -> Figure:
    """The residual against iterations, of the first seed of each row."""
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, run in zip(COLOURS, [run for run in runs if run.seed == runs[0].seed], strict=False):
        axes.plot(run.outcome.curve["outer_step"], run.outcome.curve["residual"], color=colour, label=run.method)
    axes.set(xlabel="iterations", ylabel="relative residual", yscale="log")
    axes.legend()
    return figure
