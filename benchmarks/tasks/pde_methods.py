"""The inverse problem of `benchmarks.tasks.pde`, and the hypergradients that are compared on it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx
from benchmarks.tasks.pde_solvers import Equation, advance, solve, solve_by_scipy
from bilevax.typing import Array, Key, PyTree, Scalar

FEW = 4  # directions, where not all N are taken
MU = {"jax": 1e-4, "scipy": 1e-3}  # of the differences
CG: Mapping[str, Any] = {"maxiter": 20, "tol": 1e-6}


class Problem(NamedTuple):
    """An inverse problem.

    Attributes:
      equation: with the known part of its first field.
      modes: number of those that are not known.
      observations: n.
    """

    equation: Equation
    modes: int
    observations: int

    @property
    def places(self) -> np.ndarray:
        """The n points of the grid that are observed."""
        return np.arange(1, self.observations + 1) * self.equation.points // (self.observations + 1)

    def field(self, x: Any) -> Any:
        """u(0, ·) on the grid; x [1 + modes]."""
        angles = np.arange(1, self.modes // 2 + 1)[:, None] * np.pi * self.equation.grid
        return self.equation.first(self.equation.grid) + x[1:] @ np.concatenate([np.sin(angles), np.cos(angles)])

    def solve(self, x: Array, y0: Array | None, batch: None, **options: Any) -> Array:
        """The solution, [n times, points]; y0 and the batch are not read."""
        return solve(self.equation, jnp.exp(x[0]), self.field(x), self.observations, **options)

    def solve_by_scipy(self, x: np.ndarray, y0: np.ndarray, batch: None) -> np.ndarray:
        """The same by SciPy."""
        return solve_by_scipy(self.equation, np.exp(x[0]), self.field(x), self.observations)

    def misfit(self, x: Array, y: Array, observed: Array) -> Array:
        """f, the mean square of what is missed."""
        return jnp.mean((y[:, self.places] - observed) ** 2)

    def whole(self, x: Array, y: Array, batch: None) -> Array:
        """The inner loss with one residual."""
        return jnp.sum((y - self.solve(x, y, batch)) ** 2) / 2

    def shooting(self, x: Array, y: Array, batch: None) -> Array:
        """The inner loss with a residual for each interval."""
        before = jnp.concatenate([self.field(x)[None], y[:-1]])
        after = jax.vmap(lambda field: advance(self.equation, jnp.exp(x[0]), field, self.observations))(before)
        return jnp.sum((y - after) ** 2) / 2


class Passes(NamedTuple):
    """Runs of the solver, and tangents or cotangents of it."""

    solves: int
    tangents: int


class Solved(NamedTuple):
    """The state of a hypergradient that keeps the solution alone."""

    y: PyTree


def reverse(outer_loss: Callable, solve: Callable) -> bx.problem.Hypergradient:
    """The derivative of x ↦ f(x, solve(x)) by reverse mode."""

    def init(x: PyTree, y: PyTree, batch: Any = None, *, opt_state: Any = None) -> Solved:
        return Solved(y)

    def estimate(key: Key | None, state: Solved, x: PyTree, batch: bx.Batch) -> tuple:
        def loss(x: PyTree) -> tuple[Array, PyTree]:
            y = solve(x, state.y, batch.inner)
            return outer_loss(x, y, batch.outer), y

        (value, y), grad = jax.value_and_grad(loss, has_aux=True)(x)
        inner = bx.problem.SolverInfo(jnp.nan, jnp.nan, ~jnp.isfinite(value), bx.problem.Calls(1), Passes(1, 1))
        return grad, Solved(y), bx.hypergradients.HypergradientInfo(value, inner)

    return bx.problem.Hypergradient(init, estimate)


class Counted(NamedTuple):
    """The state of a hypergradient, and how many passes it has made."""

    y: PyTree
    own: Any
    passes: Array


def by_directions(inner: bx.problem.SolverInfo) -> Scalar:
    """Passes of what counts its runs and tangents itself."""
    return inner.detail.solves + inner.detail.tangents


def by_differences(inner: bx.problem.SolverInfo) -> Scalar:
    """Passes of what only runs the solver."""
    return inner.detail.solves


def by_residual(inner: bx.problem.SolverInfo) -> Scalar:
    """Passes of the implicit rule for the whole residual: a run, the residual, and one pull-back."""
    return 3


def by_products(inner: bx.problem.SolverInfo) -> Scalar:
    """Passes of the implicit rule for shooting: a run, and there and back for the gradient and for each product."""
    return 1 + 2 * (1 + inner.calls.hessian_products + inner.calls.cross_products)


def counted(
    hypergrad: bx.problem.Hypergradient, passes: Callable[[bx.problem.SolverInfo], Scalar]
) -> bx.problem.Hypergradient:
    """The hypergradient, with its passes counted in the state."""

    def init(x: PyTree, y: PyTree, batch: Any = None, *, opt_state: Any = None) -> Counted:
        return Counted(y, hypergrad.init(x, y, batch, opt_state=opt_state), jnp.zeros((), int))

    def estimate(key: Key | None, state: Counted, x: PyTree, batch: bx.Batch) -> tuple:
        grad, own, info = hypergrad.estimate(key, state.own, x, batch)
        return grad, Counted(own.y, own, state.passes + passes(info.inner)), info

    return bx.problem.Hypergradient(init, estimate)


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: in lower case.
      hypergradient: `hypergradient(problem, b)` builds it; b directions, where it draws some.
      passes: counts them.
      directions: `directions(N)`, b.
      settings: what else it was built with, for the JSON files.
      least: the N from which on it differs from the rows above.
    """

    name: str
    hypergradient: Callable[[Problem, Any], bx.problem.Hypergradient]
    passes: Callable[[bx.problem.SolverInfo], Scalar]
    directions: Callable[[int], int | None] = lambda size: size
    settings: Mapping[str, Any] = {}
    least: int = 1


def forward(problem: Problem, directions: int) -> bx.problem.Hypergradient:
    """Pushes orthogonal directions through the solver; as many as x has entries give the exact gradient."""
    solver = bx.inner.forward_gradient(
        None, directions=directions, sampler=bx.inner.random_directions.orthogonal, solve=problem.solve
    )
    return bx.hypergradient(problem.misfit, solver)


def differences(difference: bx.inner.Difference, problem: Problem, directions: int) -> bx.problem.Hypergradient:
    """Differences of the JAX solver along orthogonal directions."""
    orthogonal = bx.inner.random_directions.orthogonal
    solver = bx.inner.zeroth_order(
        problem.solve, directions=directions, mu=MU["jax"], difference=difference, sampler=orthogonal
    )
    return bx.hypergradient(problem.misfit, solver)


def black_box(problem: Problem, directions: int) -> bx.problem.Hypergradient:
    """Differences of the SciPy solver, which runs once for each."""
    solver = bx.inner.zeroth_order(
        bx.inner.black_box(problem.solve_by_scipy),
        directions=directions,
        mu=MU["scipy"],
        sampler=bx.inner.random_directions.orthogonal,
        chunk=1,
    )
    return bx.hypergradient(problem.misfit, solver)


def full(problem: Problem, directions: int) -> bx.problem.Hypergradient:
    """Central differences of the outer loss itself."""
    orthogonal = bx.inner.random_directions.orthogonal
    return bx.hypergradients.full_zeroth_order(
        problem.misfit, problem.solve, directions=directions, mu=MU["jax"], sampler=orthogonal
    )


def through(checkpoint: bx.inner.Checkpoint, problem: Problem, directions: None) -> bx.problem.Hypergradient:
    """Reverse mode through all steps of the solver."""
    return reverse(problem.misfit, functools.partial(problem.solve, loop=checkpoint.loop))


def implicit(loss: Callable, ihvp: bx.problem.IHVP, problem: Problem, directions: None) -> bx.problem.Hypergradient:
    """The implicit function theorem at what the solver returns, for one of the two inner losses."""
    solver = bx.inner.implicit(functools.partial(loss, problem), ihvp=ihvp, solve=problem.solve)
    return bx.hypergradient(problem.misfit, solver)


def none(size: int) -> None:
    """For rows without directions."""


def few(size: int) -> int:
    """Fewer directions than x has entries, if it has more."""
    return min(size, FEW)


IDENTITY, SOLVED = bx.ihvp.identity(), bx.ihvp.cg(**CG)
ROWS = (
    Row("forward-gradient", forward, by_directions),
    Row(f"forward-gradient-{FEW}", forward, by_directions, few, least=FEW + 1),
    Row("zeroth-order", functools.partial(differences, bx.inner.one_sided), by_differences),
    Row("zeroth-order-central", functools.partial(differences, bx.inner.central), by_differences),
    Row("zeroth-order-scipy", black_box, by_differences, few),
    Row("full-zeroth-order", full, by_differences),
    Row("reverse", functools.partial(through, bx.inner.store_all), by_directions, none),
    Row("reverse-checkpointed", functools.partial(through, bx.inner.two_level), by_directions, none),
    Row("implicit-whole", functools.partial(implicit, Problem.whole, IDENTITY), by_residual, none),
    Row("implicit-shooting", functools.partial(implicit, Problem.shooting, SOLVED), by_products, none, CG),
    Row("hessian-free-shooting", functools.partial(implicit, Problem.shooting, IDENTITY), by_products, none),
)
