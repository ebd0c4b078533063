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
    held = [const for const in closed.consts if isinstance(const, jax.core.Tracer)]
    kept = [None if isinstance(const, jax.core.Tracer) else const for const in closed.consts]  # no traced value leaks
    jaxpr = closed.jaxpr

    def call(held: list[Any], *args: PyTree) -> PyTree:
        given = iter(held)
        consts = [next(given) if const is None else const for const in kept]
        program = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))
        return jax.tree.unflatten(structure, program(*jax.tree.leaves(args)))

    return Closed(call, held, shapes)
