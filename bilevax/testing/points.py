"""Points (x, y) of every form that a method may meet, and losses that take any of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.problem import Batch, BilevelProblem
from bilevax.typing import Array, PyTree

__all__ = ["POINTS", "PROBLEM", "everything", "make_batch"]


def __dir__() -> list[str]:
    return __all__


Variables = tuple[PyTree, PyTree]  # x, y


def _inner_loss(x: PyTree, y: PyTree, batch: Array) -> Array:
    """Hessian diag(2 − 0.1 cos y), coupled to every leaf of x."""
    target: Any = sum(jnp.tanh(leaf).mean() for leaf in jax.tree.leaves(x)) * batch.mean()
    loss: Any = sum(jnp.sum((leaf - target) ** 2 + 0.1 * jnp.cos(leaf)) for leaf in jax.tree.leaves(y))
    return loss


def _outer_loss(x: PyTree, y: PyTree, batch: Array) -> Array:
    fit: Any = sum(jnp.sum(jnp.sin(leaf - batch.mean())) for leaf in jax.tree.leaves(y))
    return fit + 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))


PROBLEM = BilevelProblem(_outer_loss, _inner_loss)
"""Losses of any x and y; the Hessian of the inner one is diag(2 − 0.1 cos y)."""


def _numbers(values: Any, dtype: Any = None) -> Array:
    """An array that no program had to be compiled for, in double precision by default where x64 is on."""
    wide = np.asarray(values, float)
    return jnp.asarray(wide if dtype is None else wide.astype(dtype))


def make_batch(dtype: Any = None) -> Batch:
    """Eight numbers for each loss of `PROBLEM`.

    Args:
      dtype: theirs; by default double precision, where x64 is on.

    Returns:
      `Batch(outer, inner)`, both [8].

    Cost: none.

    Example:
        >>> from bilevax import testing
        >>> testing.points.make_batch().inner.shape
        (8,)
    """
    rows = _numbers(np.linspace(0.5, 1.5, 8), dtype)
    return Batch(outer=rows, inner=rows)


def everything() -> Variables:
    """Every form at once: nested dict, list, tuple, None, empty containers, scalars, half, single, double precision.

    Returns:
      x and y.

    Cost: none.

    Example:
        >>> from bilevax import testing
        >>> x, y = testing.points.everything()
        >>> sorted(x), x["layers"][0]["w"].dtype.name
        (['layers', 'none', 'rate'], 'bfloat16')
    """
    layers = [{"w": _numbers(np.full((2, 3), 0.3), jnp.bfloat16), "b": _numbers(np.zeros(3), jnp.float32)}, (), {}]
    x = {"layers": layers, "rate": _numbers(-2.0), "none": None}
    return x, (layers, {"head": _numbers(np.ones((1, 1, 2))), "scale": _numbers(0.5, jnp.float32)}, None)


def _array(dtype: Any = None) -> Variables:
    """Two arrays."""
    return _numbers(np.linspace(-1, 2, 3), dtype), _numbers(np.linspace(0, 1, 4), dtype)


def _dictionary(dtype: Any = None) -> Variables:
    """An array and a scalar in each."""
    x, y = _array(dtype)
    return {"a": x, "b": _numbers(0.7, dtype)}, {"a": y, "b": _numbers(0.3, dtype)}


def _nested() -> Variables:
    """Layers, an empty one among them, and None."""
    layers = [{"w": _numbers(np.full((2, 3), 0.3)), "b": _numbers(np.zeros(3))}, ()]
    return {"layers": layers, "rate": _numbers(-2.0), "none": None}, (layers, {"head": _numbers(np.ones((1, 1, 2)))})


def _mixed() -> Variables:
    """Half, single and double precision."""
    types = {"half": jnp.bfloat16, "single": jnp.float32, "double": jnp.float64}
    x, y = ({name: _numbers(np.full(size, 0.5), dtype) for name, dtype in types.items()} for size in (2, 3))
    return x, y


def _linen() -> Variables:
    """The variables of a flax.linen layer; needs flax."""
    import flax.linen

    return {"rate": _numbers(0.5)}, flax.linen.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))


def _nnx() -> Variables:
    """The state of a flax.nnx layer in both; needs flax."""
    import flax.nnx

    _, parameters = flax.nnx.split(flax.nnx.Linear(3, 2, rngs=flax.nnx.Rngs(0)))
    return parameters, parameters


POINTS: dict[str, Callable[[], Variables]] = {
    "array": _array,
    "dict": _dictionary,
    "tuple": lambda: ((_numbers(np.ones(2)), _numbers(0.1)), (_numbers(np.zeros((2, 2))),)),
    "nested": _nested,
    "scalar": lambda: (_numbers(0.5), _numbers(-1.2)),
    "python_float": lambda: (0.5, -1.2),
    "bfloat16": lambda: _dictionary(jnp.bfloat16),
    "mixed": _mixed,
    "linen": _linen,
    "nnx": _nnx,
}
"""Functions that make a point (x, y), by what is particular about it."""
