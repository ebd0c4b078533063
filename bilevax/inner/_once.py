"""What must not be differentiated again, says so."""

import functools
from typing import NoReturn

import jax

from bilevax.typing import PyTree


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def once(name: str, tree: PyTree) -> PyTree:
    """The identity, in the backward pass of the solver of this name; it refuses to be differentiated."""
    return tree


@once.defjvp
def _twice(name: str, primals: tuple[PyTree], tangents: tuple[PyTree]) -> NoReturn:
    raise TypeError(
        f"{name} does not differentiate an estimate; got a derivative of its backward pass, which is a derivative "
        f"already. Differentiate the solve of bx.differentiable twice instead, or take inner.reverse, or "
        f"jax.lax.stop_gradient on the hypergradient."
    )
