"""The exact implicit hypergradient of a small problem, in float64 and with y as a flat vector."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax.curvature.products import cross, hessian
from bilevax.ihvp._cg import cg
from bilevax.problem import Batch, Loss
from bilevax.typing import Array, PyTree

DENSE = 1000  # up to so many inner unknowns the Hessian is formed

Vector: TypeAlias = Array | np.ndarray
T = TypeVar("T")


class Product(Protocol):
    """A derivative of g at (x, y), times or solved for one vector."""

    def __call__(self, x: PyTree, y: Vector, v: Vector, /) -> Array: ...


class DampedInverse(Protocol):
    """(H + damping I)⁻¹ b."""

    def __call__(self, b: np.ndarray, damping: float = 0.0) -> np.ndarray: ...


class FlatProblem(NamedTuple):
    """The problem in float64 numbers, with y a flat vector; jitted functions of (x, y)."""

    inner: Callable[[PyTree, Vector], tuple[Array, Array]]  # g and ∇_y g
    product: Product  # (x, y, v) -> H v
    hessian: Callable[[PyTree, Vector], Array]  # the dense H
    outer: Callable[[PyTree, Vector], tuple[Array, tuple[PyTree, Array]]]  # f, (∇_x f, ∇_y f)
    cross: Product  # (x, y, v) -> ∇²_xy g v, flat
    solve: Product  # (x, y, b) -> H⁻¹ b by conjugate gradients


def flat_problem(outer_loss: Loss, inner_loss: Loss, unravel: Callable[[Array], PyTree], batch: Batch) -> FlatProblem:
    """Jits the functions of a problem whose y is `unravel` of a vector; the batch stays an argument of the programs."""

    def inner(x: PyTree, y: Array, data: PyTree) -> Array:
        return inner_loss(x, unravel(y), data)

    def outer(x: PyTree, y: Array, data: PyTree) -> Array:
        return outer_loss(x, unravel(y), data)

    def solve(x: PyTree, y: Array, b: Array, data: PyTree) -> Array:
        apply, _ = cg(maxiter=20 * y.size, tol=1e-12).prepare(None, (), inner, (x, y, data))
        return apply(b)[0]

    def product(x: PyTree, y: Array, v: Array, data: PyTree) -> Array:
        return hessian(inner, x, y, data)(v)

    def crossed(x: PyTree, y: Array, v: Array, data: PyTree) -> Array:
        return ravel_pytree(cross(inner, x, y, data)(v))[0]

    def bind(function: Callable[..., T], data: PyTree) -> Callable[..., T]:
        compiled = jax.jit(function)
        return lambda *arguments: compiled(*arguments, data)

    return FlatProblem(
        inner=bind(jax.value_and_grad(inner, argnums=1), batch.inner),
        product=bind(product, batch.inner),
        hessian=bind(jax.hessian(inner, argnums=1), batch.inner),
        outer=bind(jax.value_and_grad(outer, argnums=(0, 1)), batch.outer),
        cross=bind(crossed, batch.inner),
        solve=bind(solve, batch.inner),
    )


class LocalModel(NamedTuple):
    """What is known at one (x, y): gradients, the ends of the spectrum of H, and its inverse."""

    gradient: np.ndarray  # ∇_y g
    direct: np.ndarray  # ∇_x f
    b: np.ndarray  # ∇_y f
    smallest: float
    largest: float
    inverse: DampedInverse  # (b, damping=0) -> (H + damping I)⁻¹ b; damped only where H is dense
    cross: Callable[[np.ndarray], np.ndarray]  # v -> ∇²_xy g v

    def hypergradient(self, damping: float = 0.0) -> np.ndarray:
        """The implicit hypergradient at this y, solved or not."""
        return self.direct - self.cross(self.inverse(self.b, damping))


def _eigen_inverse(hessian: np.ndarray) -> tuple[np.ndarray, DampedInverse]:
    """The eigenvalues of a symmetric matrix, and b, damping -> (H + damping I)⁻¹ b, a pseudo-inverse."""
    eigenvalues, vectors = np.linalg.eigh(hessian)

    def inverse(b: np.ndarray, damping: float = 0.0) -> np.ndarray:
        damped = eigenvalues + damping
        regular = np.abs(damped) > len(b) * np.finfo(float).eps * np.abs(damped).max(initial=0)
        return vectors @ np.where(regular, vectors.T @ b / np.where(regular, damped, 1), 0)

    return eigenvalues, inverse


def local_model(problem: FlatProblem, x: PyTree, y: np.ndarray) -> LocalModel:
    """Evaluates everything at one (x, y)."""
    _, (direct, b) = problem.outer(x, y)
    if y.size <= DENSE and np.isfinite(y).all():
        eigenvalues, inverse = _eigen_inverse(np.asarray(problem.hessian(x, y)))
        smallest, largest = eigenvalues[0], eigenvalues[-1]
    else:
        smallest, largest = _extreme_curvatures(problem, x, y)

        def inverse(b: np.ndarray, damping: float = 0.0) -> np.ndarray:
            return np.asarray(problem.solve(x, y, b))

    return LocalModel(
        np.asarray(problem.inner(x, y)[1]),
        np.asarray(ravel_pytree(direct)[0]),
        np.asarray(b),
        float(smallest),
        float(largest),
        inverse,
        lambda v: np.asarray(problem.cross(x, y, v)),
    )


def _extreme_curvatures(problem: FlatProblem, x: PyTree, y: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of the Hessian by Lanczos; NaN where that does not converge."""
    if not np.isfinite(y).all():
        return math.nan, math.nan
    from scipy.sparse import linalg

    operator = linalg.LinearOperator(
        (y.size, y.size), matvec=lambda v: np.asarray(problem.product(x, y, v.reshape(-1))), dtype=y.dtype
    )

    def extreme(which: str) -> float:
        try:
            return float(linalg.eigsh(operator, 1, which=which, tol=1e-4, return_eigenvectors=False)[0])
        except linalg.ArpackNoConvergence:
            return math.nan

    return extreme("SA"), extreme("LA")


def newton(problem: FlatProblem, x: PyTree, y: np.ndarray) -> np.ndarray:
    """Newton steps as long as they shrink ‖∇_y g‖."""
    gradient = np.asarray(problem.inner(x, y)[1])
    for _ in range(20):
        if y.size <= DENSE:
            hessian = np.asarray(problem.hessian(x, y))
            if not (np.isfinite(hessian).all() and np.isfinite(gradient).all()):
                break
            step = _eigen_inverse(hessian)[1](gradient)
        else:
            step = np.asarray(problem.solve(x, y, gradient))
        new = np.asarray(problem.inner(x, y - step)[1])
        if not np.linalg.norm(new) < np.linalg.norm(gradient):
            break
        y, gradient = y - step, new
    return y


def inner_solution(problem: FlatProblem, x: PyTree, y: np.ndarray) -> np.ndarray:
    """A minimum of g by a trust-region method, polished by Newton steps."""
    from scipy import optimize  # as long to import as all else of bilevax, and only the doctor needs it

    curvature: dict[str, Any] = (
        {"method": "trust-exact", "hess": lambda y: np.asarray(problem.hessian(x, y))}
        if y.size <= DENSE
        else {"method": "trust-krylov", "hessp": lambda y, v: np.asarray(problem.product(x, y, v))}
    )
    found = optimize.minimize(
        lambda y: float(problem.inner(x, y)[0]),
        y,
        jac=lambda y: np.asarray(problem.inner(x, y)[1]),
        tol=1e-6,
        **curvature,
    )
    return newton(problem, x, found.x)


def finite_difference_error(problem: FlatProblem, x: PyTree, y: np.ndarray, reference: np.ndarray, tol: float) -> float:
    """How far the slope of F along a direction is from that of the reference, relative to ‖reference‖.

    Each coordinate moves in proportion to itself, and the inner problem is solved anew on both sides. The best of four
    step sizes counts; NaN where F is not finite.
    """
    start, unravel = ravel_pytree(x)
    flat = np.asarray(start)
    moves = np.where(flat == 0, 1.0, np.abs(flat))
    size = float(np.linalg.norm(moves * reference)) or 1.0
    random = np.random.default_rng(0).normal(size=flat.shape) / math.sqrt(flat.size)
    direction = moves * reference / size + random
    direction /= np.linalg.norm(direction)

    def value(step: float) -> float:
        near = unravel(jnp.asarray(flat + step * moves * direction))
        return float(problem.outer(near, newton(problem, near, y))[0])

    best = math.nan
    for step in (1e-4, 1e-5, 1e-3, 1e-6):
        slope = (value(step) - value(-step)) / (2 * step)
        best = float(np.fmin(best, abs(slope - reference @ (moves * direction)) / size))
        if best <= 0.1 * tol:
            break
    return best


def fitted_damping(point: LocalModel, grad: np.ndarray) -> tuple[float, float]:
    """The damping whose implicit hypergradient at this point is nearest to grad, and the distance that is left.

    NaN at an infinite distance where none can be told: some damping always matches one or two numbers, the inverse of a
    large Hessian cannot be damped, and one without positive curvature gives no scale.
    """
    if grad.size < 3 or point.b.size > DENSE or not point.largest > 0:
        return math.nan, math.inf

    from scipy import optimize

    def distance(log: float) -> float:
        return float(np.linalg.norm(grad - point.hypergradient(point.largest * math.exp(log))))

    found = optimize.minimize_scalar(distance, bounds=(math.log(1e-6), math.log(100)), method="bounded")
    return point.largest * math.exp(found.x), found.fun
