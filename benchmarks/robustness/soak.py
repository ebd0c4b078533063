"""Loops that run for long: memory, arrays, traces, compiled programs and open files must stay what they are.

Each loop calls a jitted program again and again, as the jobs do: outer steps of hyper-cleaning by conjugate gradients,
a method over a graph, and outer steps with Kronecker factors. The first tenth of its time warms it up.
"""

import contextlib
import dataclasses
import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import bilevax as bx
from benchmarks.data.images import load
from benchmarks.decentralized import hyper_cleaning as over_a_graph
from benchmarks.harness.loop import outer_steps
from benchmarks.networks.dense import MODELS
from benchmarks.robustness.page import markdown, show
from benchmarks.tasks import hyper_cleaning
from bilevax.typing import Array

TASK = "soak"
CHUNK = 10  # outer steps or iterations of a program
WARM_UP = 0.1  # of the time
GROWTH = 2**24  # bytes by which memory may grow after it
PROGRAMS = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration")

Advance = Callable[[Any, int], Any]


class Loop(NamedTuple):
    """What runs for long.

    Attributes:
      name: in the table.
      start: the first state.
      advance: `advance(state, number) -> state`, CHUNK steps.
    """

    name: str
    start: Callable[[], Any]
    advance: Advance


class Level(NamedTuple):
    """What the process holds at a moment: bytes of memory, JAX arrays, open files, and programs traced or compiled."""

    memory: int
    arrays: int
    files: int
    programs: int


class Row(NamedTuple):
    """How a loop went: steps, what the process held after the warm-up and at the end, and bytes that came a minute."""

    loop: str
    steps: int
    first: Level
    last: Level
    slope: float

    @property
    def constant(self) -> bool:
        """Whether nothing grew."""
        return self.last.memory <= self.first.memory + GROWTH and self.last[1:] == self.first[1:]


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Yields a list to which each trace and each compilation adds itself."""
    events: list[str] = []

    def hear(event: str, duration_secs: float, **more: str | int) -> None:
        if event in PROGRAMS:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def memory() -> int:
    """Bytes that the process holds now; where the system does not tell, the most that it has held."""
    told = Path("/proc/self/statm")
    if told.exists():
        return int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def level(programs: int) -> Level:
    """What this process holds now."""
    return Level(memory(), len(jax.live_arrays()), len(os.listdir("/dev/fd")), programs)


def soaked(loop: Loop, seconds: float) -> Row:
    """Runs a loop for so many seconds."""
    with counted() as events:
        state = jax.block_until_ready(loop.advance(loop.advance(loop.start(), 0), 1))  # compiled by now
        number, begin, samples = 2, time.monotonic(), list[tuple[float, int]]()
        first = None
        while (spent := time.monotonic() - begin) < seconds or first is None:
            state = jax.block_until_ready(loop.advance(state, number))
            number += 1
            if first is None and spent >= WARM_UP * seconds:
                first = level(len(events))
            if first is not None and (not samples or spent > samples[-1][0] + seconds / 500):
                samples.append((spent, memory()))
        last = level(len(events))
    times, sizes = np.transpose([*samples, (time.monotonic() - begin, last.memory)])
    slope = float(np.polyfit(times, sizes, 1)[0] * 60)
    return Row(loop.name, CHUNK * number, first, last, slope)


def _hypergradients(name: str, model: str, ihvp: bx.problem.IHVP) -> Loop:
    network, data = MODELS[model], load("digits", seed=0, train=1000, validation=300, corruption=0.5)
    (images, labels), outer = data.batch.inner, data.batch.outer
    batch = bx.Batch(outer, (images, labels, jnp.arange(len(labels))))
    solver = bx.inner.implicit(hyper_cleaning.inner_loss(network), optax.sgd(0.2), steps=20, ihvp=ihvp)
    hypergrad = bx.hypergradients.hypergradient(functools.partial(hyper_cleaning.outer_loss, network), solver)
    start, chunk = outer_steps(hypergrad, optax.adam(0.1), batch)
    chunk = jax.jit(chunk)

    def advance(carry: Any, number: int) -> Any:
        return chunk(carry, jax.random.split(jax.random.key(number), CHUNK), batch)[0]

    return Loop(name, lambda: start(jnp.zeros(len(labels)), network.init(jax.random.key(0), images.shape[1])), advance)


def _agents() -> Loop:
    network = over_a_graph.network(over_a_graph.Config().load(0))
    batch, (x, y) = jax.tree.map(jnp.asarray, network.batch), network.start
    n = batch.inner[0].shape[0]
    method = bx.decentralized.sldbo(network.problem, bx.gossip(bx.topology.ring(n)), step_sizes=(10.0, 0.3, 0.3))

    @jax.jit
    def chunk(state: Any, key: Array, batch: bx.Batch) -> Any:
        def step(state: Any, key: Array) -> tuple[Any, Any]:
            state, info = method.step(key, state, batch)
            return state, info.breakdown

        return jax.lax.scan(step, state, jax.random.split(key, CHUNK))[0]

    return Loop(
        "SLDBO on a ring",
        lambda: method.init(x, y, batch),
        lambda state, number: chunk(state, jax.random.key(number), batch),
    )


def loops() -> list[Callable[[], Loop]]:
    """The main job, a method over a graph, and Kronecker factors."""
    cg = functools.partial(bx.ihvp.cg, maxiter=5, curvature=bx.curvature.gauss_newton)
    kfac = functools.partial(bx.ihvp.kfac, damping=1e-3, inverse_every=10)
    return [
        lambda: _hypergradients("hyper-cleaning, CG", "linear", cg()),
        _agents,
        lambda: _hypergradients("hyper-cleaning, KFAC", "mlp", kfac()),
    ]


def table(rows: list[Row]) -> str:
    """Both levels of each loop."""

    def cells(row: Row) -> list[str]:
        mebibytes = [f"{one.memory / 2**20:.1f}" for one in (row.first, row.last)]
        counts = [f"{row.first[k]} → {row.last[k]}" for k in (1, 2)]
        traced = row.last.programs - row.first.programs
        return [row.loop, f"{row.steps:,}", *mebibytes, f"{row.slope / 2**20:+.2f}", *counts, str(traced)]

    header = [
        "loop",
        "steps",
        "MiB at 10 %",
        "MiB at 100 %",
        "MiB a minute",
        "arrays",
        "open files",
        "traced or compiled",
    ]
    return markdown(header, [cells(row) for row in rows])


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs three loops for long: memory, open files and compiled programs must not grow after the first tenth."""

    minutes: float = 10.0
    """Of all loops together."""
    quick: bool = False
    """Six seconds."""
    results: Path = Path("results")
    """Folder of the results; the table goes to its subfolder soak, or soak-quick, as JSON."""
    page: Path | None = None
    """A page of docs with a place for the table."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be a number > 0; got {self.minutes}. Pass, say, --minutes 10.")

    def run(self) -> int:
        """Runs the loops and prints the table; returns 1 if something grew."""
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        made = loops()
        seconds = (6.0 if self.quick else 60 * self.minutes) / len(made)
        rows = []
        for make in made:
            loop = make()
            console.print(f"[dim]{loop.name}, {seconds:.0f} s …", soft_wrap=True)
            rows.append(soaked(loop, seconds))
            if not rows[-1].constant:
                console.print(f"{loop.name}: something grew, from {rows[-1].first} to {rows[-1].last}", style="red")
        text = table(rows)
        show(console, TASK, text, rows, self.results / (TASK + "-quick" * self.quick), self.page)
        return int(not all(row.constant for row in rows))
