"""Python functions inside JAX programs."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.typing import PyTree


class Function(Protocol):
    """`function(x, y, batch)`, a loss or a solve of yours."""

    def __call__(self, x: PyTree, y: PyTree, batch: PyTree, /) -> PyTree: ...


def _like_y(x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
    return y


def black_box(function: Function, *, returns: Function = _like_y) -> Function:
    """A Python function (NumPy, SciPy, a simulator) as a JAX function that has values and no derivatives.

    It runs on the host, on NumPy arrays, whenever the compiled program reaches it (`jax.pure_callback`): it must give
    the same result for the same arguments, so let it take seeds from the batch. Under `jax.vmap` and `chunk=None` it is
    called once for each row, one row after the other. JAX calls it from a thread of its own, which does not see
    `with jax.enable_x64(True)`: for float64 set it once for the whole program.

    Args:
      function: `function(x, y, batch)` on NumPy arrays, such as an ODE solver; it may return Python numbers as well.
      returns: `returns(x, y, batch)` looks like what the function returns; by default y. For a loss pass
        `lambda x, y, batch: 0.0`.

    Returns:
      A JAX function of x, y and batch, for `zeroth_order(solve=...)` and `full_zeroth_order`.

    Raises:
      ValueError: if function or returns do not take three arguments. When the program runs: if the function returns
        another structure or other shapes, and whatever it raises, as a JAX runtime error with that message.

    Cost: that of the function, and a copy of arguments and results to the host and back.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp, numpy as np
        >>> solve = bx.inner.black_box(lambda x, y, batch: np.linalg.solve(batch, x))
        >>> jax.jit(solve)(jnp.array([2.0, 6.0]), jnp.zeros(2), jnp.diag(jnp.array([1.0, 3.0]))).tolist()
        [2.0, 2.0]
    """
    checks.function("function", function, "x", "y", "batch")
    checks.function("returns", returns, "x", "y", "batch")

    def call(x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
        arguments = jax.tree.map(_raw, (x, y, batch))
        expected = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, returns(x, y, batch)))

        def on_host(x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
            result = function(*jax.tree.map(np.asarray, (x, y, batch)))
            fix = "Return what `returns` returns: by default a pytree like y."
            checks.same_shapes("result of the black box", result, expected, fix)
            return jax.tree.map(_cast, result, expected)

        return jax.pure_callback(on_host, expected, *arguments, vmap_method="sequential")

    return call


def _cast(leaf: Any, like: jax.ShapeDtypeStruct) -> np.ndarray:
    array = np.asarray(leaf)
    if not jnp.can_cast(array.dtype, like.dtype, "same_kind"):
        raise ValueError(
            f"result of the black box must hold {like.dtype}; got {array.dtype}. Return real numbers, or let `returns` "
            f"say what comes."
        )
    return array.astype(like.dtype)


def _raw(leaf: Any) -> Any:
    """Keys of jax.random as the integers that NumPy can hold."""
    typed = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if typed else leaf
