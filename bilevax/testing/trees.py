"""Comparisons of pytrees: their forms, and their numbers."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.typing import PyTree

WHAT_IS_WRITTEN = (
    "Keep arrays alone, in NamedTuples, tuples, lists and dicts with strings for keys; no key but its data."
)
WHAT_THEY_FIND = (
    "Cast what is of two dtypes (.astype), give arrays one rank (leaf[None]), keep no tracer, and report None, which "
    "is no leaf, or 0 for what was not measured: NaN and infinity stop jax.debug_nans and jax.debug_infs."
)


def same_form(name: str, got: PyTree, like: str, expected: PyTree, weak: bool = False) -> None:
    """Raises AssertionError unless structures, shapes, dtypes and, with `weak`, weak types agree."""
    _same_structure(name, got, like, expected)
    for where, leaf, other in zip(_paths(got), jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        has, wants = _form(leaf, weak), _form(other, weak)
        truth(has == wants, f"{name}{where} is {has}, and {like}{where} {wants}")


def _form(leaf: Any, weak: bool) -> str:
    """Dtype and shape, such as `float32[3, 2]`; and whether the dtype is weak, which costs another trace."""
    of = jax.typeof(leaf)
    own = isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))  # with x64 off, the type of a double is single
    dtype = leaf.dtype if own else of.dtype
    return f"{'weakly typed ' if weak and of.weak_type else ''}{dtype}{list(of.shape)}"


def _same_structure(name: str, got: PyTree, like: str, expected: PyTree) -> None:
    """Raises AssertionError at the first leaf that one of the two lacks, or where containers are of another kind."""
    kinds: Any = [jax.tree.structure(tree) for tree in (got, expected)]
    if kinds[0] == kinds[1]:
        return
    mine, theirs = _paths(got), _paths(expected)
    for one, paths, other, others in ((name, mine, like, theirs), (like, theirs, name, mine)):
        for path in paths:
            truth(path in others, f"{one}{path} is a leaf, and {other} has none there")
    raise AssertionError(f"{name} is {kinds[0]}, and {like} is {kinds[1]}")


def _paths(tree: PyTree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def close(name: str, got: PyTree, expected: PyTree, rtol: float = 1e-10, atol: float | None = None) -> None:
    """Raises AssertionError unless structures agree, and numbers up to rtol, relative and (without atol) absolute."""
    structures = [str(jax.tree.structure(tree)) for tree in (got, expected)]
    truth(structures[0] == structures[1], f"{name} is {structures[0]}; {structures[1]} is meant")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        where = f"{name}{jax.tree_util.keystr(path)}"
        _close(where, np.asarray(a, float), np.asarray(b, float), rtol, rtol if atol is None else atol)


def _close(name: str, got: np.ndarray, expected: np.ndarray, rtol: float, atol: float) -> None:
    """In one line: how far two arrays are apart, and where that is most."""
    truth(got.shape == expected.shape, f"{name} has shape {got.shape}, expected {expected.shape}")
    wrong = ~np.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return
    with np.errstate(invalid="ignore", divide="ignore"):
        off = np.where(wrong, np.nan_to_num(np.abs(got - expected), nan=np.inf), -1.0)
        at = np.unravel_index(np.argmax(off), off.shape)
        share = 100 * off[at] / np.abs(expected[at])
    percent = f" ({share:.3g} %)" if np.isfinite(share) else ""
    pair = f"{got[at]:.6g}, expected {expected[at]:.6g}"
    raise AssertionError(f"{name} differs by up to {off[at]:.3g}{percent}{_at(at)}: {pair}")


def _at(index: Sequence[Any]) -> str:
    """Such as ` at [1, 0]`; nothing for a scalar."""
    return f" at [{', '.join(map(str, index))}]" if len(index) else ""


def differ(name: str, one: PyTree, other: PyTree, rtol: float = 1e-6) -> None:
    """Raises AssertionError if all numbers agree up to rtol."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    if all(np.allclose(a, b, rtol=rtol, atol=rtol, equal_nan=True) for a, b in pairs):
        raise AssertionError(f"{name} is {short(jax.tree.leaves(one)[0])} both times")


def scalars(name: str, tree: PyTree) -> None:
    """Raises AssertionError unless every leaf is a scalar."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.ndim(leaf):
            raise AssertionError(f"{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; one number is meant")


def finite(name: str, tree: PyTree) -> None:
    """Raises AssertionError if any number is not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        wrong = ~np.isfinite(np.asarray(leaf, float))
        if wrong.any():
            raise AssertionError(f"{name}{jax.tree_util.keystr(path)} is not finite{_at(np.argwhere(wrong)[0])}")


def writable(name: str, tree: Any) -> None:
    """Raises AssertionError unless a tree is arrays in tuples, lists and dicts: what all libraries write and read."""
    if isinstance(tree, tuple | list):
        names = getattr(tree, "_fields", None) or range(len(tree))
        for part, child in zip(names, tree, strict=True):
            writable(f"{name}.{part}" if isinstance(part, str) else f"{name}[{part}]", child)
    elif isinstance(tree, dict):
        for key, child in tree.items():
            truth(isinstance(key, str), f"{name} has the key {key!r}; a string is meant")
            writable(f"{name}[{key!r}]", child)
    elif tree is not None:
        truth(isinstance(tree, jax.Array), f"{name} is a {type(tree).__name__}; an array is meant")
        truth(not jnp.issubdtype(tree.dtype, jax.dtypes.prng_key), f"{name} is a key; jax.random.key_data is meant")


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """JAX promotes no dtype and no rank by itself, and looks for tracers that leave their trace."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.checking_leaks():
        yield


def short(numbers: PyTree) -> str:
    """An array by its first three numbers, such as `[0, 0.5, 1, …]`."""
    array = np.asarray(numbers, float)
    first = [f"{number:.6g}" for number in array.ravel()[:3]]
    return f"[{', '.join(first + ['…'] * (array.size > 3))}]" if array.ndim else first[0]


def truth(condition: Any, seen: str) -> None:
    """Raises AssertionError with what was seen unless the condition holds."""
    if not condition:
        raise AssertionError(seen)
