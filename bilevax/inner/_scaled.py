"""A product of a slope and a derivative, in which a derivative of zero outweighs an infinite slope."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from bilevax.typing import Array


def scaled(c: Array, t: Array) -> Array:
    """The product c t of arrays of one type, and 0 where t is 0, also for a c that is not finite.

    As a function of t it is linear, and its own transpose. No composition of JAX's operations is that: one that asks
    whether t is 0 has no transpose. Hence a primitive of its own.
    """
    return _SCALED.bind(c, t)


def _value(c: Array, t: Array) -> Array:
    return jnp.where(t == 0, jnp.zeros_like(t), c * t)


def _push(primals: Any, tangents: Any) -> tuple[Array, Any]:
    (c, t), (c_dot, t_dot) = primals, tangents
    y = scaled(c, t)
    parts = [] if isinstance(t_dot, ad.Zero) else [scaled(c, t_dot)]
    if not isinstance(c_dot, ad.Zero):
        parts.append(jnp.where(t == 0, jnp.zeros_like(t), c_dot * t))  # as a function of c_dot JAX can transpose it
    return y, sum(parts[1:], start=parts[0])


def _pull(y_bar: Any, c: Array, t: Any) -> tuple[None, Any]:
    return None, y_bar if isinstance(y_bar, ad.Zero) else scaled(c, y_bar)


def _batch(arrays: Any, axes: Any) -> tuple[Array, int]:
    c, t = (array if axis is None else jnp.moveaxis(array, axis, 0) for array, axis in zip(arrays, axes, strict=True))
    if axes[0] is None:
        c = c[None] * jnp.ones_like(t)
    if axes[1] is None:
        t = t[None] * jnp.ones_like(c)
    return scaled(c, t), 0


_SCALED = core.Primitive("scaled")
_SCALED.def_impl(jax.jit(_value))
_SCALED.def_abstract_eval(lambda c, t: t)
ad.primitive_jvps[_SCALED] = _push
ad.primitive_transposes[_SCALED] = _pull
batching.primitive_batchers[_SCALED] = _batch
mlir.register_lowering(_SCALED, mlir.lower_fun(_value, multiple_results=False))
