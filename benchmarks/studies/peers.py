"""The same hypergradients by bilevax, jaxopt, optimistix with lineax, and plain JAX: time, memory and error of each.

Every program returns the same gradient from the same float32 arrays. In each round every library runs once, in shuffled
order, and its time is divided by that of plain JAX in the same round: other work on the machine hits all alike.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import bilevax as bx
from benchmarks.data.images import load
from benchmarks.harness import files
from benchmarks.harness.clock import Spent
from benchmarks.harness.folder import Folder, prepared
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Run
from benchmarks.harness.resuming import kept
from benchmarks.harness.timing import compiled, interleaved, quartiles, ratios, relative_error
from benchmarks.studies import libraries
from benchmarks.studies.peers_table import TOLERANCE, Row, draw, show
from bilevax.typing import Array, Key, PyTree

TASK = "peers"
BASELINE = "plain JAX"
REPORTED = "bilevax, with its report"
HIDDEN = 256
# Inner steps and CG iterations of an outer step, by gradient evaluations (a product is two).
BUDGETS = ((20, 10), (40, 10), (40, 20), (60, 20), (80, 20), (60, 40), (80, 40), (120, 40))
QUICK_BUDGETS = ((40, 20), (60, 20), (80, 40))


class Problem(NamedTuple):
    """A hyper-cleaning problem, and where its hypergradient is taken.

    Attributes:
      name: of the data and the model.
      losses: f and g.
      batch: images and labels.
      x: [N], sigmoid(x) are the weights of the training examples.
      y: the first y, from which `reverse` unrolls.
      trained: the y that CG is compared at.
      step_size: of plain gradient descent on g.
    """

    name: str
    losses: bx.BilevelProblem
    batch: bx.Batch
    x: Array
    y: PyTree
    trained: PyTree
    step_size: float


def linear(y: Any, images: Array) -> Array:
    """Softmax regression."""
    return images @ y["weights"] + y["bias"][None]


def perceptron(y: Any, images: Array) -> Array:
    """A hidden layer with tanh."""
    return linear(y["last"], jnp.tanh(linear(y["first"], images)))


def losses(model: Callable, l2: float) -> bx.BilevelProblem:
    """Validation cross entropy, and weighted training cross entropy with a penalty l2 / 2 · ‖y‖²."""

    def cross_entropy(y: Any, batch: tuple) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(y, batch[0]), batch[1])

    def inner_loss(x: Array, y: Any, batch: tuple) -> Array:
        weighted = jnp.mean(jax.nn.sigmoid(x) * cross_entropy(y, batch))
        return weighted + l2 / 2 * optax.tree.norm(y, squared=True)

    return bx.BilevelProblem(lambda x, y, batch: jnp.mean(cross_entropy(y, batch)), inner_loss)


def problem(name: str, seed: int, batch: bx.Batch, hidden: int | None, l2: float, step_size: float) -> Problem:
    """Draws x and the first y at random, and trains y for 50 steps."""
    pixels = batch.inner[0].shape[1]
    x_key, first_key, last_key = jax.random.split(jax.random.key(seed), 3)

    def layer(key: Key, inputs: int, outputs: int) -> dict[str, Array]:
        return {"weights": jax.random.normal(key, (inputs, outputs)) / inputs**0.5, "bias": jnp.zeros(outputs)}

    x = jax.random.normal(x_key, (len(batch.inner[1]),))
    y: PyTree
    if hidden is None:
        both, y = losses(linear, l2), layer(first_key, pixels, 10)
    else:
        both, y = (
            losses(perceptron, l2),
            {"first": layer(first_key, pixels, hidden), "last": layer(last_key, hidden, 10)},
        )
    solve = bx.differentiable(bx.inner.no_gradient(both.inner_loss, optax.sgd(step_size), steps=50))
    return Problem(name, both, batch, x, y, jax.jit(solve)(x, y, batch.inner), step_size)


def digits(seed: int) -> Problem:
    """Softmax regression on 1,000 digits."""
    batch = load("digits", seed, train=1000, validation=300, corruption=0.5).batch
    return problem("digits softmax", seed, batch, None, l2=1e-3, step_size=0.5)


def mnist(seed: int) -> Problem:
    """A 784-256-10 network on 2,000 images."""
    batch = load("mnist", seed, train=2000, validation=2000, corruption=0.5).batch
    return problem("MNIST network", seed, batch, HIDDEN, l2=0.2, step_size=0.1)


PROBLEMS = {"digits": digits, "mnist": mnist}


def double(tree: Any) -> Any:
    """The same numbers in float64; inside `jax.enable_x64(True)`."""
    return jax.tree.map(lambda leaf: leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def gradient(hypergrad: bx.problem.Hypergradient, whole: bool = False) -> Callable:
    """One estimate from a cold start as a function (x, y, batch) -> grad, or everything that it returns."""

    def program(x: Any, y: Any, batch: bx.Batch) -> Any:
        output = hypergrad.estimate(None, hypergrad.init(x, y), x, batch)
        return output if whole else output[0]

    return program


def along(hypergrad: bx.problem.Hypergradient) -> Callable:
    """The estimates along a trajectory, each warm from the last, as a function (points, y, batch) -> grads."""

    def program(points: Any, y: Any, batch: bx.Batch) -> Any:
        def step(state: Any, x: Any) -> tuple:
            grad, state, _ = hypergrad.estimate(None, state, x, batch)
            return state, grad

        return jax.lax.scan(step, hypergrad.init(points[0], y), points)[1]

    return program


@dataclasses.dataclass(frozen=True)
class Config:
    """Times the same hypergradients by bilevax, jaxopt, optimistix with lineax, and plain JAX."""

    problems: tuple[Literal["digits", "mnist"], ...] | None = None
    """digits: softmax regression, n = 1,000. mnist: a 784-256-10 network, n = 2,000. Default: both; digits if quick."""
    rounds: int = 5
    """Least number of rounds of each setting; in each, every library runs once."""
    budget: float = 20.0
    """Seconds for each setting: more rounds run while they last, at most 200."""
    seed: int = 0
    """Of the split, x, y and the order in the rounds."""
    quick: bool = False
    """Three rounds, 10 unrolled steps and 10 outer steps, to see that everything runs."""
    results: Path = Path("results")
    """Folder of the results; files go to its subfolder peers, or peers-quick."""
    checkpoint: Path | None = None
    """Folder in which the command keeps what is done, so that the same command goes on where it was killed."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if self.problems == ():
            raise ValueError("problems must be some of digits, mnist; got none. Pass, say, --problems digits.")
        if self.rounds < 1:
            raise ValueError(f"rounds must be an int >= 1; got {self.rounds}. Pass --rounds 5.")
        if not self.budget > 0:
            raise ValueError(f"budget must be a number of seconds > 0; got {self.budget:g}. Pass, say, --budget 20.")

    def run(self) -> int:
        """Times everything, prints the table and writes the files; returns the exit code."""
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        rows: list[Row] = []
        folder = prepared(self, TASK, console, unrolled=self.unrolled, outer_steps=self.outer_steps)
        try:
            for row in self._rows(lambda text: console.print(f"[dim]{text} …", soft_wrap=True)):
                rows.append(row)
                self._write(row, folder)
        except KeyboardInterrupt:
            console.print("[yellow]Interrupted; the finished settings are kept.")
            return 130
        finally:
            if rows:
                show(rows, console)
                console.print(f"One JSON file for each row: {folder.words}", markup=False, soft_wrap=True)
                path = folder.path / f"{TASK}.png"
                files.save(draw(rows), path)
                console.print(f"Plot: {path}", markup=False, soft_wrap=True)
        return 0

    @property
    def unrolled(self) -> int:
        """Unrolled steps of `reverse`."""
        return 10 if self.quick else 100

    @property
    def outer_steps(self) -> int:
        """Length of the trajectory."""
        return 10 if self.quick else 50

    def _rows(self, say: Callable[[str], None]) -> Iterator[Row]:
        work = kept(self)

        def rows(setting: str, make: Callable[[], Iterator[Row]]) -> list[Row]:
            say(setting)
            return work.once(setting, lambda: list(make()), Row, Spent)

        for name in self.problems or (("digits",) if self.quick else ("digits", "mnist")):
            case = PROBLEMS[name](self.seed)
            for iterations in (10,) if self.quick else (10, 20):
                solve = functools.partial(self._conjugate_gradients, case, iterations)
                yield from rows(f"{case.name}, CG-{iterations}", solve)
            yield from rows(f"{case.name}, reverse T = {self.unrolled}", functools.partial(self._reverse, case))
            if name == "digits":
                path = functools.partial(self._trajectory, case)
                yield from rows(f"{case.name}, {self.outer_steps} outer steps to error {TOLERANCE:g}", path)

    def _conjugate_gradients(self, case: Problem, iterations: int) -> Iterator[Row]:
        args = (case.x, case.trained, case.batch)
        build = functools.partial(_implicit, case, steps=0, iterations=iterations, warm=False)
        programs = {name: gradient(build(name)) for name in libraries.IMPLICIT}
        programs[REPORTED] = gradient(build("bilevax"), whole=True)
        with jax.enable_x64(True):
            exact = np.asarray(jax.jit(functools.partial(libraries.exact_implicit, case.losses))(*double(args)))
        yield from self._timed(case.name, f"CG-{iterations}", _all_compiled(programs, args), args, exact)

    def _reverse(self, case: Problem) -> Iterator[Row]:
        args, optimizer = (case.x, case.y, case.batch), optax.sgd(case.step_size)
        made = {name: make(case.losses, optimizer, self.unrolled) for name, make in libraries.REVERSE.items()}
        with jax.enable_x64(True):
            reference = libraries.plain_reverse(case.losses, optimizer, self.unrolled, remat=True)
            exact = np.asarray(jax.jit(gradient(reference))(*double(args)))
        programs = {name: gradient(hypergrad) for name, hypergrad in made.items()}
        yield from self._timed(case.name, f"reverse T = {self.unrolled}", _all_compiled(programs, args), args, exact)

    def _trajectory(self, case: Problem) -> Iterator[Row]:
        steps, half, y = self.outer_steps, self.outer_steps // 2, optax.tree.zeros_like(case.y)
        with jax.enable_x64(True):
            trace = functools.partial(libraries.trajectory, case.losses, steps=steps, optimizer=optax.adam(0.1))
            points, exact, size = jax.tree.map(np.asarray, jax.jit(trace)(*double((case.x, y, case.batch))))
        if not size < 1e-8:
            raise RuntimeError(f"the exact trajectory must have ∇_y g = 0; got a norm of {size:.1e}")
        args = (jnp.asarray(points, jnp.float32), y, case.batch)
        made, notes = {}, {}
        for name in libraries.IMPLICIT:
            for budget in QUICK_BUDGETS if self.quick else BUDGETS:
                program = along(_implicit(case, name, *budget, warm=True, step_size=2.0, momentum=0.9))
                made[name] = compiled(program, args)
                error = np.median(relative_error(made[name][0](*args), exact)[half:])
                if error <= TOLERANCE or np.isnan(error):
                    break
            notes[name] = "{} inner steps, CG-{}".format(*budget) if error <= TOLERANCE else "not reached"
        setting = f"{steps} outer steps, error {TOLERANCE:g}"
        for row in self._timed(case.name, setting, made, args, exact, half):
            yield row._replace(note=notes[row.library])

    def _timed(
        self, name: str, setting: str, made: Mapping[str, tuple], args: tuple, exact: np.ndarray, first: int = 0
    ) -> Iterator[Row]:
        outputs = {library: jax.block_until_ready(parts[0](*args)) for library, parts in made.items()}
        calls = {library: functools.partial(parts[0], *args) for library, parts in made.items()}
        rounds, budget = (3, 1e-9) if self.quick else (self.rounds, self.budget)
        spent = interleaved(calls, rounds, budget, self.seed)
        seconds = {library: [one.seconds for one in each] for library, each in spent.items()}
        for library, output in outputs.items():
            grad = output[0] if library == REPORTED else output
            error = relative_error(grad, exact) if exact.ndim == 1 else np.median(relative_error(grad, exact)[first:])
            relative = ratios(seconds[library], seconds[BASELINE])
            cpu_seconds = [one.cpu_seconds for one in spent[library]]
            _, compiling, temp_bytes = made[library]
            walls = seconds[library]
            yield Row(name, setting, library, walls, cpu_seconds, relative, compiling, temp_bytes, float(error))

    def _write(self, row: Row, folder: Folder) -> None:
        low, median, high = quartiles(row.ratios)
        metrics = {
            "seconds": float(np.median(row.seconds)),
            "cpu_seconds": float(np.median(row.cpu_seconds)),
            "ratio": median,
            "ratio_lower_quartile": low,
            "ratio_upper_quartile": high,
            **row.compiling.named("compile_"),
            "temp_bytes": row.temp_bytes,
            "error": row.error,
            "rounds": len(row.seconds),
        }
        method = f"{row.problem} {row.setting} {row.library}"
        for old, new in ((" = ", ""), (", ", "-"), (" ", "-"), ("(", ""), (")", "")):
            method = method.replace(old, new)
        chosen = {name: getattr(row, name) for name in ("problem", "setting", "library", "note")}
        curve = {"seconds": row.seconds, "cpu_seconds": row.cpu_seconds, "ratio": row.ratios}
        Run(TASK, method.lower(), self.seed, chosen, Outcome((), metrics, curve)).write(folder)


def _all_compiled(programs: Mapping[str, Callable], args: tuple) -> dict[str, tuple]:
    return {library: compiled(program, args) for library, program in programs.items()}


def _implicit(
    case: Problem,
    library: str,
    steps: int,
    iterations: int,
    warm: bool,
    step_size: float = 1.0,
    momentum: float | None = None,
) -> bx.problem.Hypergradient:
    make = libraries.IMPLICIT[library]
    return make(case.losses, optax.sgd(step_size, momentum), steps, iterations, warm)
