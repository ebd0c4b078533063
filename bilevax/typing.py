"""The types that signatures speak of; each is JAX's own, so that a type checker knows it."""

from typing import Any, TypeAlias

import jax
import numpy as np

__all__ = [
    "Array",
    "Key",
    "PyTree",
    "Scalar",
]


def __dir__() -> list[str]:
    return __all__


Array: TypeAlias = jax.Array
"""An array of JAX, traced or not."""

Key: TypeAlias = jax.Array
"""One random key, of `jax.random.key` or `jax.random.PRNGKey`."""

PyTree: TypeAlias = Any
"""Any nesting of containers with arrays or numbers as leaves."""

Scalar: TypeAlias = jax.Array | np.ndarray | np.floating | np.integer | float
"""One real number: of Python, NumPy or JAX, traced or not."""
