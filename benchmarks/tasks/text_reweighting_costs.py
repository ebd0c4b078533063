"""What a hypergradient of text reweighting costs, beside the training steps that it comes between.

One thread does everything, and the programs take turns, so that ratios of CPU seconds hold on a busy machine.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import bilevax as bx
from benchmarks.harness.clock import Spent
from benchmarks.harness.folder import Folder
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Columns, Run, table
from benchmarks.harness.resuming import kept
from benchmarks.harness.runner import Options
from benchmarks.harness.threads import pinned
from benchmarks.harness.timing import compiled, interleaved
from benchmarks.tasks.methods import draw_outer
from benchmarks.tasks.weighting import DAMPING, GAUSS_NEWTON, Problem, identity, implicit
from bilevax.typing import Array, Key, PyTree

ROUNDS = 3
EVERY = 10  # hypergradients that share an inverse, where it is kept
RATIO = "{:.2f}".format
COLUMNS: Columns = {
    "hypergradient_cpu": ("H alone\n(CPU)", RATIO),
    "hypergradient_wall": ("\n(wall)", RATIO),
    "outer_cpu": ("outer\nstep\n(CPU)", "{:.3f}".format),
    "outer_wall": ("\n\n(wall)", "{:.3f}".format),
    "shared_cpu": (f"H, {EVERY} on\none inverse\n(CPU)", RATIO),
    "compile_ratio": ("compile", RATIO),
    "kept_ratio": ("kept\nmemory", RATIO),
    "temp_ratio": ("temp.\nmemory", RATIO),
}
CAPTION = f"""\
H alone: a hypergradient with a fresh inverse, in training steps. outer step: inner steps and such a hypergradient, in
outer steps of identity. {EVERY} on one inverse: the mean of one that inverts and {EVERY - 1} that use what it kept
(inverse_every={EVERY}), in gradients. compile: of H alone, in compilations of a gradient. Memory, in bytes of the
weights: what is kept with inverse_every={EVERY}, and the compiler's peak of temporary arrays of H alone.
"""


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: in lower case.
      ihvp: `ihvp(sample=..., **settings(problem))`.
      settings: `settings(problem)`.
      shares: whether it can keep an inverse.
    """

    name: str
    ihvp: Callable[..., bx.problem.IHVP]
    settings: Callable[[Problem], Mapping[str, Any]]
    shares: bool = False


def kfac(problem: Problem, **more: Any) -> dict[str, Any]:
    """Factors of words and not of padding, a fresh inverse each time."""
    return {"damping": DAMPING, "positions": problem.positions, **more}


ROWS = (
    Row("identity", identity, lambda problem: {"scale": 1.0}),
    Row("cg-3", bx.ihvp.cg, lambda problem: {"maxiter": 3, **GAUSS_NEWTON}),
    Row("kfac", bx.ihvp.kfac, kfac, shares=True),
    Row(
        "kfac-low-rank",
        bx.ihvp.kfac,
        functools.partial(kfac, inverse=bx.curvature.kronecker.low_rank(256)),
        shares=True,
    ),
    Row(
        "kfac-factored",
        bx.ihvp.kfac,
        functools.partial(kfac, inverse=bx.curvature.kronecker.factored),
        shares=True,
    ),
    Row(
        "kfac-spectral",
        bx.ihvp.kfac,
        functools.partial(kfac, inverse=bx.curvature.kronecker.spectral),
        shares=True,
    ),
)
NAMES = tuple(row.name for row in ROWS)
QUICK = NAMES[:3]


class Case(NamedTuple):
    """Where costs are measured.

    Attributes:
      name: of the folder.
      title: of the table.
      problem: both losses, and the inner steps of an outer one.
      x: scores.
      y: weights.
      batch: as many texts as all batches have.
    """

    name: str
    title: str
    problem: Problem
    x: Array
    y: PyTree
    batch: bx.Batch


class Programs(NamedTuple):
    """Compiled calls of one row: `()` -> what they return.

    Attributes:
      hypergradient: a hypergradient with a fresh inverse.
      outer: the same after the inner steps.
      inverts: a hypergradient whose inverse is kept; None where a row keeps none.
      uses: one that uses it.
      compiling: of `hypergradient`.
      temp_bytes: of it.
      kept_bytes: of the inverse that is kept.
    """

    hypergradient: Callable[[], Any]
    outer: Callable[[], Any]
    inverts: Callable[[], Any] | None
    uses: Callable[[], Any] | None
    compiling: Spent
    temp_bytes: int | None
    kept_bytes: int


def estimator(case: Case, row: Row, steps: int, **more: Any) -> bx.problem.Hypergradient:
    """The hypergradient of a row after so many inner steps."""
    problem = case.problem._replace(steps=steps)
    solver = implicit(row.ihvp, problem, **row.settings(problem), **more)
    return draw_outer(bx.hypergradient(problem.outer_loss, solver), problem.sizes["outer"])


def made(case: Case, row: Row) -> Programs:
    """The programs of a row."""
    key, batch = jax.random.key(0), case.batch

    def program(estimate: bx.problem.Hypergradient) -> tuple[Callable, Any, Spent, int | None]:
        state = estimate.init(case.x, case.y, batch)
        run, *costs = compiled(estimate.estimate, (key, state, case.x, batch))
        return run, state, *costs

    alone, state, compiling, temp_bytes = program(estimator(case, row, 0))
    outer, outer_state, _, _ = program(estimator(case, row, case.problem.steps))
    inverts = uses = None
    kept = 0
    if row.shares:
        shared, first, _, _ = program(estimator(case, row, 0, inverse_every=EVERY))
        _, second, _ = shared(key, first, case.x, batch)
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(first.solver))
        inverts, uses = (functools.partial(shared, key, at, case.x, batch) for at in (first, second))
    return Programs(
        functools.partial(alone, key, state, case.x, batch),
        functools.partial(outer, key, outer_state, case.x, batch),
        inverts,
        uses,
        compiling,
        temp_bytes,
        kept,
    )


def training(case: Case) -> tuple[Callable[[], Any], Callable[[], Any], Spent]:
    """One gradient and one training step, as calls; and what it took to compile the gradient."""
    loss, optimizer = case.problem.inner_loss, case.problem.optimizer
    draw = bx.sampling.minibatch(case.problem.sizes["inner"])

    def gradient(key: Key, x: Array, y: PyTree, data: PyTree) -> PyTree:
        return jax.grad(loss, argnums=1)(x, y, draw(key, 0, data))

    def step(key: Key, x: Array, y: PyTree, state: PyTree, data: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(gradient(key, x, y, data), state, y)
        return optax.apply_updates(y, updates), state

    key, data = jax.random.key(0), case.batch.inner
    alone, whole = (key, case.x, case.y, data), (key, case.x, case.y, optimizer.init(case.y), data)
    first, compiling, _ = compiled(gradient, alone)
    second, _, _ = compiled(step, whole)
    return functools.partial(first, *alone), functools.partial(second, *whole), compiling


def _ratio(over: Sequence[Spent], under: Sequence[Spent], field: str) -> float:
    """The median of the ratios, round by round."""
    pairs = zip(over, under, strict=True)
    return float(np.median([getattr(one, field) / getattr(other, field) for one, other in pairs]))


def measured(case: Case, rows: Sequence[Row], options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """The metrics of each row, identity among them. Programs are compiled by all threads, and timed on one."""
    gradient, step, gradient_compiling = training(case)
    programs = {row.name: made(case, row) for row in rows}
    calls: dict[Any, Callable[[], Any]] = {"gradient": gradient, "step": step}
    for name, one in programs.items():
        calls[name, "hypergradient"] = one.hypergradient
        calls |= {(name, part): call for part in ("inverts", "uses") if (call := getattr(one, part))}
    rounds, budget = (2, 1e-9) if options.quick else (ROUNDS, options.budget)
    with pinned() as one_cpu:
        spent = interleaved(calls, rounds, budget, options.seed)
        outer = interleaved({name: one.outer for name, one in programs.items()}, rounds, budget, options.seed)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(case.y))
    reference = dict(zip(("step_seconds", "step_cpu_seconds"), np.median(spent["step"], axis=0).tolist(), strict=True))
    reference["one_cpu"] = one_cpu
    reference["gradient_cpu_seconds"] = float(np.median([one.cpu_seconds for one in spent["gradient"]]))
    for name, one in programs.items():
        numbers: dict[str, Any] = {**reference}
        alone = spent[name, "hypergradient"]
        for field, short in (("cpu_seconds", "cpu"), ("seconds", "wall")):
            numbers[f"hypergradient_{short}"] = _ratio(alone, spent["step"], field)
            numbers[f"outer_{short}"] = _ratio(outer[name], outer["identity"], field)
        inverts, uses = (
            _ratio(spent.get((name, part), alone), spent["gradient"], "cpu_seconds") for part in ("inverts", "uses")
        )
        numbers["shared_cpu"] = (inverts + (EVERY - 1) * uses) / EVERY
        numbers["compile_ratio"] = one.compiling.cpu_seconds / gradient_compiling.cpu_seconds
        numbers["kept_ratio"] = one.kept_bytes / weights
        numbers["temp_ratio"] = None if one.temp_bytes is None else one.temp_bytes / weights
        yield name, numbers


def listed(case: Case, rows: Sequence[Row], options: Options) -> list[tuple[str, dict[str, Any]]]:
    """The same in a list."""
    return [*measured(case, rows, options)]


def run(
    cases: Iterable[Case], task: str, options: Options, folder: Folder, chosen: Mapping[str, Any], console: Console
) -> int:
    """Measures all cases, prints a table for each and writes the files; returns the exit code.

    Args:
      cases: one after the other.
      task: its name in the JSON files.
      options: rows, budget, seed.
      folder: of the files; each case has one of its own in it.
      chosen: what the JSON files say of the problem.
      console: where it prints.
    """
    names = dict.fromkeys(("identity", *options.methods))  # outer steps are told in those of identity
    rows = [row for row in ROWS if row.name in names]
    for case in cases:
        console.print(f"[dim]{case.title}: compiling and measuring {len(rows)} methods …")
        found = []
        for name, numbers in kept(options).once(case.name, functools.partial(listed, case, rows, options)):
            found.append(Run(task, name, options.seed, dict(chosen), Outcome((), numbers, {})))
            found[-1].write(folder.within(case.name))
        at = found[0].outcome.metrics
        where = "one thread on one CPU" if at["one_cpu"] else "BLAS on one thread"
        console.print(
            f"A training step takes {at['step_cpu_seconds']:.3g} CPU s ({at['step_seconds']:.3g} s on the wall), its "
            f"gradient {at['gradient_cpu_seconds']:.3g} CPU s: {where}."
        )
        console.print(table(case.title, found, COLUMNS, ()))
    console.print(CAPTION, style="dim", soft_wrap=True, markup=False)
    console.print(f"One JSON file for each row: {folder.words}", markup=False, soft_wrap=True)
    return 0


def texts(size: Any, start: int, number: int, length: int, seed: int) -> tuple[Array, Array]:
    """What a part of the encoder from block `start` on reads: words, or hidden states; no padding."""
    key = jax.random.key(seed)
    if start:
        return jax.random.normal(key, (number, length, size.width)), jnp.ones((number, length))
    return jax.random.randint(key, (number, length), 2, size.vocabulary), jnp.ones((number, length))
