"""What an iteration costs: when agents skip their derivatives, and when there are many of them.

Skipping: a network with one penalty for each pixel, on images divided over 16 agents on a ring. S3LDBO with the subset
coin evaluates ⌈p · n⌉ agents and lets all of them communicate; SLDBO evaluates all. In each round every program runs
once, in shuffled order, and its time is compared with that of SLDBO in the same round.

Growing: SLDBO with 16 to 4,096 agents on a ring, least squares with one penalty for each feature, drawn at random.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich import box, filesize
from rich.console import Console
from rich.table import Table

import bilevax as bx
from benchmarks.data.images import IMAGES, ImageName, shares
from benchmarks.harness import files
from benchmarks.harness.clock import Spent
from benchmarks.harness.folder import Folder, prepared
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Run
from benchmarks.harness.resuming import kept
from benchmarks.harness.style import COLOURS, STYLE
from benchmarks.harness.timing import interleaved, quartiles, ratios
from bilevax.typing import Array, Key

TASK = "skipping"
FRACTIONS = (1.0, 0.5, 0.25, 0.1)
SIZES = (16, 64, 256, 1024, 4096)
FEATURES, EQUATIONS = 64, 32  # of each agent's least squares
STEPS = bx.Levels(1e-3, 1e-2, 1e-2)
CAPTION = """\
Medians [quartiles] over rounds; evaluated: agents that evaluate derivatives in an iteration; speed-up: time of SLDBO in
the same round / time; memory: arguments, results and temporary arrays of the compiled program. The few agents of a
small ring fit into the processor's cache.
"""


class Timed(NamedTuple):
    """A program that was timed.

    Attributes:
      name: of the method.
      n: number of agents.
      evaluated: agents that evaluate derivatives in an iteration.
      spent: by one iteration, in each round.
      speedups: time of the first program of its group over its own, in each round.
      memory: bytes; None where a backend does not tell.
    """

    name: str
    n: int
    evaluated: int
    spent: list[Spent]
    speedups: list[float]
    memory: int | None

    @property
    def seconds(self) -> list[float]:
        """Of one iteration on the wall, in each round."""
        return [one.seconds for one in self.spent]


def network(hidden: int, pixels: int) -> dict[str, Array]:
    """The first y: normal weights of variance 1 / inputs."""
    first, last = jax.random.split(jax.random.key(0))
    return {
        "first": jax.random.normal(first, (pixels, hidden)) / pixels**0.5,
        "last": jax.random.normal(last, (hidden, 10)) / hidden**0.5,
    }


def penalized_network() -> bx.BilevelProblem:
    """Validation loss, and training loss with a penalty exp(x) for the weights of each pixel; x [pixels]."""

    def outer_loss(x: Array, y: Any, batch: tuple) -> Array:
        images, labels = batch
        logits = jnp.tanh(images @ y["first"]) @ y["last"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def inner_loss(x: Array, y: Any, batch: tuple) -> Array:
        penalty = jnp.exp(x) @ (y["first"] ** 2).sum(axis=1) + 1e-2 * (y["last"] ** 2).sum()
        return outer_loss(x, y, batch) + penalty / 2

    return bx.BilevelProblem(outer_loss, inner_loss)


def least_squares() -> bx.BilevelProblem:
    """Squared errors, and squared errors with a penalty exp(x) for each feature; x and y [features]."""

    def outer_loss(x: Array, y: Array, batch: tuple) -> Array:
        rows, targets = batch
        return ((rows @ y - targets) ** 2).mean() / 2

    def inner_loss(x: Array, y: Array, batch: tuple) -> Array:
        return outer_loss(x, y, batch) + jnp.exp(x) @ y**2 / 2

    return bx.BilevelProblem(outer_loss, inner_loss)


@functools.partial(jax.jit, static_argnums=1)
def equations(key: Key, n: int) -> bx.Batch:
    """Random rows and targets of n agents."""
    keys = jax.random.split(key, 4)
    rows = [jax.random.normal(key, (n, EQUATIONS, FEATURES)) / FEATURES**0.5 for key in keys[:2]]
    targets = [jax.random.normal(key, (n, EQUATIONS)) for key in keys[2:]]
    return bx.Batch(*zip(rows, targets, strict=True))


def compiled(
    method: bx.problem.Algorithm, start: tuple, batch: bx.Batch, iterations: int
) -> tuple[Callable, int | None]:
    """So many iterations as a function without arguments, and the bytes that they need."""

    @jax.jit
    def run(state: Any, batch: bx.Batch) -> Any:
        def step(state: Any, _: None) -> tuple[Any, None]:
            return method.step(jax.random.key(0), state, batch)[0], None

        return jax.lax.scan(step, state, None, iterations)[0]

    state = jax.jit(method.init)(*start, batch)
    made = run.lower(state, batch).compile()
    memory = made.memory_analysis()
    sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    needed = sum(getattr(memory, size) for size in sizes) if memory else None
    jax.block_until_ready(made(state, batch))  # the first call is slower
    return functools.partial(made, state, batch), needed


@dataclasses.dataclass(frozen=True)
class Config:
    """Times iterations: with agents that skip their derivatives, and with many agents."""

    data: ImageName = "mnist"
    """Images of the skipping agents; where a set has too few, they are repeated."""
    agents: int = 16
    """Number of skipping agents."""
    examples: int = 2000
    """Training images of each of them; a quarter as many to validate on."""
    hidden: int = 128
    """Hidden units of the network."""
    sizes: tuple[int, ...] = SIZES
    """Numbers of agents of the growing ring."""
    rounds: int = 5
    """Least number of rounds; in each, every program runs once."""
    budget: float = 30.0
    """Seconds for each of the two parts: more rounds run while they last, at most 200."""
    seed: int = 0
    """Of the data and of the order in the rounds."""
    quick: bool = False
    """A tenth of the images and three rounds, to see that everything runs."""
    results: Path = Path("results")
    """Folder of the results; files go to its subfolder skipping, or skipping-quick."""
    checkpoint: Path | None = None
    """Folder in which the command keeps what is done, so that the same command goes on where it was killed."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        for name in ("agents", "examples", "hidden", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be an int >= 1; got {value}. Pass, say, --{name} 16.")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes must be ints >= 1; got {self.sizes}. Pass, say, --sizes 16 64 256.")
        if not self.budget > 0:
            raise ValueError(f"budget must be a number of seconds > 0; got {self.budget:g}. Pass, say, --budget 30.")

    def run(self) -> int:
        """Times everything, prints the tables and writes the files; returns the exit code."""
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        folder, work = prepared(self, TASK, console), kept(self)
        skipping = work.once("skipping", self._skipping, Timed, Spent)
        console.print(_skipping_table(skipping, f"One iteration with {self.data}, {self.agents} agents on a ring"))
        growing = work.once("growing", self._growing, Timed, Spent)
        console.print(_growing_table(growing))
        console.print(CAPTION, style="dim", soft_wrap=True, markup=False)
        for timed in (*skipping, *growing):
            self._write(timed, folder)
        files.save(draw(skipping, growing), folder.path / f"{TASK}.png")
        console.print(f"JSON files and the plot: {folder.words}", markup=False, soft_wrap=True)
        return 0

    def _skipping(self) -> list[Timed]:
        n, examples = self.agents, max(4, self.examples // (10 if self.quick else 1))
        (images, labels), _ = IMAGES[self.data].read(1)
        order = np.random.default_rng(self.seed).permutation(len(labels))

        def part(size: int, first: int) -> tuple[Array, Array]:
            chosen = np.take(order, np.arange(first, first + n * size), mode="wrap")
            inputs = shares(images[chosen]).reshape(n, size, -1)
            return inputs, jnp.asarray(labels[chosen], jnp.int32).reshape(n, size)

        batch = bx.Batch(outer=part(examples // 4, n * examples), inner=part(examples, 0))
        pixels = images.shape[1]
        start = bx.replicate((jnp.full(pixels, -7.0), network(self.hidden, pixels)), n)
        problem, gossip = penalized_network(), bx.gossip(bx.topology.ring(n))
        methods = {"SLDBO": (bx.decentralized.sldbo(problem, gossip, STEPS), n)}
        for p in FRACTIONS:
            coin = bx.coins.subset(p)
            evaluated = coin(jax.random.key(0), 0, gossip).size
            methods[f"S3LDBO p = {p:g}"] = bx.decentralized.s3ldbo(problem, gossip, STEPS, coins=coin), evaluated
        made = {name: compiled(method, start, batch, iterations=4) for name, (method, _) in methods.items()}
        spent = self._spent({name: program for name, (program, _) in made.items()}, 4)
        return [
            Timed(name, n, evaluated, spent[name], _speedups(spent["SLDBO"], spent[name]), made[name][1])
            for name, (_, evaluated) in methods.items()
        ]

    def _growing(self) -> list[Timed]:
        made = {}
        for n in self.sizes:
            batch = equations(jax.random.key(self.seed), n)
            start = bx.replicate((jnp.zeros(FEATURES), jnp.zeros(FEATURES)), n)
            method = bx.decentralized.sldbo(least_squares(), bx.gossip(bx.topology.ring(n)), STEPS)
            made[n] = compiled(method, start, batch, iterations=10)
        spent = self._spent({n: program for n, (program, _) in made.items()}, 10)
        first = self.sizes[0]
        return [
            Timed("SLDBO", n, n, spent[n], _speedups(spent[first], spent[n]), needed) for n, (_, needed) in made.items()
        ]

    def _spent(self, programs: dict[Any, Callable], iterations: int) -> dict[Any, list[Spent]]:
        rounds, budget = (3, 1e-9) if self.quick else (self.rounds, self.budget)
        spent = interleaved(programs, rounds, budget, self.seed)
        return {name: [Spent(*(part / iterations for part in one)) for one in each] for name, each in spent.items()}

    def _write(self, timed: Timed, folder: Folder) -> None:
        (low, median, high), speedup = quartiles(timed.seconds), quartiles(timed.speedups)[1]
        metrics = {
            "seconds": median,
            "cpu_seconds": _cpu_seconds(timed),
            "seconds_lower_quartile": low,
            "seconds_upper_quartile": high,
            "speedup": speedup,
            "memory_bytes": timed.memory,
            "rounds": len(timed.seconds),
        }
        chosen = {name: getattr(self, name) for name in ("data", "agents", "examples", "hidden", "quick")}
        chosen |= {"method": timed.name, "n": timed.n, "evaluated": timed.evaluated}
        name = f"{timed.name}-n{timed.n}".replace(" = ", "").replace(" ", "-").lower()
        cpu_seconds = [one.cpu_seconds for one in timed.spent]
        curve = {"seconds": timed.seconds, "cpu_seconds": cpu_seconds, "speedup": timed.speedups}
        Run(TASK, name, self.seed, chosen, Outcome((), metrics, curve)).write(folder)


def _speedups(reference: Sequence[Spent], own: Sequence[Spent]) -> list[float]:
    return ratios([one.seconds for one in reference], [one.seconds for one in own])


def _cpu_seconds(row: Timed) -> float:
    return float(np.median([one.cpu_seconds for one in row.spent]))


def _skipping_table(rows: Sequence[Timed], title: str) -> Table:
    view = Table(title=title, box=box.HORIZONTALS, padding=(0, 1, 0, 0), show_edge=False)
    for header in ("method", "evaluated", "iteration (ms)", "CPU (ms)", "speed-up", "agents / evaluated", "memory"):
        view.add_column(header, justify="left" if header == "method" else "right")
    for row in rows:
        speedup = "{1:.2f} \\[{0:.2f}, {2:.2f}]".format(*quartiles(row.speedups))
        ideal = f"{row.n / row.evaluated:.2f}"
        cpu = f"{1e3 * _cpu_seconds(row):,.2f}"
        view.add_row(row.name, str(row.evaluated), _milliseconds(row), cpu, speedup, ideal, _bytes(row.memory))
    return view


def _growing_table(rows: Sequence[Timed]) -> Table:
    title = f"One iteration of SLDBO on a ring, d_x = d_y = {FEATURES}"
    view = Table(title=title, box=box.HORIZONTALS, padding=(0, 1, 0, 0), show_edge=False)
    for header in ("agents", "iteration (ms)", "CPU (ms)", "per agent (µs)", "memory", "per agent"):
        view.add_column(header, justify="right")
    for row in rows:
        per_agent = f"{quartiles(row.seconds)[1] / row.n * 1e6:.2f}"
        share = None if row.memory is None else row.memory // row.n
        cpu = f"{1e3 * _cpu_seconds(row):,.2f}"
        view.add_row(f"{row.n:,}", _milliseconds(row), cpu, per_agent, _bytes(row.memory), _bytes(share))
    return view


def _milliseconds(row: Timed) -> str:
    low, median, high = (1e3 * second for second in quartiles(row.seconds))
    return f"{median:,.2f} \\[{low:,.2f}, {high:,.2f}]"


def _bytes(number: int | None) -> str:
    return "–" if number is None else filesize.decimal(number)


def draw(skipping: Sequence[Timed], growing: Sequence[Timed]) -> Figure:
    """Time against the evaluated fraction, and time and memory against the number of agents."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.6), dpi=150, layout="constrained")
        fractions, times, memories = figure.subplots(1, 3)
        reference, *others = skipping
        low, median, high = (1e3 * np.array([quartiles(row.seconds) for row in others])).T
        p = np.array([row.evaluated / row.n for row in others])
        fractions.errorbar(
            p, median, np.stack([median - low, high - median]), fmt="o-", color=COLOURS[0], label="S3LDBO"
        )
        everybody = 1e3 * quartiles(reference.seconds)[1]
        fractions.axhline(everybody, color="#777777", linestyle="--", label="SLDBO")
        fractions.plot([0, 1], [0, everybody], color="#BBBBBB", linestyle=":", label="in proportion")
        fractions.set(xlabel="evaluated agents / all", ylabel="time of an iteration (ms)", ylim=(0, None))
        fractions.legend()
        n = np.array([row.n for row in growing])
        low, median, high = (1e3 * np.array([quartiles(row.seconds) for row in growing])).T
        times.errorbar(n, median, np.stack([median - low, high - median]), fmt="o-", color=COLOURS[0], label="SLDBO")
        times.plot(n, median[-1] * n / n[-1], color="#BBBBBB", linestyle=":", label="linear")
        times.set(xlabel="agents", ylabel="time of an iteration (ms)", xscale="log", yscale="log")
        memory = np.array([np.nan if row.memory is None else row.memory / 2**20 for row in growing])
        memories.plot(n, memory, "o-", color=COLOURS[0], label="SLDBO")
        memories.plot(n, memory[-1] * n / n[-1], color="#BBBBBB", linestyle=":", label="linear")
        memories.set(xlabel="agents", ylabel="memory (MiB)", xscale="log", yscale="log")
        times.legend()
    return figure
