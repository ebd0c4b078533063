"""Where an iterative solve of H v = b starts, the units in which it runs, and the state of one that keeps nothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax.curvature.products import Product
from bilevax.meshes import dot, like, zeros_like
from bilevax.problem import Loss, norm, widen
from bilevax.typing import Array, PyTree


class UnitSolve(NamedTuple):
    """A solve in units of ‖b‖, so that neither a tiny nor a huge b can underflow or overflow.

    Attributes:
      scale: ‖b‖, or 1 for b = 0; v of the solve times this is v of b.
      unit: b / scale, in at least float32.
      v: first v, in units of `scale`.
      r: its residual unit − H v.
      products: number of products that this took.
    """

    scale: Array
    unit: PyTree
    v: PyTree
    r: PyTree
    products: int


def start(product: Product, b: PyTree, v0: PyTree | None) -> UnitSolve:
    """Starts at v0 if that is better than zero, and at zero otherwise.

    Better means a lower φ(v) = ½ vᵀHv − bᵀv, which is what the solvers decrease, and positive curvature along v0. A v0
    that is stale, not finite, or far out along a negative eigenvector is thus not carried on.
    """
    size = norm(b)
    scale = jnp.where(size > 0, size, 1)
    unit = jax.tree.map(lambda leaf: leaf / scale, widen(b))
    zeros = zeros_like(unit)
    if v0 is None:
        return UnitSolve(scale, unit, zeros, unit, 0)
    guess = like(jax.tree.map(lambda leaf: leaf / scale, widen(v0)), unit)
    r = optax.tree.sub(unit, product(guess))
    lower = dot(guess, optax.tree.add(unit, r)) > 0
    convex = dot(guess, optax.tree.sub(unit, r)) > 0
    better = lower & convex
    return UnitSolve(scale, unit, optax.tree.where(better, guess, zeros), optax.tree.where(better, r, unit), 1)


def smallest(size: Array) -> Array:
    """The smallest of no curvatures, where a search begins: the largest number like this one."""
    return jnp.full_like(size, jnp.finfo(size.dtype).max)


def lower(curvature: Array, php: Array, pp: Array) -> Array:
    """The smaller of a curvature and pᵀHp / pᵀp; a p of length zero has none."""
    none = pp == 0
    return jnp.where(none, curvature, jnp.minimum(curvature, php / jnp.where(none, 1, pp)))


def seen(curvature: Array) -> Array:
    """The smallest curvature for a report: 0 where none was seen."""
    return jnp.where(curvature == smallest(curvature), 0, curvature)


def stateless(x: PyTree, y: PyTree, batch: PyTree = None, inner_loss: Loss | None = None) -> tuple[()]:
    """The `init` of an IHVP that keeps nothing."""
    return ()
