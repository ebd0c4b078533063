"""Rows of a user's own: a Python file with functions that make hypergradients and algorithms, by their names."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import optax

import bilevax as bx
from benchmarks.harness.errors import DataError

# What a file may define: dicts of names and functions, for the tables of as many kinds of jobs.
HYPERGRADIENTS, ALGORITHMS, DECENTRALIZED = KINDS = ("HYPERGRADIENTS", "ALGORITHMS", "DECENTRALIZED")
NAME = re.compile(r"[a-z0-9][a-z0-9.+_-]*")
TAKEN = {  # what the functions of each kind are called with, and a sampler by its name
    HYPERGRADIENTS: ("inner",),
    ALGORITHMS: ("problem", "step_sizes"),
    DECENTRALIZED: ("problem", "gossip", "step_sizes"),
}
CHECKS = {
    HYPERGRADIENTS: "check_ihvp, check_solver or check_hypergradient",
    ALGORITHMS: "check_algorithm",
    DECENTRALIZED: "check_algorithm",
}


class InnerProblem(NamedTuple):
    """What a hypergradient of a plugin is given: the inner problem of a job, and how its other rows solve it.

    Attributes:
      loss: g; a `bx.curvature.ModelLoss` where a model is trained.
      optimizer: makes the inner steps; in learning-rates it is a function of x.
      steps: their number in an outer step.
      step_size: that of the optimizer, the first one of a schedule.
      curvature: of the products: `bx.curvature.hessian`, or `gauss_newton` where the Hessian is not positive definite.
      sample: draws the batch of an inner step.
      ihvp_sample: of an inverse-Hessian-vector product.
      cross_sample: of the cross term.
      initial: `initial(x)`, where the inner steps start; None for the last y.
      warm_start: whether v starts from the last one.
      outer_loss: f.
    """

    loss: Any
    optimizer: Any
    steps: int
    step_size: float
    curvature: Callable[..., Any]
    sample: Callable = bx.sampling.full
    ihvp_sample: Callable = bx.sampling.full
    cross_sample: Callable = bx.sampling.full
    initial: Callable | None = None
    warm_start: bool = True
    outer_loss: Any = None

    @property
    def problem(self) -> bx.BilevelProblem:
        """Both losses."""
        return bx.BilevelProblem(self.outer_loss, self.loss)

    def implicit(self, ihvp: bx.problem.IHVP) -> bx.problem.InnerSolver:
        """Implicit differentiation with this inverse-Hessian-vector product, as the rows of the job do it."""
        return bx.inner.implicit(
            self.loss,
            self.optimizer,
            self.steps,
            ihvp=ihvp,
            initial=self.initial,
            sample=self.sample,
            cross_sample=self.cross_sample,
            warm_start=self.warm_start,
        )


class Function(NamedTuple):
    """A function of a plugin.

    Attributes:
      file: it comes from.
      kind: the dict that names it there.
      name: in that dict, of the row.
      make: itself.
    """

    file: str
    kind: str
    name: str
    make: Callable[..., Any]

    def made(self, *arguments: Any, of: tuple[type, ...], expected: str, **keywords: Any) -> Any:
        """What it returns, of one of these types."""
        with self.blamed("Mend it."):
            value = self.make(*arguments, **keywords)
        if not isinstance(value, of):
            raise DataError(
                f"{self.kind}['{self.name}'] in {self.file} must return {expected}; got {type(value).__name__}. "
                f"Return the value itself, as in the example of docs/testing.md."
            )
        return value

    @contextlib.contextmanager
    def blamed(self, fix: str) -> Iterator[None]:
        """Says of what is raised inside that it is the function's, with the line of its file."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            what = f"{self.kind}['{self.name}'] in {self.file}{_line(error, _place(self.file))}"
            raise DataError(f"{what} raised {_said(error)}. {fix}") from error

    def traced(self, program: Callable[..., Any], *arguments: Any) -> Any:
        """The shapes of what a program makes with it, which is not run; what cannot be traced is refused."""
        fix = f"It was being traced; bilevax.testing has {CHECKS[self.kind]}, which says what is wrong."
        with self.blamed(fix):
            return jax.eval_shape(program, *arguments)

    @property
    def samples(self) -> bool:
        """Whether it asks for a sampler, by a parameter of that name."""
        return "sample" in inspect.signature(self.make).parameters

    def algorithm(self, *arguments: Any, sample: Callable) -> bx.problem.Algorithm:
        """The algorithm that it makes; the sampler is for those that ask for one."""
        keywords = {"sample": sample} if self.samples else {}
        return self.made(*arguments, of=(bx.problem.Algorithm,), expected="a bx.problem.Algorithm", **keywords)

    def method(self, inner: InnerProblem) -> bx.problem.IHVP | bx.problem.InnerSolver | bx.problem.Hypergradient:
        """What it makes of an inner problem with an outer loss."""
        kinds = (bx.problem.IHVP, bx.problem.InnerSolver, bx.problem.Hypergradient)
        return self.made(
            inner, of=kinds, expected="a bx.problem.IHVP, a bx.problem.InnerSolver or a bx.problem.Hypergradient"
        )

    def hypergradient(self, inner: InnerProblem) -> Any:
        """The hypergradient that it makes, once `finished` has told it the outer loss."""
        return functools.partial(self._finished, inner)

    def _finished(self, inner: InnerProblem, outer_loss: Callable[..., Any]) -> bx.problem.Hypergradient:
        inner = inner._replace(outer_loss=outer_loss)
        value = self.method(inner)
        if isinstance(value, bx.problem.Hypergradient):
            return value
        return bx.hypergradient(outer_loss, inner.implicit(value) if isinstance(value, bx.problem.IHVP) else value)


def finished(outer_loss: Callable[..., Any], solver: Any) -> bx.problem.Hypergradient:
    """The hypergradient of a row: by its inner solver, or as a function of a plugin makes it."""
    return solver(outer_loss) if callable(solver) else bx.hypergradient(outer_loss, solver)


def restarted(state: Any, y: Any) -> Any:
    """The state of a hypergradient with another y, and the optimizer of y as it begins: that of SGD holds zeros."""
    kept = {"opt_state": optax.tree.zeros_like(state.opt_state)} if hasattr(state, "opt_state") else {}
    return state._replace(y=y, **kept)


Plugin = Mapping[str, Mapping[str, Function]]  # kind -> name -> function


def load(name: str) -> Plugin:
    """The functions of a Python file, which is executed, or of an importable module.

    Raises:
      ValueError: if there is no such file, it raises, or it does not name functions.
    """
    return _loaded(_place(name), name)


def _place(name: str) -> str:
    """Of a file, its whole path; of a module, its name."""
    path = Path(name)
    return str(path.resolve()) if path.suffix == ".py" else name


@functools.cache
def _loaded(place: str, name: str) -> Plugin:
    try:
        module = _executed(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ValueError(f"plugin must be {_fault(error, place, name)}") from error
    found = {kind: _functions(module, kind, name) for kind in KINDS if hasattr(module, kind)}
    if not any(found.values()):
        public = ", ".join(name for name in vars(module) if not name.startswith("_")) or "nothing"
        raise ValueError(
            f"plugin must define {' or '.join(KINDS)}, dicts of names and functions; {name} defines {public}. Add, "
            f"say, {HYPERGRADIENTS} = {{'my-cg': my_cg}}."
        )
    return found


def _executed(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for modules beside it; at the end, so that they hide no others
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _fault(error: Exception, place: str, name: str) -> str:
    """What is wrong with a file that was not executed to its end, and what to do."""
    if isinstance(error, FileNotFoundError) and error.args == (Path(place),):
        return f"a Python file; got {name}, and there is no file {place}. Pass its path, say --plugin my_methods.py."
    if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
        return (
            f"a Python file or a module that can be imported; got {name}. Pass the path of a file, say --plugin "
            f"my_methods.py."
        )
    what = f"{name}{_line(error, place)} raised {_said(error)}"
    return f"a Python file that can be executed; {what}. Mend it: python {name} says more."


def _said(error: Exception) -> str:
    """The type of an error and its first line, with the next one where it ends in a colon: JAX goes on for more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    kept = lines[: 2 if lines[0].endswith(":") else 1]
    return f"{type(error).__name__}: {' '.join(kept)}".rstrip(".: ")


def _line(error: Exception, place: str) -> str:
    """The last line of a file or module that an error went through, if any."""
    file = getattr(sys.modules.get(place), "__file__", place)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def _functions(module: ModuleType, kind: str, name: str) -> dict[str, Function]:
    value = getattr(module, kind)
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{kind} in {name} must be a dict of names and functions; got {type(value).__name__}. Write, say, {kind} = "
            f"{{'my-method': my_method}}."
        )
    for row, make in value.items():
        if not (isinstance(row, str) and NAME.fullmatch(row)):
            raise ValueError(
                f"names in {kind} of {name} must be lower-case letters, digits and - . + _, since files are named "
                f"after them; got {row!r}. Write, say, 'my-method'."
            )
        if not callable(make):
            raise ValueError(
                f"{kind}['{row}'] in {name} must be a function; got {type(make).__name__}. Name the function itself, "
                f"not what it returns."
            )
        _check_signature(make, kind, row, name)
    return {row: Function(name, kind, row, make) for row, make in value.items()}


def _check_signature(make: Callable[..., Any], kind: str, row: str, name: str) -> None:
    """Refuses a function that cannot be called as those of its kind are."""
    try:
        signature = inspect.signature(make)
        signature.bind(*TAKEN[kind], **{"sample": None} if "sample" in signature.parameters else {})
    except (TypeError, ValueError) as error:
        taken = ", ".join(TAKEN[kind])
        or_sample = "" if kind == HYPERGRADIENTS else f", or ({taken}, sample)"
        raise ValueError(
            f"{kind}['{row}'] in {name} must be a function of ({taken}){or_sample}; got one that cannot be called so: "
            f"{error}. Write, say, def {re.sub('[^a-z0-9]', '_', row)}({taken})."
        ) from error


def functions(plugin: str | None, kind: str) -> Mapping[str, Function]:
    """Those of one kind, by their names; none without a plugin."""
    return load(plugin).get(kind, {}) if plugin else {}


def checked(plugin: str | None, kind: str, names: Sequence[str]) -> Sequence[str]:
    """The names of a plugin's rows for a job.

    Args:
      plugin: what `load` takes; None where there is none.
      kind: of the rows of the job.
      names: of its own rows.

    Raises:
      ValueError: if the plugin has no rows for the job, or one whose name is taken.
    """
    if plugin is None:
        return ()
    found = load(plugin)
    if not found.get(kind):
        raise ValueError(
            f"plugin must define {kind} for this job; got {plugin} with {' and '.join(found)} only. Add {kind} = "
            f"{{'my-method': my_method}}, or name another job."
        )
    if taken := [name for name in found[kind] if name in names]:
        raise ValueError(
            f"plugin must give its rows new names; got {kind}['{taken[0]}'] in {plugin}, and this job has a row "
            f"{taken[0]}. Rename yours, say my-{taken[0]}."
        )
    return [*found[kind]]
