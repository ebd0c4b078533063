"""Points (x, y) of every form that a method may meet, and losses that take any of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.problem import Batch, BilevelProblem
from bilevax.typing import Array, PyTree

Point = tuple[PyTree, PyTree]


def _inner_loss(x: PyTree, y: PyTree, batch: Array) -> Array:
    """Hessian diag(2 − 0.1 cos y), coupled to every leaf of x."""
    target = sum(jnp.tanh(leaf).mean() for leaf in jax.tree.leaves(x)) * batch.mean()
    return sum(jnp.sum((leaf - target) ** 2 + 0.1 * jnp.cos(leaf)) for leaf in jax.tree.leaves(y))


def _outer_loss(x: PyTree, y: PyTree, batch: Array) -> Array:
    fit = sum(jnp.sum(jnp.sin(leaf - batch.mean())) for leaf in jax.tree.leaves(y))
    return fit + 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))


PROBLEM = BilevelProblem(_outer_loss, _inner_loss)


def _array(values: Any, dtype: Any = None) -> Array:
    """An array that no program had to be compiled for, in double precision by default where x64 is on."""
    wide = np.asarray(values, float)
    return jnp.asarray(wide if dtype is None else wide.astype(dtype))


def make_batch(dtype: Any = None) -> Batch:
    """Eight numbers for each loss."""
    rows = _array(np.linspace(0.5, 1.5, 8), dtype)
    return Batch(outer=rows, inner=rows)


def everything() -> Point:
    """Every form at once: nested dict, list, tuple, None, empty containers, scalars, half, single, double precision."""
    layers = [{"w": _array(np.full((2, 3), 0.3), jnp.bfloat16), "b": _array(np.zeros(3), jnp.float32)}, (), {}]
    x = {"layers": layers, "rate": _array(-2.0), "none": None}
    return x, (layers, {"head": _array(np.ones((1, 1, 2))), "scale": _array(0.5, jnp.float32)}, None)


def array(dtype: Any = None) -> Point:
    """Two arrays."""
    return _array(np.linspace(-1, 2, 3), dtype), _array(np.linspace(0, 1, 4), dtype)


def dictionary(dtype: Any = None) -> Point:
    """An array and a scalar in each."""
    x, y = array(dtype)
    return {"a": x, "b": _array(0.7, dtype)}, {"a": y, "b": _array(0.3, dtype)}


def nested() -> Point:
    """Layers, an empty one among them, and None."""
    layers = [{"w": _array(np.full((2, 3), 0.3)), "b": _array(np.zeros(3))}, ()]
    return {"layers": layers, "rate": _array(-2.0), "none": None}, (layers, {"head": _array(np.ones((1, 1, 2)))})


def mixed() -> Point:
    """Half, single and double precision."""
    types = {"half": jnp.bfloat16, "single": jnp.float32, "double": jnp.float64}
    x, y = ({name: _array(np.full(size, 0.5), dtype) for name, dtype in types.items()} for size in (2, 3))
    return x, y


def linen() -> Point:
    """The variables of a flax.linen layer; needs flax."""
    import flax.linen

    return {"rate": _array(0.5)}, flax.linen.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))


def nnx() -> Point:
    """The state of a flax.nnx layer in both; needs flax."""
    import flax.nnx

    _, parameters = flax.nnx.split(flax.nnx.Linear(3, 2, rngs=flax.nnx.Rngs(0)))
    return parameters, parameters


POINTS = {
    "array": array,
    "dict": dictionary,
    "tuple": lambda: ((_array(np.ones(2)), _array(0.1)), (_array(np.zeros((2, 2))),)),
    "nested": nested,
    "scalar": lambda: (_array(0.5), _array(-1.2)),
    "python_float": lambda: (0.5, -1.2),
    "bfloat16": lambda: dictionary(jnp.bfloat16),
    "mixed": mixed,
    "linen": linen,
    "nnx": nnx,
}
