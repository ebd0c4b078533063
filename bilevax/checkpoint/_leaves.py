"""What is known of the leaves of a state, and how each is written and made again."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.typing import PyTree


class Leaf(NamedTuple):
    """What is known of a leaf without its numbers; `value` is a Python number, or the name of a key's generator."""

    path: str
    kind: str
    shape: list[int]
    dtype: str
    weak: bool = False
    value: str | None = None

    def __str__(self) -> str:
        if self.kind in _PYTHON:
            return f"a Python {self.kind}"
        return f"{self.dtype}{self.shape}" + (" of NumPy" if self.kind in ("numpy", "scalar") else "")


_PYTHON: dict[str, Callable[[Any], Any]] = {
    "bool": lambda text: text == "True",
    "int": int,
    "float": float,
    "complex": complex,
    "str": str,
}
_TYPES = {"bool": np.bool_, "int": np.integer, "float": np.floating, "complex": np.complexfloating}


def leaves_of(name: str, tree: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(
                f"{name} must be made of arrays; got a tracer at {name}{jax.tree_util.keystr(path)}. Call it between "
                f"the calls of jitted functions, not inside of them."
            )
        yield jax.tree_util.keystr(path), leaf


def described(path: str, leaf: Any, name: str) -> Leaf:
    if type(leaf).__name__ in _PYTHON and type(leaf).__module__ == "builtins":
        return Leaf(path, type(leaf).__name__, [], "", value=leaf if isinstance(leaf, str) else repr(leaf))
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        raise ValueError(
            f"{name} must have arrays, keys and numbers as leaves; got {leaf!r:.80} at {name}{path}. Leave it out."
        )
    shape, kind = [*leaf.shape], _kind(leaf)
    if kind == "key":
        impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else None
        return Leaf(path, kind, shape, str(leaf.dtype), value=impl)
    dtype = "float0" if leaf.dtype == jax.dtypes.float0 else leaf.dtype.name
    if dtype != "float0" and leaf.dtype != bool and not jax.dtypes.issubdtype(leaf.dtype, np.number):
        raise ValueError(
            f"{name} must have numbers in its arrays; got {leaf.dtype} at {name}{path}. Leave it out, or put it into "
            f"config."
        )
    return Leaf(path, kind, shape, dtype, bool(getattr(leaf, "weak_type", False)))


def _kind(leaf: Any) -> str:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key"
    if isinstance(leaf, jax.Array):
        return "array"
    return {np.ndarray: "numpy", jax.ShapeDtypeStruct: "any"}.get(type(leaf), "scalar")


def has_data(entry: Leaf) -> bool:
    return entry.kind not in _PYTHON and entry.dtype != "float0" and 0 not in entry.shape


def data_of(leaf: Any) -> Any:
    """What is written of a leaf; an array that one of several processes holds alone is written by the first."""
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf) if jax.process_count() > 1 and leaf.is_fully_addressable else leaf
    return np.asarray(leaf)


def check_structure(found: list[Leaf], wanted: list[Leaf], at: Any) -> None:
    """Raises ValueError that names the first leaf which differs."""
    stored, asked = ({leaf.path: leaf for leaf in leaves} for leaves in (found, wanted))
    for path in {**stored, **asked}:
        here, there = asked.get(path), stored.get(path)
        if here is None or there is None or not _fits(there, here):
            got = "no leaf" if here is None else str(here)
            raise ValueError(
                f"like must have the leaves that are stored in {at}; got {got} at like{path}, where "
                f"{'nothing' if there is None else there} is stored. Pass a state of the same method, sizes and "
                f"dtypes, or give this run a folder of its own."
            )
        jaxes = here.kind == "array" or (here.kind == "any" and there.kind == "array")
        if jaxes and jax.dtypes.canonicalize_dtype(np.dtype(there.dtype)).name != there.dtype:
            raise ValueError(
                f"like must have dtypes that JAX allows; got {there.dtype} at like{path}. Set "
                f'jax.config.update("jax_enable_x64", True), as it was at the save.'
            )


def _fits(stored: Leaf, like: Leaf) -> bool:
    if stored.kind in _PYTHON:
        anything = like.kind == "any" and stored.kind in _TYPES and like.shape == []
        return stored.kind == like.kind or (
            anything and bool(jax.dtypes.issubdtype(np.dtype(like.dtype), _TYPES[stored.kind]))
        )
    return like.kind not in _PYTHON and (stored.shape, stored.dtype) == (like.shape, like.dtype)


def is_spread(leaf: Any) -> bool:
    """Whether it is to lie on several devices; keys are put there when they have been made."""
    sharding = None if _kind(leaf) == "key" else getattr(leaf, "sharding", None)
    return sharding is not None and len(sharding.device_set) > 1


def made(entry: Leaf, like: Any, data: Any) -> Any:
    """The leaf out of its numbers; where `like` has a shape alone, of the kind that was stored."""
    if entry.kind in _PYTHON:
        return _PYTHON[entry.kind](entry.value)
    if entry.dtype == "float0":
        return np.zeros(entry.shape, jax.dtypes.float0)
    if not has_data(entry):
        data = np.zeros(entry.shape, like.dtype)
    kind = entry.kind if isinstance(like, jax.ShapeDtypeStruct) else _kind(like)
    if kind == "scalar":
        return data[()]
    if kind == "numpy" or isinstance(data, jax.Array):
        return data
    if kind == "key":
        data = jax.random.wrap_key_data(jnp.array(data), impl=entry.value)
    array = _weak(data) if entry.weak else data
    if like.sharding is None or not getattr(like, "committed", True):
        return jnp.array(array)
    return jax.device_put(array, like.sharding, may_alias=False)


def _weak(array: np.ndarray) -> Any:
    """The same numbers, of a weak type."""
    zero = jnp.broadcast_to(jnp.asarray(array.dtype.type(0).item()), array.shape)
    return zero.at[...].set(array) if zero.dtype == array.dtype else array
