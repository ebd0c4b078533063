"""The exact implicit hypergradient of a small problem, in float64 and with y as a flat vector."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax.curvature.products import cross, hessian
from bilevax.hypergradients._trust_region import STEPS, Ground, descend
from bilevax.ihvp._cg import cg
from bilevax.problem import Batch, Loss
from bilevax.typing import Array, PyTree

DENSE = 1000  # up to so many inner unknowns the Hessian is formed
FLAT = 1e-10  # a curvature below so many times the largest is none
UNSEEN = 1e-6  # a share of b and of the cross term below this is rounding
LANCZOS = 64  # products for the ends of a spectrum, where the Hessian is not formed

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
    hessian: Callable[[PyTree, Vector], Array]  # the dense H
    outer: Callable[[PyTree, Vector], tuple[Array, tuple[PyTree, Array]]]  # f, (∇_x f, ∇_y f)
    cross: Product  # (x, y, v) -> ∇²_xy g v, flat
    solve: Product  # (x, y, b) -> H⁻¹ b by conjugate gradients
    descend: Callable[[PyTree, Ground], Ground]  # some trust-region steps on g
    ends: Callable[[PyTree, Vector], tuple[Array, Array]]  # the smallest and the largest eigenvalue of H, by Lanczos
    values: Callable[[PyTree, Vector, Vector], tuple[Array, Array]]  # stacked x, y*, H⁻¹ -> F and ‖∇_y g‖


def flat_problem(
    outer_loss: Loss,
    inner_loss: Loss,
    unravel: Callable[[Array], PyTree],
    batch: Batch,
    unravel_x: Callable[[Array], PyTree],
) -> FlatProblem:
    """Jits the functions of a problem whose y is `unravel` of a vector; the batch stays an argument of the programs."""

    def inner(x: PyTree, y: Array, data: PyTree) -> Array:
        return inner_loss(x, unravel(y), data)

    def outer(x: PyTree, y: Array, data: PyTree) -> Array:
        return outer_loss(x, unravel(y), data)

    def solve(x: PyTree, y: Array, b: Array, data: PyTree) -> Array:
        apply, _ = cg(maxiter=min(20 * y.size, 5000), tol=1e-12).prepare(None, (), inner, (x, y, data))
        return apply(b)[0]

    def crossed(x: PyTree, y: Array, v: Array, data: PyTree) -> Array:
        return ravel_pytree(cross(inner, x, y, data)(v))[0]

    def descent(x: PyTree, ground: Ground, data: PyTree) -> Ground:
        return descend(lambda y: inner(x, y, data), ground)

    def ends(x: PyTree, y: Array, data: PyTree) -> tuple[Array, Array]:
        return _lanczos(hessian(inner, x, y, data), y.size)

    def values(xs: Array, y: Array, inverse: Array, data: Batch) -> tuple[Array, Array]:
        """Chord steps from y*(x) to y* of each nearby x, a row of xs, and F there."""

        def value(row: Array) -> tuple[Array, Array]:
            x = unravel_x(row)
            slope = jax.grad(inner, argnums=1)

            def chord(_: Array, y: Array) -> Array:
                gradient = slope(x, y, data.inner)
                return y - (inverse @ gradient if inverse.ndim == 2 else solve(x, y, gradient, data.inner))

            near = jax.lax.fori_loop(0, 8 if inverse.ndim == 2 else 3, chord, y)
            return outer(x, near, data.outer), jnp.linalg.norm(slope(x, near, data.inner))

        return jax.lax.map(value, xs)

    def bind(function: Callable[..., T], data: PyTree) -> Callable[..., T]:
        compiled = jax.jit(function)
        return lambda *arguments: compiled(*arguments, data)

    return FlatProblem(
        inner=bind(jax.value_and_grad(inner, argnums=1), batch.inner),
        hessian=bind(jax.hessian(inner, argnums=1), batch.inner),
        outer=bind(jax.value_and_grad(outer, argnums=(0, 1)), batch.outer),
        cross=bind(crossed, batch.inner),
        solve=bind(solve, batch.inner),
        descend=bind(descent, batch.inner),
        ends=bind(ends, batch.inner),
        values=bind(values, batch),
    )


def _lanczos(product: Callable[[Array], Array], size: int) -> tuple[Array, Array]:
    """The ends of the spectrum of a symmetric matrix, with all vectors kept orthogonal."""
    number = min(size, LANCZOS)
    first = jax.random.normal(jax.random.key(0), (size,), float)

    def step(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        basis, v = carry  # [number, size], [size]
        length = jnp.linalg.norm(v)
        v = jnp.where(length > 1e-12, v / length, 0.0)
        basis = basis.at[k].set(v)
        w = product(v)
        diagonal = v @ w
        w = w - basis.T @ (basis @ w)
        w = w - basis.T @ (basis @ w)
        return (basis, w), (diagonal, length)

    start = jnp.zeros((number, size)), first / jnp.linalg.norm(first)
    _, (diagonal, lengths) = jax.lax.scan(step, start, jnp.arange(number))
    alive = jnp.cumprod(jnp.where(jnp.arange(number) > 0, lengths > 1e-12, True))
    off = lengths[1:] * alive[1:]
    matrix = jnp.diag(jnp.where(alive, diagonal, diagonal[0])) + jnp.diag(off, 1) + jnp.diag(off, -1)
    eigenvalues = jnp.linalg.eigvalsh(matrix)
    return eigenvalues[0], eigenvalues[-1]


class LocalModel(NamedTuple):
    """What is known at one (x, y): gradients, the spectrum of H, and its inverse."""

    y: np.ndarray
    gradient: np.ndarray  # ∇_y g
    direct: np.ndarray  # ∇_x f
    b: np.ndarray  # ∇_y f
    smallest: float  # eigenvalue of H, of the directions that b and the cross term see
    largest: float
    flat: int  # directions without curvature that neither of them sees
    weakest: np.ndarray  # the eigenvector of the smallest eigenvalue; empty where H is not dense
    inverse: DampedInverse  # (b, damping=0) -> (H + damping I)⁻¹ b; damped only where H is dense
    matrix: np.ndarray  # H⁻¹; empty where H is not dense
    cross: Callable[[np.ndarray], np.ndarray]  # v -> ∇²_xy g v

    def hypergradient(self, damping: float = 0.0) -> np.ndarray:
        """The implicit hypergradient at this y, solved or not."""
        return self.direct - self.cross(self.inverse(self.b, damping))


def local_model(problem: FlatProblem, x: PyTree, y: np.ndarray) -> LocalModel:
    """Evaluates everything at one (x, y)."""
    _, (direct, b) = problem.outer(x, y)
    gradient = np.asarray(problem.inner(x, y)[1])

    def crossed(v: np.ndarray) -> np.ndarray:
        return np.asarray(problem.cross(x, y, v))

    known = (y, gradient, np.asarray(ravel_pytree(direct)[0]), np.asarray(b))
    matrix = np.asarray(problem.hessian(x, y)) if y.size <= DENSE else None
    if matrix is None or not np.isfinite(matrix).all():
        smallest, largest = (float(end) for end in problem.ends(x, y))

        def iterated(b: np.ndarray, damping: float = 0.0) -> np.ndarray:
            return np.asarray(problem.solve(x, y, b))

        return LocalModel(*known, smallest, largest, 0, np.zeros(0), iterated, np.zeros(0), crossed)
    eigenvalues, vectors = np.linalg.eigh(matrix)
    largest = float(eigenvalues[-1])
    flat = np.abs(eigenvalues) <= FLAT * np.abs(eigenvalues).max()
    unseen = flat if flat.any() and _unseen(vectors[:, flat], known[-1], crossed) else np.zeros_like(flat)
    weakest = int(np.argmin(np.where(unseen, np.inf, eigenvalues)))

    def inverse(b: np.ndarray, damping: float = 0.0) -> np.ndarray:
        damped = eigenvalues + damping
        regular = np.abs(damped) > FLAT * np.abs(damped).max()
        return vectors @ np.where(regular, vectors.T @ b / np.where(regular, damped, 1), 0)

    full = (vectors[:, ~flat] / eigenvalues[~flat]) @ vectors[:, ~flat].T
    curvatures = float(eigenvalues[weakest]), largest, int(unseen.sum())
    return LocalModel(*known, *curvatures, vectors[:, weakest], inverse, full, crossed)


def _unseen(flat: np.ndarray, b: np.ndarray, crossed: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether neither b nor the cross term has a part in the span of these columns."""
    random = np.random.default_rng(0).normal(size=(2, b.size))
    inside = flat @ (flat.T @ random[0])
    sizes = [np.linalg.norm(crossed(v / np.linalg.norm(v))) for v in (inside, random[1])]
    return bool(np.linalg.norm(flat.T @ b) <= UNSEEN * np.linalg.norm(b) and sizes[0] <= UNSEEN * sizes[1])


def inner_solution(
    problem: FlatProblem, x: PyTree, y: np.ndarray, enough: float, waiting: Callable[[str], bool]
) -> np.ndarray:
    """A minimum of g by a trust-region method, until ‖∇_y g‖ <= enough, or nothing moves, or the time is over."""
    value, gradient = problem.inner(x, y)
    ground = Ground.at(y, value, gradient, enough)
    for number in range(40):
        if bool(ground.done) or not waiting(
            f"inner problem: ‖∇_y g‖ = {float(ground.norm):.2g} after {STEPS * number}"
        ):
            break
        ground = problem.descend(x, ground)
    return np.asarray(ground.y)


def polished(problem: FlatProblem, x: PyTree, model: LocalModel) -> LocalModel:
    """Newton steps with this inverse, as long as they halve ‖∇_y g‖; the model at the last one, with the same H.

    There is no step where the curvature is negative: it would lead to a saddle, or up to a maximum.
    """
    if model.smallest < -FLAT * abs(model.largest):
        return model
    y, gradient = model.y, model.gradient
    for _ in range(10):
        step = model.inverse(gradient)
        new = np.asarray(problem.inner(x, y - step)[1])
        if not np.linalg.norm(new) < 0.5 * np.linalg.norm(gradient):
            break
        y, gradient = y - step, new
    if y is model.y:
        return model
    _, (direct, b) = problem.outer(x, y)
    return model._replace(
        y=y,
        gradient=gradient,
        direct=np.asarray(ravel_pytree(direct)[0]),
        b=np.asarray(b),
        cross=lambda v: np.asarray(problem.cross(x, y, v)),
    )


def unbounded(problem: FlatProblem, x: PyTree, start: np.ndarray, end: np.ndarray) -> bool:
    """Whether g keeps falling, at least in proportion, on the ray from the start through the end."""
    direction = end - start
    values = [float(problem.inner(x, start + scale * direction)[0]) for scale in (0.0, 1e3, 1e6)]
    if not np.isfinite(values).all():
        return values[1] == -math.inf or values[2] == -math.inf
    return values[1] - values[2] > 500 * (values[0] - values[1]) > 0
