"""One value for each of the three levels of a single-loop method."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import jax

from bilevax import checks
from bilevax.typing import Array, PyTree, Scalar

T = TypeVar("T")


class Levels(NamedTuple, Generic[T]):
    """One thing per level: a point, its directions, step sizes, corrections, graphs, ...

    Attributes:
      x: of the outer variables.
      y: of the inner variables.
      v: of the inverse-Hessian-vector products; left out in a method without them.

    Example:
        >>> import bilevax as bx
        >>> bx.Levels(x=0.01, y=0.1, v=0.1).y
        0.1
    """

    x: T
    y: T
    v: T = cast(Any, None)


PerLevel: TypeAlias = T | Levels[T] | tuple[T, T] | tuple[T, T, T]
"""One for all levels, or one for each."""


class Schedule(Protocol):
    """`schedule(k) -> number`, a function of yours or of optax."""

    def __call__(self, k: Any, /) -> Any: ...


Rate: TypeAlias = Scalar | Schedule


def levels(name: str, value: Any) -> Levels[PyTree]:
    """Reads `Levels`, two or three values in the order x, y, v, or one value that holds for all of them."""
    if isinstance(value, Levels):
        return value
    if type(value) not in (tuple, list, dict):
        return Levels(value, value, value)
    if isinstance(value, dict) or len(value) not in (2, 3):
        raise ValueError(
            f"{name} must be one value for all levels, or bx.Levels(x, y, v); got a {type(value).__name__} of "
            f"{len(value)}: {value!r:.80}. Pass, say, {name}=bx.Levels(x=..., y=..., v=...)."
        )
    return Levels(*value)


def at(k: Scalar, value: Any) -> Any:
    """The value at iteration k of a number, or of a schedule `k -> number`."""
    if not callable(value):
        return value
    checks.scalar("the value of a schedule", number := value(k), "Return one number for each k.")
    return number


def each(function: Callable[..., Array], values: Levels[PyTree], *trees: Levels[PyTree]) -> Levels[PyTree]:
    """`function(value, *leaves)` on the leaves of each level that is there (not None), dtypes kept."""

    def on_leaves(value: Any, parts: list[PyTree]) -> PyTree:
        return jax.tree.map(lambda *leaves: function(value, *leaves).astype(leaves[0].dtype), *parts)

    return Levels(*(on_leaves(value, parts) for value, *parts in zip(values, *trees, strict=True)))
