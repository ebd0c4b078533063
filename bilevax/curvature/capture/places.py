"""What is known of an intermediate array: the axis that counts its examples, and whether it depends on y."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import source_info_util

from bilevax.typing import Array

STEPS = ("stop_gradient", "sign", "floor", "ceil", "round", "nextafter")  # derivative 0
# what makes zeros and ones of zeros and ones
SELECTING = (
    "convert_element_type", "mul", "max", "min", "select_n", "concatenate", "pad",
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "slice", "rev", "copy", "stop_gradient", "reduce_max",
    "reduce_min", "reduce_and", "reduce_or",
)  # fmt: skip

REMEDIES = {
    "reshape": "keep the examples first, [N, T] -> [N T]",
    "scan": "map over them with jax.vmap or jax.lax.map",
    "while": "take lax.scan, or a fixed number of steps",
    "sort": "sort along another axis, or permute by index",
    "concatenate": "put arrays side by side along another axis",
    "slice": "cut the batch in split(x, batch), or with jnp.where",
}

PAIRS = "each pair of examples has a number there"


class Lost(NamedTuple):
    """Of an array that depends on the examples but keeps them along no axis: which equation lost it, and a remedy."""

    equation: str
    line: str
    remedy: str

    @property
    def where(self) -> str:
        """The equation and its line."""
        return f"{self.equation}{self.line and ' at ' + self.line}"

    @property
    def what(self) -> str:
        """For messages."""
        return f"{self.where}; {self.remedy}"

    def inside(self, eqn: Any) -> "Lost":
        """What was lost inside of a call, by a line of the user's."""
        return self._replace(line=self.line or _line(eqn))


Push = Callable[[Array, Array | None], Array]
"""Weights [N] and a mask [N, T] or None to those of the slots, shaped like the axes that count them."""


class Spread(NamedTuple):
    """Examples along several axes: microbatches [M, N/M], in their order; or slots [E, C] that hold one of them each.

    Attributes:
      axes: of the array.
      ordered: whether they count the examples in their order.
      partial: of sums over but some of the axes: statistics of microbatches.
      otherwise: what the axis is where slots cannot be followed: SHARED after a sum over the examples, or lost.
      moves: how often they were put elsewhere: what was moved twice may be in its order again.
      push: what goes the way of the examples into their slots; None where they are ordered, or not asked for.
    """

    axes: tuple[int, ...]
    ordered: bool
    partial: bool = False
    otherwise: Lost | None = None
    moves: int = 1
    push: Push | None = None


SHARED = None
Axis = int | Lost | Spread | None

SMOOTH, FLAT, SELECTS = range(3)  # with a derivative in y; without one; without one, and 0 or 1


class Place(NamedTuple):
    """What is known of an array besides its numbers.

    Attributes:
      axis: of the examples.
      kind: whether it depends on y.
      summed: what summed over the examples, where it depends on y through such a sum and holds no axis of them.
      counts: of whole numbers that are indices, for each entry of the last axis or once for all of it: the axis along
        which they are 0, 1, 2, ..., or `NEVER`, or None; () where nothing is known.
    """

    axis: Axis = SHARED
    kind: int = FLAT
    summed: Lost | None = None
    counts: tuple[int | None, ...] = ()


NEVER = -1  # of what is False everywhere


def axes_of(axis: Axis) -> tuple[int, ...]:
    """The axes that count examples; () where there are none."""
    return axis.axes if isinstance(axis, Spread) else (axis,) if isinstance(axis, int) else ()


def lost(eqn: Any, why: str = "", remedy: str = "") -> Lost:
    """What an equation lost: its primitive, shapes and line, and a remedy."""
    name = eqn.primitive.name
    shapes = [str(list(var.aval.shape)) for var in eqn.invars if getattr(var.aval, "shape", ())]
    results = [str(list(var.aval.shape)) for var in eqn.outvars]
    remedy = remedy or REMEDIES.get(name, "keep them along an axis of their own")
    return Lost(f"{name} {' x '.join(shapes)} -> {', '.join(results)}{why and ', ' + why}", _line(eqn), remedy)


def _line(eqn: Any) -> str:
    """File, line and function that an equation comes from; empty where JAX does not know."""
    return source_info_util.summarize(eqn.source_info).rsplit("/", 1)[-1]


# Whether an array depends on y


def literal_kind(value: Any) -> int:
    """The kind of a constant of the program."""
    return SELECTS if jnp.ndim(value) == 0 and value in (0, 1) else FLAT


def kinds_of(eqn: Any, kinds: Sequence[int]) -> list[int]:
    """Whether results have a derivative in y, or are zeros and ones."""
    name = eqn.primitive.name
    least = min(kinds, default=FLAT)
    if least == SELECTS and name in ("dot_general",):
        least = FLAT if eqn.params["dimension_numbers"][0][0] else SELECTS
    elif least == SELECTS and name not in SELECTING:
        least = FLAT
    if name == "select_n":
        least = min(kinds[1:])
    if name in STEPS:
        least = max(least, FLAT)
    return [of_dtype(out.aval.dtype, least) for out in eqn.outvars]


def of_dtype(dtype: Any, kind: int) -> int:
    """The kind of an array of this type, which is at least what its type says."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return SELECTS
    return kind if jnp.issubdtype(dtype, jnp.inexact) else max(kind, FLAT)
