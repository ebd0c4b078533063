"""What a function closes over, made an argument: a derivative with respect to it can then be seen, and refused."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

from bilevax.typing import PyTree


class Closed(NamedTuple):
    """A function that closes over nothing that is traced.

    Attributes:
      call: `call(held, *args)`, the function, which is not called again.
      held: the traced values that it closed over.
      shapes: what it returns, as shapes and dtypes.
    """

    call: Callable[..., Any]
    held: list[Any]
    shapes: PyTree


def close(function: Callable[..., PyTree], *args: PyTree) -> Closed:
    """Traces the function once, for arguments of these shapes."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    structure = jax.tree.structure(shapes)
    traced = [isinstance(const, jax.core.Tracer) for const in closed.consts]

    def call(held: list[Any], *args: PyTree) -> PyTree:
        given = iter(held)
        consts = [next(given) if is_traced else const for const, is_traced in zip(closed.consts, traced, strict=True)]
        program = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, consts))
        return jax.tree.unflatten(structure, program(*jax.tree.leaves(args)))

    held = [const for const, is_traced in zip(closed.consts, traced, strict=True) if is_traced]
    return Closed(call, held, shapes)
