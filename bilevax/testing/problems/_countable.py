"""A problem whose compiled program shows how often its losses were differentiated: each call has a product of its own.

| product        | where it comes from                                            |
|----------------|----------------------------------------------------------------|
| 13 from 11     | `C y` in the outer loss, once in each ∇f                       |
| 7 from 11      | `A y` in the inner loss, once in each ∇_y g and each pull-back |
| 5 from 11      | the pull-back of `B x`, once in each cross product             |
"""

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.problem import Batch, BilevelProblem
from bilevax.typing import Array, PyTree

OUTER, INNER, CROSS = (11, 13), (11, 7), (11, 5)
ENTRIES_OF_Y = 12


def _outer_loss(x: PyTree, y: PyTree, C: PyTree) -> Array:
    (w,) = x
    fit = jnp.sum(jax.nn.softplus(C.mean(0) @ (y["w"] * jnp.sum(w)))) + 0.1 * jnp.sum(w**2)
    return fit + jnp.sum(y["scale"].astype(fit.dtype) ** 2)


def _inner_loss(x: PyTree, y: PyTree, rows: PyTree) -> Array:
    ((w,), (A, B)) = x, rows
    fit = jnp.sum(jax.nn.softplus(A.mean(0) @ jnp.tanh(y["w"] + jnp.sum(w)))) + y["w"] @ (B.mean(0) @ w)
    return fit + jnp.sum(y["w"] ** 2) + jnp.sum((y["scale"].astype(fit.dtype) - 1) ** 2)


PROBLEM = BilevelProblem(_outer_loss, _inner_loss)


def countable(n: int) -> tuple[BilevelProblem, PyTree, PyTree, Batch]:
    """A smooth problem in a tuple x and a dict y, whose products `testing.executed_dots` can count.

    Args:
      n: number of agents.

    Returns:
      `(problem, x, y, batch)`: x = ([n, 5],), y = {"w": [n, 11], "scale": [n]} of which scale is in
      single precision, and two examples for each agent.

    Cost: a few thousand random numbers.

    Example:
        >>> from bilevax.testing import problems
        >>> problem, x, y, batch = problems.countable(4)
        >>> y["w"].shape, batch.outer.shape
        ((4, 11), (4, 2, 13, 11))
    """
    random = np.random.default_rng(0)
    C, A, B = (jnp.asarray(random.normal(size=(n, 2, *shape)) / 3) for shape in ((13, 11), (7, 11), (11, 5)))
    x, y = (np.ones((n, 5)),), {"w": np.ones((n, 11)), "scale": np.zeros(n, np.float32)}
    return PROBLEM, *jax.tree.map(jnp.asarray, (x, y)), Batch(C, (A, B))
