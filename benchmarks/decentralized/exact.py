"""The outer loss and its gradient at a point x, with the inner problem solved accurately, whatever a method did."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg

import bilevax as bx
from benchmarks.decentralized.network import Network
from bilevax.typing import Array, PyTree, Scalar

SIZES = (1.0, 0.5, 0.25, 0.0625, 0.0)  # of a Newton step; the last one stays where it is
FORCING = 1e-2  # a Newton step need not be more accurate: the residual falls by it


class Effort(NamedTuple):
    """Where the solvers give up: `newton` steps, and `products` with the Hessian for each solution of a system."""

    newton: int = 12
    products: int = 200


class Exact(NamedTuple):
    """F at x.

    Attributes:
      loss: F(x).
      gradient: ∇F(x), like x.
      y: the inner solution.
      residual: ‖∇_y g‖ there.
      product_residual: ‖∇²_yy g v − ∇_y f‖ / ‖∇_y f‖ of the v that the gradient was made with.
    """

    loss: Array
    gradient: PyTree
    y: PyTree
    residual: Array
    product_residual: Array


def systems(
    effort: Effort, problem: bx.BilevelProblem, x: Any, batch: bx.Batch, scale: PyTree
) -> tuple[Callable[..., tuple[PyTree, PyTree]], Callable[[PyTree], tuple[PyTree, Array]]]:
    """What solves H v = b, and the inner problem.

    Args:
      effort: limits.
      problem: f and g, g convex in y.
      x: outer variable.
      batch: of both losses.
      scale: like y, preconditions conjugate gradients.

    Returns:
      `solved(y, b, tol) -> (v, what is left)` with the Hessian at y, and `minimum(guess) -> (y, ‖∇_y g‖)`.
    """

    def slope(y: PyTree) -> PyTree:
        return jax.grad(problem.inner_loss, 1)(x, y, batch.inner)

    def length(y: PyTree) -> Array:
        return optax.tree.norm(slope(y))

    def solved(y: PyTree, b: PyTree, tol: float) -> tuple[PyTree, PyTree]:
        _, product = jax.linearize(slope, y)
        v, _ = cg(product, b, tol=tol, maxiter=effort.products, M=lambda v: jax.tree.map(jnp.divide, v, scale))
        return v, optax.tree.sub(product(v), b)

    def newton(carry: tuple) -> tuple:
        k, y, _, now = carry
        step, _ = solved(y, slope(y), FORCING)

        def moved(size: Scalar) -> PyTree:
            return jax.tree.map(lambda leaf, part: (leaf - size * part).astype(leaf.dtype), y, step)

        norms = jax.lax.map(lambda size: length(moved(size)), jnp.array(SIZES))
        best = jnp.nanargmin(norms)
        return k + 1, moved(jnp.array(SIZES)[best]), now, norms[best].astype(now.dtype)

    def minimum(guess: PyTree) -> tuple[PyTree, Array]:
        first = length(guess)
        state = jax.lax.while_loop(
            lambda carry: (carry[0] < effort.newton) & (carry[3] < 0.9 * carry[2]) & (carry[3] > 0),
            newton,
            (0, guess, jnp.full_like(first, jnp.inf), first),
        )
        return state[1], state[3]

    return solved, minimum


def scaling(diagonal: Callable[[Any], Any] | None, x: PyTree, y: PyTree) -> PyTree:
    """What preconditions conjugate gradients: the diagonal, or nothing."""
    return diagonal(x) if diagonal else jax.tree.map(jnp.ones_like, y)


def exact(
    effort: Effort,
    problem: bx.BilevelProblem,
    x: Any,
    y: Any,
    batch: bx.Batch,
    diagonal: Callable[[Any], Any] | None = None,
) -> Exact:
    """Newton's method for y from a guess, where the gradient's norm is what has to fall; then v and ∇F.

        y ← y − size · H⁻¹ ∇_y g          until ‖∇_y g‖ falls by less than a tenth
        H v = ∇_y f                       ∇F = ∇_x f − ∇²_xy g v

    Args:
      effort: limits.
      problem: f and g, g convex in y.
      x: outer variable.
      y: guess of the inner solution.
      batch: of both losses.
      diagonal: `diagonal(x)`, like y, preconditions the solvers of systems with H, conjugate gradients.

    Returns:
      F, ∇F and what is left of both equations.
    """
    solved, minimum = systems(effort, problem, x, batch, scaling(diagonal, x, y))
    y, residual = minimum(y)
    loss, (x_bar, b) = jax.value_and_grad(problem.outer_loss, (0, 1))(x, y, batch.outer)
    v, rest = solved(y, b, 30 * float(jnp.finfo(residual.dtype).eps))
    cross = jax.grad(lambda x: optax.tree.vdot(jax.grad(problem.inner_loss, 1)(x, y, batch.inner), v))(x)
    relative = optax.tree.norm(rest) / jnp.maximum(optax.tree.norm(b), jnp.finfo(residual.dtype).tiny)
    return Exact(loss, optax.tree.sub(x_bar, cross), y, residual, relative)


def loss_alone(
    effort: Effort,
    problem: bx.BilevelProblem,
    x: Any,
    y: Any,
    batch: bx.Batch,
    diagonal: Callable[[Any], Any] | None = None,
) -> Array:
    """F, as `exact` finds it, at less than half the cost."""
    _, minimum = systems(effort, problem, x, batch, scaling(diagonal, x, y))
    return problem.outer_loss(x, minimum(y)[0], batch.outer)


def pooled(network: Network) -> bx.BilevelProblem:
    """The mean losses of a common lower level."""
    return bx.BilevelProblem(*(partial(network.loss, loss) for loss in network.problem))


def evaluator(network: Network, effort: Effort) -> Callable[[Any, Any, bx.Batch], Exact]:
    """A compiled `exact(x, y, batch)` at a point of the network: of the mean losses, or agent by agent where personal.

    Its gradient is that of the mean over agents, and its residuals are the largest.
    """
    if not network.personal:
        return jax.jit(partial(exact, effort, pooled(network), diagonal=network.diagonal))

    @jax.jit
    def personal(x: Any, y: Any, batch: bx.Batch) -> Exact:
        each = jax.vmap(partial(exact, effort, network.problem), (None, 0, 0))(x, y, batch)
        gradient = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), each.gradient)
        return Exact(each.loss.mean(), gradient, each.y, each.residual.max(), each.product_residual.max())

    return personal


def losses(network: Network, effort: Effort) -> Callable[[Any, Any, bx.Batch], Array]:
    """A compiled `loss(x, y, batch)`: F alone, at a point of the network."""
    if not network.personal:
        return jax.jit(partial(loss_alone, effort, pooled(network), diagonal=network.diagonal))
    each = jax.vmap(partial(loss_alone, effort, network.problem), (None, 0, 0))
    return jax.jit(lambda x, y, batch: jnp.mean(each(x, y, batch)))
