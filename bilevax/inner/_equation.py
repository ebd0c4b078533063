"""What `fixed_point` and `root` share: a y that solves r(x, y) = 0, and the adjoint equation of its derivative."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import CarryingLoss, carrying, parameters, with_parameters
from bilevax.curvature.products import Product
from bilevax.inner._gmres import gmres
from bilevax.inner._once import once
from bilevax.inner._optimizer_steps import Initial, Solve, check_point, optimizer_steps, solution
from bilevax.inner._transposed import moved_along, transposed
from bilevax.meshes import zeros_like
from bilevax.printing import brief, by_shape
from bilevax.problem import Calls, InnerSolver, Iterate, Loss, SolverInfo, arrays, norm
from bilevax.sampling import full
from bilevax.typing import Array, Key, PyTree, Scalar


class Equation(Protocol):
    """`step(x, y, batch)` or `residual(x, y, batch)`, a function of yours that returns a pytree like y."""

    def __call__(self, x: PyTree, y: PyTree, batch: PyTree, /) -> PyTree: ...


class LinearSolve(Protocol):
    """`linear_solve(product, b, u0) -> u`, a solver of yours of product(u) = b, where `product` is not symmetric."""

    def __call__(self, product: Product, b: PyTree, u0: PyTree | None, /) -> PyTree: ...


class EquationState(NamedTuple):
    """What `fixed_point` and `root` keep: the last u, the solution of the adjoint equation (None without warm start).

    Example:
        >>> import bilevax as bx
        >>> bx.inner.fixed_point(lambda x, y, batch: y / 2 + x).init(1.0, 2.0).u.item()
        0.0
    """

    u: PyTree | None

    def __repr__(self) -> str:
        return by_shape(self)


class EquationInfo(NamedTuple):
    """How well the equation and its adjoint are solved; scalars.

    Attributes:
      residual: of `fixed_point` ‖y − T(x, y)‖ relative to the larger of ‖y_0‖ and ‖y_T‖; of `root` ‖r(x, y)‖.
      iterations: of the built-in iteration, one T each; 0 with a `solve` of your own, which is not counted.
      adjoint_residual: that of the adjoint equation, relative to ‖y_bar‖.
      products: pull-backs of T or r that the adjoint took; 0 where a `linear_solve` of your own is not counted.

    Example:
        >>> import bilevax as bx
        >>> info = bx.inner.EquationInfo(residual=1e-9, iterations=30, adjoint_residual=1e-8, products=12)
        >>> info.products
        12
    """

    residual: Scalar
    iterations: Scalar
    adjoint_residual: Scalar
    products: Scalar

    def __repr__(self) -> str:
        return brief(self)


class EquationResidual(NamedTuple):
    """Where the equation was solved, in how many iterations, and the size of y_0."""

    x: PyTree
    z: Iterate
    batch: PyTree
    iterations: Array
    size: Array


class Run(Protocol):
    """Solves the equation from y0, and counts."""

    def __call__(self, x: PyTree, y0: PyTree, batch: PyTree) -> tuple[PyTree, Array | int]: ...


def equation(
    function: Equation,
    run: Run,
    *,
    relative: bool,
    inner_loss: Loss | None,
    initial: Initial | None,
    linear_solve: LinearSolve | None,
    maxiter: int,
    tol: Scalar,
    warm_start: bool,
) -> InnerSolver:
    """The solver of function(x, y, batch) = 0; its residual may be relative to y, or have a unit of its own."""
    checks.nonnegative("tol", tol)
    if linear_solve is not None:
        checks.function("linear_solve", linear_solve, "product", "b", "u0")
    loss = None if inner_loss is None else carrying("inner_loss", inner_loss)
    start = optimizer_steps(_no_loss, optax.identity(), initial, full).start

    def init(x: PyTree, y: PyTree, batch: PyTree = None) -> EquationState:
        """The first u, 0 like y (None without warm start)."""
        check_point(x, y)
        return EquationState(zeros_like(arrays(parameters(y))) if warm_start else None)

    def forward(
        key: Key | None, state: EquationState, x: PyTree, z: Iterate, batch: PyTree
    ) -> tuple[Iterate, EquationResidual, EquationState]:
        """The z with the y that solves the equation; the state waits for `backward`."""
        y, iterations = run(x, z.y, batch)
        size = norm(parameters(z.y))
        z = z._replace(y=y)
        return z, EquationResidual(x, z, batch, jnp.asarray(iterations), size), state

    def backward(
        residual: EquationResidual, state: EquationState, z_bar: Iterate
    ) -> tuple[tuple[PyTree, Iterate], EquationState, SolverInfo]:
        """x_bar = −(∂r/∂x)ᵀ u like x, and zeros like y; the state keeps u like y for the next outer step."""
        x, z, batch, iterations, size = residual
        x, y, y_bar = once("an implicit solution", (x, parameters(z.y), z_bar.y))
        r, pull_back = jax.vjp(lambda x, y: function(x, with_parameters(z.y, y), batch), x, y)
        u, adjoint_residual, products = _solve(lambda u: pull_back(u)[1], y_bar, state.u, linear_solve, maxiter, tol)
        x_bar = optax.tree.scale(-1, pull_back(u)[0])
        left, largest = norm(r), jnp.maximum(size, norm(y))
        share = left / jnp.where(largest > 0, largest, 1) if relative else left
        enough = jnp.sqrt(jnp.asarray(tol, left.dtype))
        solved = (adjoint_residual <= enough) & (share <= enough if relative else jnp.isfinite(share))
        value, slope = (left**2 / 2, left) if loss is None else _report(loss, x, z.y, batch)
        breakdown = ~(solved & jnp.isfinite(value + slope))
        calls = Calls(inner_gradients=0 if loss is None else 1)
        info = SolverInfo(value, slope, breakdown, calls, EquationInfo(share, iterations, adjoint_residual, products))
        kept = optax.tree.where(adjoint_residual <= 1, u, zeros_like(u)) if warm_start else None
        return (x_bar, Iterate(zeros_like(y))), EquationState(kept), info

    def tangent(key: Key | None, x: PyTree, y: PyTree, batch: PyTree, x_dot: PyTree) -> PyTree:
        """y_dot = −[∂r/∂y]⁻¹ [∂r/∂x] x_dot."""
        params = parameters(y)

        def pull_back(x: PyTree, params: PyTree, batch: PyTree) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
            return jax.vjp(lambda x, params: function(x, with_parameters(y, params), batch), x, params)[1]

        def along_x(x: PyTree, params: PyTree, batch: PyTree, x_dot: PyTree) -> PyTree:
            pull = pull_back(x, params, batch)
            return transposed(lambda u: pull(u)[0], params, x_dot)

        def along_y(y_dot: PyTree) -> PyTree:
            pull = pull_back(x, params, batch)
            return transposed(lambda u: pull(u)[1], params, y_dot)

        def invert(product: Product, b: PyTree) -> PyTree:
            pull = pull_back(*jax.lax.stop_gradient((x, params, batch)))
            push = lambda y_dot: transposed(lambda u: pull(u)[1], params, y_dot)  # noqa: E731
            return _solve(push, b, None, linear_solve, maxiter, tol)[0]

        def invert_transpose(product: Product, b: PyTree) -> PyTree:
            pull = pull_back(*jax.lax.stop_gradient((x, params, batch)))
            return _solve(lambda u: pull(u)[1], b, None, linear_solve, maxiter, tol)[0]

        b = jax.checkpoint(along_x, prevent_cse=False)(x, params, batch, x_dot)  # nothing is kept for the way back
        b = moved_along(b, x_dot)
        return optax.tree.scale(-1, jax.lax.custom_linear_solve(along_y, b, invert, invert_transpose))

    return InnerSolver(init, start, forward, backward, fresh=initial is not None, tangent=tangent)


def _solve(
    product: Product, b: PyTree, u0: PyTree | None, linear_solve: LinearSolve | None, maxiter: int, tol: Scalar
) -> tuple[PyTree, Array, Array]:
    """(u, ‖b − A u‖ / ‖b‖, products) by GMRES, or by a solver of somebody else."""
    if linear_solve is None:
        return gmres(product, b, u0, maxiter, tol)
    u = linear_solve(product, b, u0)
    checks.same_shapes("u of linear_solve", u, b, "Return from linear_solve(product, b, u0) a pytree like b.")
    u = optax.tree.cast_like(u, b)
    size = norm(b)
    left = norm(optax.tree.sub(b, product(u))) / jnp.where(size > 0, size, 1)
    return u, left, jnp.zeros((), jnp.int32)


def _no_loss(x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """Stands where no loss is read."""
    return jnp.zeros(())


def _report(loss: CarryingLoss, x: PyTree, y: PyTree, batch: PyTree) -> tuple[Array, Array]:
    (value, _), gradient = jax.value_and_grad(loss, argnums=1, has_aux=True)(x, parameters(y), y, batch)
    return value, norm(gradient)


def own_solve(solve: Solve) -> Run:
    """A solver of somebody else, whose iterations are not counted."""
    checks.function("solve", solve, "x", "y0", "batch")

    def run(x: PyTree, y0: PyTree, batch: PyTree) -> tuple[PyTree, int]:
        return solution(solve(x, y0, batch), y0), 0

    return run
