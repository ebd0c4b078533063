"""Linear functions the other way round."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bilevax.typing import PyTree


def transposed(pull_back: Callable[[PyTree], PyTree], like: PyTree, tangent: PyTree) -> PyTree:
    """The tangent pushed by the transpose of `pull_back`, a linear function of a cotangent like `like`.

    In place of `jax.jvp`: what is pulled back may hold functions with a `jax.custom_vjp`, which has no forward mode.
    """
    shapes = jax.eval_shape(lambda: like)
    (pushed,) = jax.linear_transpose(pull_back, shapes)(tangent)
    return pushed


def moved_along(b: PyTree, x_dot: PyTree) -> PyTree:
    """The same b, a linear function of x_dot, in every leaf: plus 0 · Σ x_dot.

    A leaf of y that x has no influence on has a b of zeros, whatever x_dot is, and `jax.lax.custom_linear_solve` can be
    transposed only where all of its right-hand side is linear.
    """
    zero = jnp.asarray(0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(x_dot)))
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), b)
