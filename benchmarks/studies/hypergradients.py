"""How good a hypergradient is and what it costs: ways to divide by the Hessian, against the exact answer.

Hyper-cleaning of the digits by networks that are small enough for a dense solve. At each point of their training (see
`hypergradients_points`) a method makes ten estimates, at the last ten iterates of y in turn, each with no first guess
of v, and the last one is compared with the exact hypergradient. What a method keeps from one estimate to the next, such
as a decomposition, is thus as old as it would be in use; and its time is a tenth of that of all.
"""

import dataclasses
import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import bilevax as bx
from benchmarks.data.images import load
from benchmarks.harness import files
from benchmarks.harness.clock import Spent
from benchmarks.harness.folder import Folder, prepared
from benchmarks.harness.loop import Outcome
from benchmarks.harness.plugin import Function, finished, restarted
from benchmarks.harness.report import Columns, Run, table
from benchmarks.harness.resuming import kept
from benchmarks.harness.runner import Options
from benchmarks.harness.timing import compiled, interleaved, relative_error
from benchmarks.networks.model import Model
from benchmarks.studies import hypergradients_end_to_end
from benchmarks.studies.hypergradients_figure import draw
from benchmarks.studies.hypergradients_methods import DAMPING, END_TO_END, ROWS, Inner, Row
from benchmarks.studies.hypergradients_points import (
    ESTIMATES,
    NETS,
    STAGES,
    STEP_SIZE,
    UNROLLED,
    Point,
    inner_loss,
    points,
)
from benchmarks.tasks.hyper_cleaning import numbered, outer_loss
from bilevax.typing import Array, Key

TASK = "hypergradients"
SPLIT: dict[str, Any] = {"train": 500, "validation": 500, "corruption": 0.4}
DECAYS = (1e-2, 1e-3)
ROUNDS = 3
QUICK_METHODS = (
    *("identity", "neumann-10", "cg-3", "cg-10", "nystrom-10", "reverse-10", "tail-10"),
    *("diagonal", "kfac", "kfac-every-10", "ekfac", "pcg-3", "pcg-gn-3"),
)
COLUMNS: Columns = {
    **{f"cosine_{stage}": (f"cosine\n{stage}", "{:.3f}".format) for stage in STAGES},
    **{f"error_{stage}": (f"error\n{stage}", "{:.2g}".format) for stage in STAGES},
}
COSTS: Columns = {
    "products": ("prod-\nucts", "{:.0f}".format),
    "milliseconds": ("time\n(ms)", "{:.2f}".format),
    "cpu_milliseconds": ("CPU\n(ms)", "{:.2f}".format),
}
CAPTION = f"""\
cosine, error: of the estimate to the exact hypergradient at the same y (dense Hessian, float64); error: relative. Means
over the settings (weight decay, example weights), and ± standard errors over the seeds.
start, middle: after {STAGES["start"]} and {STAGES["middle"]} steps of descent, where the Hessian is indefinite;
for the exact answer it is shifted by as much as makes it positive. end: at a minimum.
products, time: of an estimate at the end, one of {ESTIMATES} in a row, in float32.
-gn: with the Gauss–Newton matrix instead of the Hessian. pcg: preconditioned by kfac. kfac-every-10: one decomposition
in ten estimates. -exact: no sampled labels. tail: reverse, and kfac for the steps before.
"""


def foreign(function: Function) -> Row:
    """The row of a function of a plugin; what it returns as a whole, and not to `implicit`, makes inner steps too."""
    net = NETS["mlp"]
    given = Inner(inner_loss(net, DECAYS[0]), STEP_SIZE, UNROLLED).given
    made = function.method(given._replace(outer_loss=functools.partial(outer_loss, net)))
    unrolled = 0 if isinstance(made, bx.problem.IHVP) else UNROLLED
    return Row(function.name, function.name, lambda inner: function.hypergradient(inner.given), unrolled)


def estimates(row: Row, net: Model) -> Callable:
    """The estimates along a path as a function (l2, xs, path, keys, batch) -> (the last one, its calls, breakdown)."""

    def program(l2: Array, xs: Array, path: Any, keys: Key, batch: bx.Batch) -> tuple:
        solver = row.solver(Inner(inner_loss(net, l2), STEP_SIZE, row.unrolled))
        hypergrad = finished(functools.partial(outer_loss, net), solver)
        first = UNROLLED - row.unrolled
        ys = jax.tree.map(lambda leaf: leaf[first : first + ESTIMATES], path)

        def step(state: Any, now: tuple) -> tuple[Any, tuple]:
            key, x, y = now
            grad, state, info = hypergrad.estimate(key, restarted(state, y), x, batch)
            return state, (grad, info.inner.calls, info.inner.breakdown)

        state = hypergrad.init(xs[0], jax.tree.map(lambda leaf: leaf[0], ys), batch)
        _, results = jax.lax.scan(step, state, (keys, xs, ys))
        return jax.tree.map(lambda leaf: leaf[-1], results)

    return program


def arguments(point: Point, seed: int, batch: bx.Batch) -> tuple:
    """What a program of `estimates` takes; the same x for all, in an axis that the compiler cannot see through."""
    xs = jnp.broadcast_to(point.x, (ESTIMATES, *point.x.shape))
    return jnp.float32(point.l2), xs, point.path, jax.random.split(jax.random.key(seed), ESTIMATES), batch


def compared(estimate: tuple, point: Point) -> dict[str, Any]:
    """An estimate beside the exact answer; one of zero, after a breakdown, has cosine 0."""
    value, calls, breakdown = estimate
    grad, exact = np.asarray(value, float), point.exact
    size = np.linalg.norm(grad)
    return {
        "l2": point.l2,
        "weights": point.weights,
        "stage": point.stage,
        "cosine": float(grad @ exact / (size * np.linalg.norm(exact))) if size else 0.0,
        "error": float(relative_error(grad, exact)),
        "products": int(calls.hessian_products),
        "breakdown": bool(breakdown),
        "smallest_eigenvalue": point.smallest,
        "gradient_norm": point.gradient_norm,
    }


def metrics(rows: Sequence[dict[str, Any]], rounds: Sequence[Spent]) -> dict[str, float]:
    """Means over the settings for each stage, the cosine of each setting at the end, and costs."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name in ("cosine", "error"):
            groups[f"{name}_{row['stage']}"].append(row[name])
        if STAGES[row["stage"]] is None:
            groups[setting(row["l2"], row["weights"])].append(row["cosine"])
    means = {name: float(np.mean(values)) for name, values in groups.items()}
    spent = [row["products"] for row in rows if STAGES[row["stage"]] is None]
    seconds, cpu_seconds = np.median(rounds, axis=0).tolist()
    costs = {"milliseconds": 1e3 * seconds / ESTIMATES, "cpu_milliseconds": 1e3 * cpu_seconds / ESTIMATES}
    return means | costs | {"products": float(np.mean(spent))} | {"breakdowns": sum(row["breakdown"] for row in rows)}


def setting(l2: float, weights: str) -> str:
    """The name of a weight decay with a choice of example weights."""
    return f"l2={l2:g}, {weights}"


DEFAULTS = Options(tuple(row.name for row in ROWS), seeds=5)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares hypergradients with the exact one, at points of the training of small networks, and what they cost."""

    nets: tuple[Literal["mlp", "cnn"], ...] = ("mlp", "cnn")
    """mlp: 64-16-10, 1,210 weights. cnn: two convolutions and a dense layer, 666 weights."""
    l2: tuple[float, ...] = DECAYS
    """Weight decays."""
    weights: tuple[Literal["equal", "random", "cleaned"], ...] = ("equal", "random", "cleaned")
    """Of the training examples: all 1/2; random; 0.95 for true and 0.05 for false labels."""
    end_to_end: tuple[Literal[1, 3, 10], ...] = ()
    """Numbers of inner steps: instead of all this, runs hyper-cleaning on minibatches with so many, once for each
    number. `--methods` names any methods; `--outer-steps` and `--budget` are those of each run."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task. The budget is for the timing of each network and seed: after three rounds, more run while
    it lasts. Quick: mlp, one weight decay and choice of weights, at most two seeds, and half of the methods."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in ROWS])
        for name in ("nets", "l2", "weights"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one; got none. Leave --{name} out for the default.")
        if not min(self.l2) > 0:
            raise ValueError(f"l2 must be numbers > 0; got {self.l2}. Pass, say, --l2 0.001.")

    def run(self) -> int:
        """Compares everything, prints the tables and writes the files; returns the exit code."""
        if self.end_to_end:
            names = END_TO_END if self.common.methods == DEFAULTS.methods else self.common.methods
            options = dataclasses.replace(self.common, methods=names)
            return hypergradients_end_to_end.run(self.end_to_end, options, self)
        console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
        finished: list[Run] = []
        folder = prepared(self, TASK, console)
        try:
            for run in self._runs(lambda text: console.print(f"[dim]{text} …", soft_wrap=True)):
                run.write(folder.within(run.configuration["net"]))
                finished.append(run)
        except KeyboardInterrupt:
            console.print("[yellow]Interrupted; the finished runs are kept.")
            return 130
        finally:
            if finished:
                self._report(finished, folder, console)
        return 0

    @property
    def _rows(self) -> list[Row]:
        shortened = self.common.quick and self.common.methods == DEFAULTS.methods
        options = dataclasses.replace(self.common, methods=QUICK_METHODS) if shortened else self.common
        return options.chosen(ROWS, foreign)

    @property
    def _grid(self) -> Sequence[tuple[float, str]]:
        grid = [(l2, weights) for l2 in self.l2 for weights in self.weights]
        return grid[-1:] if self.common.quick else grid

    def _runs(self, say: Callable[[str], None]) -> Iterator[Run]:
        for name in self.nets[:1] if self.common.quick else self.nets:
            programs: dict[str, tuple] = {}
            for seed in self.common.all_seeds[: 2 if self.common.quick else None]:
                work = functools.partial(self._of_seed, name, seed, programs, say)
                yield from kept(self).once(f"{name}-seed{seed}", work, Run, Outcome)

    def _of_seed(self, name: str, seed: int, programs: dict[str, tuple], say: Callable[[str], None]) -> list[Run]:
        """All methods; the programs are compiled if they are not there."""
        net, rows = NETS[name], self._rows
        data = load("digits", seed, **SPLIT)
        batch = numbered(data.batch)
        say(f"{name}, seed {seed}: the exact hypergradients")
        found = [point for l2, weights in self._grid for point in points(net, l2, weights, data)]
        if not programs:
            say(f"{name}: compiling {len(rows)} methods")
            example = arguments(found[0], seed, batch)
            for row in rows:
                self.common.rehearse(row.name, estimates(row, net), *example)
            programs |= {row.name: compiled(estimates(row, net), example) for row in rows}
        say(f"{name}, seed {seed}: {len(rows)} methods at {len(found)} points")
        return [*self._compare(name, seed, batch, found, programs)]

    def _compare(self, name: str, seed: int, batch: bx.Batch, found: list[Point], programs: dict) -> Iterator[Run]:
        places = [arguments(point, seed, batch) for point in found]
        outputs = {
            method: [compared(jax.device_get(program(*args)), point) for args, point in zip(places, found, strict=True)]
            for method, (program, _, _) in programs.items()
        }
        calls = {method: functools.partial(program, *places[-1]) for method, (program, _, _) in programs.items()}
        spent = interleaved(calls, ROUNDS, 1e-9 if self.common.quick else self.common.budget, seed)
        for method, (_, compiling, temp_bytes) in programs.items():
            chosen = {"net": name, "settings": self._grid, "split": SPLIT, "step_size": STEP_SIZE, "damping": DAMPING}
            chosen |= self.common.origin(method)
            curve = {key: [row[key] for row in outputs[method]] for key in outputs[method][0]}
            numbers = metrics(outputs[method], spent[method])
            numbers |= {"rounds": len(spent[method]), **compiling.named("compile_"), "temp_bytes": temp_bytes}
            yield Run(TASK, method, seed, chosen, Outcome((), numbers, curve))

    def _report(self, finished: Sequence[Run], folder: Folder, console: Console) -> None:
        for name in dict.fromkeys(run.configuration["net"] for run in finished):
            runs = [run for run in finished if run.configuration["net"] == name]
            seeds = len({run.seed for run in runs})
            console.print(table(f"{name}, mean ± standard error of {seeds} seeds", runs, {**COLUMNS, **COSTS}, ()))
            if len(self._grid) > 1:
                settings = [setting(*chosen) for chosen in self._grid]
                columns: Columns = {key: (key.replace(", ", "\n"), "{:.3f}".format) for key in settings}
                console.print(table(f"{name}, cosine at the end, by setting", runs, columns, ()))
        console.print(CAPTION, style="dim", soft_wrap=True, markup=False)
        figure = draw(finished, {row.name: row.family for row in self._rows})
        files.save(figure, folder.path / f"{TASK}.png")
        console.print(f"JSON files and the plot: {folder.words}", markup=False, soft_wrap=True)
