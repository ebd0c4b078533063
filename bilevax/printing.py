"""What `print` shows: a value that a constructor made by its call, a state by the shapes of what it holds."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

P = ParamSpec("P")
T = TypeVar("T")
LONGEST = 110  # characters of a field that stays on one line


def as_called(constructor: Callable[P, T]) -> Callable[P, T]:
    """A constructor whose values print as its call, in their field `text`.

        implicit(train_loss, optax, steps=20, ihvp=cg(maxiter=5))

    Args:
      constructor: a function that returns a NamedTuple with a field `text` and `__repr__ = by_text`.

    Returns:
      The constructor; functions are printed by their names, our own values by their calls, an optax transformation as
      `optax`, an array by its dtype and shape.
    """

    @functools.wraps(constructor)
    def construct(*args: P.args, **kwargs: P.kwargs) -> T:
        made: Any = constructor(*args, **kwargs)
        if "text" not in getattr(made, "_fields", ()):
            raise TypeError(
                f"{constructor.__name__} must return a NamedTuple with a field text to print as its call; got "
                f"{type(made).__name__}. Give it the field text: str = '', or take as_called away."
            )
        parts = [*map(brief, args), *(f"{name}={brief(value)}" for name, value in kwargs.items())]
        return made._replace(text=f"{constructor.__name__}({', '.join(parts)})")

    return construct


def by_text(value: Any) -> str:
    """The `__repr__` of what `as_called` has made; of one that was made by hand, the names of its fields."""
    return value.text or f"{type(value).__name__}({', '.join(name for name in value._fields if name != 'text')})"


def by_shape(state: Any) -> str:
    """The `__repr__` of a state: a line for each field, arrays by their dtype and shape; long fields on several."""
    return f"{type(state).__name__}({_lines(state, '')})"


def _lines(value: Any, indent: str) -> str:
    """The entries of a tuple, each on a line of its own, further in than `indent`."""
    names = [f"{name}=" for name in value._fields] if hasattr(value, "_fields") else [""] * len(value)
    entries = (f"\n{indent}  {name}{_entry(entry, name, indent)}," for name, entry in zip(names, value, strict=True))
    return "".join(entries) + f"\n{indent}"


def _entry(value: Any, name: str, indent: str) -> str:
    text = brief(value)
    if len(name + text) <= LONGEST or not isinstance(value, tuple) or hasattr(value, "text"):
        return text
    return f"{type(value).__name__ if hasattr(value, '_fields') else ''}({_lines(value, indent + '  ')})"


def brief(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, optax.GradientTransformation):
        return "optax"
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _of_array(value)
    if callable(value) and not isinstance(value, tuple):
        return getattr(value, "__name__", type(value).__name__)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        if hasattr(value, "text"):
            return repr(value)
        return _joined(
            type(value).__name__ + "(", ")", [f"{name}={brief(getattr(value, name))}" for name in value._fields]
        )
    if isinstance(value, dict):
        return _joined("{", "}", [f"{key!r}: {brief(entry)}" for key, entry in value.items()])
    if isinstance(value, tuple | list):
        left, right = ("(", ",)" if len(value) == 1 else ")") if isinstance(value, tuple) else "[]"
        return _joined(left, right, [brief(entry) for entry in value])
    return f"{value!r:.60}"


def _joined(left: str, right: str, parts: list[str], most: int = 12) -> str:
    return f"{left}{', '.join(parts[:most] + ['...'] * (len(parts) > most))}{right}"


def _of_array(value: Any) -> str:
    known = not isinstance(value, jax.core.Tracer)
    if known and value.ndim == 0 and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{value.item():.6g}" if jnp.issubdtype(value.dtype, jnp.floating) else str(value.item())
    return f"{value.dtype}{list(value.shape)}"
