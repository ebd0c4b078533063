"""Generalized minimal residuals: A u = b by products with A alone, for an A that need not be symmetric."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax.curvature.products import Product
from bilevax.meshes import like, zeros_like
from bilevax.problem import norm, widen
from bilevax.typing import Array, PyTree, Scalar

RESTART = 20  # directions that are kept


class LinearSolution(NamedTuple):
    """A solution u of A u = b, ‖b − A u‖ / ‖b‖, and the number of products with A."""

    u: PyTree
    residual: Array
    products: Array


class _Cycle(NamedTuple):
    basis: PyTree  # orthonormal directions, leaves [m + 1, ...]
    H: Array  # [m + 1, m], A basis[:m] = basis H; unused columns are zero
    w: Array  # wᵀ H = 0, w_0 = 1: the residual is β / ‖w‖
    k: Array
    left: Array  # the residual, relative to β


class _Carry(NamedTuple):
    u: PyTree
    r: PyTree  # b − A u
    left: Array  # ‖r‖
    products: Array
    stop: Array


def gmres(product: Product, b: PyTree, u0: PyTree | None, maxiter: int, tol: Scalar) -> LinearSolution:
    """Minimizes ‖b − A u‖ over u0 + span(r, A r, A² r, ...), r = b − A u0, and starts anew after 20 directions.

        A Q_k = Q_{k+1} H      min over c of ‖β e_0 − H c‖      u ← u + Q_k c,  β = ‖r‖

    b is scaled to norm one first, half-precision leaves are solved in float32, a u0 that is no better than zero is
    replaced by zero, and cycles that no longer help end the solve. Inner products are sums of elementwise products, so
    that leaves may be sharded in any way. (`jax.scipy.sparse.linalg.gmres` counts nothing, refuses leaves that are
    sharded over explicit axes, and transposes `product` in any case, which a rule of somebody else may not allow.)

    Args:
      product: u -> A u, linear.
      b: the right-hand side, any pytree.
      u0: where to start, a pytree like b; None for zero.
      maxiter: largest number of iterations, each of which is one product.
      tol: stops at ‖b − A u‖ <= tol ‖b‖.

    Returns:
      `LinearSolution(u, residual, products)`. A singular A gives the least-squares solution among those directions.

    Cost: one product for each iteration, one for u0, one for the residual after each cycle; 21 vectors like b.

    Reference: Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
    systems", 1986; the residual of a cycle without rotations: Ayachour, "A fast implementation for GMRES method", 2003.
    """
    size = norm(b)
    scale = jnp.where(size > 0, size, 1)
    unit = jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), widen(b))

    def wide(u: PyTree) -> PyTree:
        return optax.tree.cast_like(product(optax.tree.cast_like(u, b)), u)

    u, r, products = zeros_like(unit), unit, jnp.zeros((), jnp.int32)
    if u0 is not None:
        guess = like(jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), widen(u0)), unit)
        rest = optax.tree.sub(unit, wide(guess))
        better = norm(rest) < norm(unit)
        u, r, products = optax.tree.where(better, guess, u), optax.tree.where(better, rest, r), products + 1
    most_products = products + maxiter
    most = min(RESTART, maxiter, sum(leaf.size for leaf in jax.tree.leaves(unit)))

    def unfinished(c: _Carry) -> Array:
        return (c.left > tol) & (c.products < most_products) & ~c.stop

    def improve(c: _Carry) -> _Carry:
        step, k = _cycle(wide, c.r, c.left, most, most_products - c.products, tol)
        u = optax.tree.add(c.u, step)
        r = optax.tree.sub(unit, wide(u))
        left = norm(r)
        good = ~(left >= c.left)  # NaN is handed on
        u, r, smallest = optax.tree.where(good, (u, r, left), (c.u, c.r, c.left))
        return _Carry(u, r, smallest, c.products + k + 1, ~(left < 0.99 * c.left))

    c = jax.lax.while_loop(unfinished, improve, _Carry(u, r, norm(r), products, jnp.zeros((), bool)))
    left = jnp.where(jnp.isfinite(size), c.left, jnp.nan)
    u = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), c.u)
    return LinearSolution(optax.tree.cast_like(u, b), left, c.products)


def _cycle(product: Product, r: PyTree, beta: Array, most: int, rest: Array, tol: Scalar) -> tuple[PyTree, Array]:
    """The step that minimizes the residual over at most `most` directions, or `rest`, and their number."""
    first = jax.tree.map(lambda leaf: leaf / beta.astype(leaf.dtype), r)
    basis = jax.tree.map(lambda leaf: jnp.pad(leaf[None], [(0, most), *[(0, 0)] * leaf.ndim]), first)
    H, w = jnp.zeros((most + 1, most), beta.dtype), jnp.zeros(most + 1, beta.dtype).at[0].set(1)

    def unfinished(c: _Cycle) -> Array:
        return (c.k < jnp.minimum(most, rest)) & (c.left * beta > tol)

    def extend(c: _Cycle) -> _Cycle:
        q = product(jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, c.k, keepdims=False), c.basis))
        before = norm(q)
        h, q = _orthogonal(c.basis, q)
        again, q = _orthogonal(c.basis, q)  # twice is enough
        h, beyond = h + again, norm(q)
        new = beyond > jnp.finfo(beta.dtype).eps * before  # or the directions span all of A's
        divisor = jnp.where(new, beyond, 1)
        unit = jax.tree.map(lambda leaf: jnp.where(new, leaf / divisor.astype(leaf.dtype), 0), q)
        basis = jax.tree.map(lambda kept, q: jax.lax.dynamic_update_index_in_dim(kept, q, c.k + 1, 0), c.basis, unit)
        H = c.H.at[:, c.k].set(h.at[c.k + 1].set(jnp.where(new, beyond, 0)))
        w = c.w.at[c.k + 1].set(-jnp.sum(c.w * h) / divisor)
        left = jnp.where(new, 1 / norm(w), 0)
        return _Cycle(basis, H, w, c.k + 1, left)

    c = jax.lax.while_loop(unfinished, extend, _Cycle(basis, H, w, jnp.zeros((), jnp.int32), jnp.ones((), beta.dtype)))
    coefficients = jnp.linalg.lstsq(c.H, jnp.zeros(most + 1, beta.dtype).at[0].set(beta))[0]
    return jax.tree.map(lambda leaf: _combine(coefficients, leaf[:-1]), c.basis), c.k


def _orthogonal(basis: PyTree, q: PyTree) -> tuple[Array, PyTree]:
    """The coefficients of q in the basis, and what is left of q without them."""
    parts = jax.tree.map(lambda leaf, q: jnp.sum(leaf * q[None], axis=tuple(range(1, leaf.ndim))), basis, q)
    dtype = jnp.result_type(*jax.tree.leaves(parts))
    h = sum(part.astype(dtype) for part in jax.tree.leaves(parts))
    return h, optax.tree.sub(q, jax.tree.map(lambda leaf: _combine(h, leaf), basis))


def _combine(coefficients: Array, basis: Array) -> Array:
    """Σ_i c_i basis_i."""
    return jnp.tensordot(coefficients.astype(basis.dtype), basis, axes=1)
