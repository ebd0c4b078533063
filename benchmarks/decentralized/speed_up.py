"""Linear speed-up: the noise that constant steps leave, against the number of agents.

    min_x  mean_i f_i(x, y*(x)),            f_i(x, y) = ½ mean_j (a_jᵀy − b_j)² + ρ/2 ‖x‖²  over validation rows
    y*(x) = argmin_y mean_i g_i(x, y),      g_i(x, y) = ½ mean_j (a_jᵀ(y − x) − b_j)² + λ/2 ‖y‖²  over training rows

F is a quadratic with the known minimum x*. N rows are divided evenly, at random; every agent draws as many rows in each
iteration, however many agents there are. The floor is the mean of ‖x̄ − x*‖² over the second half of a run.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import bilevax as bx
from benchmarks.harness import timing
from benchmarks.harness.clock import timed
from benchmarks.harness.folder import prepared
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Run
from benchmarks.harness.resuming import NOWHERE, Kept, kept
from bilevax.typing import Array, Key

TASK = "decentralized_speed_up"
SIZES = (4, 8, 16)
ROWS, FEATURES, BATCH = 1600, 8, 4
RHO, RIDGE, NOISE = 0.5, 0.1, 1.0
STEPS = bx.Levels(0.02, 0.04, 0.04)
MOMENTUM, RATE = 0.4, 0.5
ITERATIONS, QUICK_ITERATIONS = 40_000, 10_000
CHECKPOINTS = 20


class Quadratic(NamedTuple):
    """The data of all agents, and x*.

    Attributes:
      batch: leaves [n, L, ...]: (rows, targets) of each kind.
      solution: x*.
    """

    batch: bx.Batch
    solution: np.ndarray


def losses(y: Array, rows: Array, targets: Array) -> Array:
    """Half the mean squared error."""
    return jnp.mean((rows @ y - targets) ** 2) / 2


PROBLEM = bx.BilevelProblem(
    lambda x, y, batch: losses(y, *batch) + RHO / 2 * jnp.sum(x**2),
    lambda x, y, batch: losses(y - x, *batch) + RIDGE / 2 * jnp.sum(y**2),
)


def minimum(outer: tuple[np.ndarray, np.ndarray], inner: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """x*: y*(x) = M x + m is affine, and F a quadratic."""
    (rows, targets), (given, wanted) = outer, inner
    hessian, eye = given.T @ given / len(given), np.eye(FEATURES)
    M = np.linalg.solve(hessian + RIDGE * eye, hessian)
    m = np.linalg.solve(hessian + RIDGE * eye, given.T @ wanted / len(given))
    design = rows @ M
    return np.linalg.solve(design.T @ design / len(rows) + RHO * eye, design.T @ (targets - rows @ m) / len(rows))


def quadratic(n: int, seed: int) -> Quadratic:
    """The same rows for each n, divided over n agents."""
    random = np.random.default_rng(seed)

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        rows, truth = random.normal(size=(ROWS, FEATURES)), random.normal(size=FEATURES)
        return rows, rows @ truth + NOISE * random.normal(size=ROWS)

    outer, inner = drawn(), drawn()
    divided = jax.tree.map(lambda leaf: leaf.reshape(n, ROWS // n, *leaf.shape[1:]).astype(np.float32), (outer, inner))
    return Quadratic(bx.Batch(*divided), minimum(outer, inner).astype(np.float32))


def methods(gossip: bx.agents.Gossip) -> dict[str, bx.problem.Algorithm]:
    """The same steps for every n."""
    sample = bx.sampling.minibatch(BATCH)
    make = bx.decentralized
    return {
        "d-soba": make.dsoba(PROBLEM, gossip, STEPS, sample=sample),
        "dsvrbgd": make.dsvrbgd(PROBLEM, gossip, STEPS, sample=sample, momentum=MOMENTUM, rate=RATE),
    }


def errors(method: bx.problem.Algorithm, iterations: int, key: Key, batch: bx.Batch, solution: Array) -> Any:
    """‖x̄ − x*‖² after each iteration, from 0, and the last x [n, features]."""
    n = len(jax.tree.leaves(batch)[0])

    def step(state: Any, _: None) -> tuple[Any, Array]:
        state, _ = method.step(key, state, batch)
        return state, jnp.sum((jnp.mean(state.x, axis=0) - solution) ** 2)

    zeros = bx.replicate(jnp.zeros(FEATURES), n)
    state = method.init(zeros, zeros, batch)
    state, squares = jax.lax.scan(step, state, None, iterations)
    return state.x, squares


def runs(
    name: str,
    method: bx.problem.Algorithm,
    n: int,
    seeds: int,
    iterations: int,
    kept: Kept = NOWHERE,
) -> Iterator[Run]:
    """One run for each seed; the program is compiled once."""
    datasets = [quadratic(n, seed) for seed in range(seeds)]
    program = functools.cache(
        lambda: timing.compiled(functools.partial(errors, method, iterations), (jax.random.key(0), *datasets[0]))
    )

    def outcome(seed: int, data: Quadratic) -> Outcome:
        made, compiling, memory = program()
        (x, squares), spent = timed(functools.partial(made, jax.random.key(seed), *data))
        parts = np.asarray(squares, float).reshape(CHECKPOINTS, -1)
        curve = {
            "outer_step": [(number + 1) * parts.shape[1] for number in range(CHECKPOINTS)],
            "squared_distance": parts.mean(axis=1).tolist(),
        }
        metrics = {
            "squared_distance": float(squares[-1]),
            "floor": float(parts[CHECKPOINTS // 2 :].mean()),
            "outer_steps": iterations,
            **spent.named(),
            **compiling.named("compile_"),
            "temp_bytes": memory,
        }
        return Outcome(np.asarray(x), metrics, curve)

    for seed, data in enumerate(datasets):
        chosen = {
            **{"agents": n, "topology": "ring", "lower_topology": None, "partition": "iid"},
            **{"batch_size": BATCH, "rows": ROWS, "features": FEATURES, "outer_steps": iterations},
            **{"step_sizes": STEPS._asdict(), "momentum": MOMENTUM, "rate": RATE},
        }
        found = kept.once(f"{name}-n{n}-seed{seed}", functools.partial(outcome, seed, data), Outcome)
        yield Run(TASK, f"{name}-n{n}", seed, chosen, found)


@dataclasses.dataclass(frozen=True)
class Config:
    """The noise floor of decentralized methods with constant steps, for 4, 8 and 16 agents on a ring."""

    seeds: int = 3
    """How many seeds, of the rows and of the draws."""
    quick: bool = False
    """Fewer iterations."""
    results: Path = Path("results")
    """Folder of the results; files go to a subfolder with the name of the task, and -quick."""
    checkpoint: Path | None = None
    """Folder in which the command keeps what is done, so that the same command goes on where it was killed."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if self.seeds < 1:
            raise ValueError(f"seeds must be an int >= 1; got {self.seeds}. Pass --seeds 1 or more.")

    def run(self) -> int:
        """Runs everything, prints the floors and writes the files; returns the exit code."""
        console, iterations = Console(highlight=False), QUICK_ITERATIONS if self.quick else ITERATIONS
        folder = prepared(self, TASK, console, outer_steps=iterations)
        for n in SIZES:
            for name, method in methods(bx.gossip(bx.topology.ring(n))).items():
                for run in runs(name, method, n, self.seeds, iterations, kept(self)):
                    run.write(folder)
                    console.print(f"{name}, n = {n}, seed {run.seed}: ‖x̄ − x*‖² = {run.outcome.metrics['floor']:.3g}")
        return 0
