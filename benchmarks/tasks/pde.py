"""An inverse problem: find the viscosity of an equation, and its first field, from few values of the solution.

    min_x  F(x) = f(x, y(x)) = mean over n × n observations of (y(x) − observed)²
    y(x) = the solution at n times, from a numerical solver of `benchmarks.tasks.pde_solvers`

    viscosity    x = log ν,                          N = 1
    field        x = (log ν, 16 Fourier modes),      N = 17:    u(0, s) = known field + Σ_k (a_k sin kπs + b_k cos kπs)

The solver is the inner problem. It may be differentiated (forward, or in reverse through all of its steps), or left a
black box and asked for differences. For the implicit function theorem it is written as a minimum in two ways:

    whole        g(x, y) = ½ ‖y − S(x)‖²: the Hessian is the identity, and the rule is reverse mode, at a higher price
    shooting     g(x, y) = ½ Σ_i ‖y_i − S_i(x, y_{i−1})‖², a residual for the interval between two observations:
                 exact with conjugate gradients that converge; with the identity (hessian-free) biased

Reference: Shen et al., arXiv 2406.14095, with finer grids; Burgers: Raissi et al., arXiv 1711.10566.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

import bilevax as bx
from benchmarks.harness.loop import Carry
from benchmarks.harness.report import COSTS, Run
from benchmarks.harness.runner import Common, Method, Task, outer_loops, perform
from benchmarks.harness.style import STYLE, curves
from benchmarks.tasks.pde_methods import MU, ROWS, Problem, Row, counted
from benchmarks.tasks.pde_solvers import EQUATIONS
from bilevax.typing import Array

TASK = "pde"
MODES = 16
DEVIATION = 0.5  # of the modes with k = 1; others have that of k = 1 divided by k


class PDESetting(NamedTuple):
    """What suits an unknown.

    Attributes:
      modes: of the first field that are not known.
      observations: n, at n times each.
      rate: of Adam, which falls to 0 linearly.
    """

    modes: int
    observations: int
    rate: float


SETTINGS = {"viscosity": PDESetting(0, 4, 0.3), "field": PDESetting(MODES, 16, 0.05)}
OUTER_STEPS = 200

COLUMNS = {
    "misfit": ("F(x)", "{:.1e}".format),
    "coefficient_error": ("error\nof ν", "{:.1e}".format),
    "field_error": ("error\nof field", "{:.1e}".format),
    "passes": ("passes", "{:,.0f}".format),
    **{name: COSTS[name] for name in ("seconds", "cpu_seconds", "compile_seconds", "temp_bytes")},
}
CAPTION = (
    "Errors are relative, at the last x. passes: runs of the solver, and tangents or cotangents taken through it;\n"
    "residuals of an inner loss count as well. temp. memory: of JAX, without what SciPy takes. In float64. The JAX\n"
    "solver itself made the observations, so that without noise errors can fall to rounding.\n"
)


class Data(NamedTuple):
    """What a seed draws.

    Attributes:
      truth: the x that is looked for, [1 + modes].
      batch: outer = observed, [n times, n places].
    """

    truth: Array
    batch: bx.Batch


def load(problem: Problem, noise: float, seed: int) -> Data:
    """Draws a true field, solves from it, and adds normal noise of this share of the root mean square."""
    random = np.random.default_rng(seed)
    order = np.arange(1, problem.modes // 2 + 1)
    modes = random.normal(size=problem.modes) * DEVIATION / np.concatenate([order, order])
    truth = jnp.asarray([np.log(problem.equation.viscosity), *modes])
    exact = jax.jit(problem.solve)(truth, None, None)[:, problem.places]
    spread = noise * jnp.sqrt(jnp.mean(exact**2))
    return Data(truth, bx.Batch(exact + spread * random.normal(size=exact.shape), None))


def evaluation(problem: Problem) -> Callable[[Data, Carry], dict[str, float | None]]:
    """A function (data, carry) -> misfit, errors and passes."""

    @jax.jit
    def misfit(x: Array, observed: Array) -> Array:
        return problem.misfit(x, problem.solve(x, None, None), observed)

    def evaluate(data: Data, carry: Carry) -> dict[str, float | None]:
        found, true = (problem.field(np.asarray(x)) for x in (carry.x, data.truth))
        return {
            "misfit": misfit(carry.x, data.batch.outer).item(),
            "coefficient_error": jnp.abs(jnp.expm1(carry.x[0] - data.truth[0])).item(),
            "field_error": (np.linalg.norm(found - true) / np.linalg.norm(true)).item() if problem.modes else None,
            "passes": carry.estimator.passes.item(),
        }

    return evaluate


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Double precision in this thread, and in those from which JAX calls SciPy back, which see the global setting."""
    with ThreadPoolExecutor(1) as another:  # this one may override the global setting
        before = another.submit(jax.config.read, "jax_enable_x64").result()
    jax.config.update("jax_enable_x64", True)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        jax.config.update("jax_enable_x64", before)


def draw(problem: Problem, start: Array, read: Callable[[int], Data], runs: Sequence[Run]) -> Figure:
    """Error against passes and time, and the field that the best run found: the first one, or the last of a known."""
    best = min((run for run in runs if run.finite), key=lambda run: (run.seed, run.outcome.metrics["misfit"]))
    metric, label = ("field_error", "first field") if problem.modes else ("coefficient_error", "viscosity")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
        passes, seconds, field = figure.subplots(1, 3)
        curves(passes, runs, (), metric, "passes")
        curves(seconds, runs, (), metric)
        passes.set(xlabel="passes through the solver", ylabel=f"relative error of the {label}")
        seconds.set(xlabel="run time without compilation (s)")
        for axes in (passes, seconds):
            axes.set(xscale="log", yscale="log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(*passes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        points = {"true": read(best.seed).truth, "start": start, "found": best.outcome.x}
        for (name, x), style in zip(points.items(), ("-k", ":k", "--r"), strict=True):
            values = problem.field(np.asarray(x)) if problem.modes else problem.solve(x, None, None)[-1]
            field.plot(problem.equation.grid, values, style, label=name)
        time = "0" if problem.modes else f"{problem.observations / (problem.observations + 1):.2g}"
        field.set(xlabel="s", ylabel=f"u({time}, s)", title=f"{best.method}, seed {best.seed}")
        field.legend()
    return figure


DEFAULTS = Common(tuple(row.name for row in ROWS), budget=120.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """An inverse problem: the viscosity of an equation, and its first field, from few values of the solution.

    Seeds draw the true field, the noise and the directions. For the viscosity without noise they change nothing.
    """

    equation: Literal["burgers", "allen-cahn"] = "burgers"
    """u_t = ν u_xx − u u_x, or u_t = ν u_xx + 5 (u − u³)."""
    unknown: Literal["viscosity", "field"] = "viscosity"
    """log ν alone, or with 16 Fourier modes of the first field."""
    observations: int | None = None
    """n, of n × n observations; by default 4 for the viscosity and 16 for the field."""
    noise: float = 0.0
    """Standard deviation of the noise, as a share of the root mean square of the observed values."""
    start: float = 0.25
    """The first viscosity, as a multiple of the true one. The first modes are zero."""
    rate: float | None = None
    """Rate of Adam, falling to 0 linearly; by default 0.3 for the viscosity and 0.05 for the field."""
    common: tyro.conf.OmitArgPrefixes[Common] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        rows = ROWS if self.common.methods == DEFAULTS.methods else self._fitting()
        self.common.check_methods([row.name for row in rows])
        if self.observations is not None and self.observations < 1:
            raise ValueError(f"observations must be >= 1; got {self.observations}. Pass, say, --observations 4.")
        if not self.noise >= 0:
            raise ValueError(f"noise must be a share >= 0; got {self.noise:g}. Pass, say, --noise 0.05.")
        for name, value in (("start", self.start), ("rate", self.rate)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0; got {value:g}. Pass, say, --{name} 0.25.")

    def _fitting(self) -> list[Row]:
        return [row for row in ROWS if row.least <= 1 + SETTINGS[self.unknown].modes]

    def run(self) -> int:
        """Runs everything in float64, prints the table and writes the files; returns the exit code."""
        setting = SETTINGS[self.unknown]
        setting = setting._replace(
            observations=self.observations or setting.observations, rate=self.rate or setting.rate
        )
        problem = Problem(EQUATIONS[self.equation], setting.modes, setting.observations)
        steps = self.common.steps(OUTER_STEPS)
        rows = self.common.chosen(self._fitting())
        read = functools.partial(load, problem, self.noise)
        with float64():
            start = jnp.zeros(1 + problem.modes).at[0].set(np.log(problem.equation.viscosity * self.start))
            methods = [self._method(row, problem, setting, start, steps) for row in rows]
            task = Task(
                title=f"The {self.unknown} of {self.equation} from {setting.observations} × {setting.observations} "
                f"observations, noise {self.noise:g}, from {self.start:g} ν",
                folder=f"{TASK}-{self.equation}-{self.unknown}",
                outer_steps=steps,
                methods=[row.name for row in rows],
                anchors=(),
                runs=functools.partial(outer_loops, TASK, methods, read, steps, self.common),
                columns=COLUMNS,
                caption=CAPTION,
                draw=functools.partial(draw, problem, start, read),
            )
            return perform(task, self.common, self)

    def _method(self, row: Row, problem: Problem, setting: PDESetting, start: Array, steps: int) -> Method:
        directions = row.directions(len(start))
        y = jnp.zeros((problem.observations, problem.equation.points))
        return Method(
            name=row.name,
            hypergradient=lambda: counted(row.hypergradient(problem, directions), row.passes),
            optimizer=optax.adam(optax.linear_schedule(setting.rate, 0, steps)),
            start=lambda data: (start, y),
            batch=lambda data: data.batch,
            evaluate=evaluation(problem),
            configuration={
                **{"equation": self.equation, "unknown": self.unknown, "noise": self.noise, "start": self.start},
                **setting._asdict(),
                "directions": directions,
                "mu": MU,
                "settings": dict(row.settings),
                "outer_optimizer": {"adam": {"linear_schedule": setting.rate}},
            },
        )
