"""A linear function the other way round."""

from collections.abc import Callable

import jax

from bilevax.typing import PyTree


def transposed(pull_back: Callable[[PyTree], PyTree], like: PyTree, tangent: PyTree) -> PyTree:
    """The tangent pushed by the transpose of `pull_back`, a linear function of a cotangent like `like`.

    In place of `jax.jvp`: what is pulled back may hold functions with a `jax.custom_vjp`, which has no forward mode.
    """
    shapes = jax.eval_shape(lambda: like)
    (pushed,) = jax.linear_transpose(pull_back, shapes)(tangent)
    return pushed
