"""Comparisons of pytrees: their forms, and their numbers."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def form(tree: chex.ArrayTree) -> tuple[Any, list]:
    """The structure of a pytree, and the shape and dtype of each leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def same_form(name: str, got: chex.ArrayTree, like: str, expected: chex.ArrayTree) -> None:
    """Raises AssertionError unless structures, shapes and dtypes agree."""
    has, wants = form(got), form(expected)
    if has[0] != wants[0]:
        raise AssertionError(f"{name} is {has[0]}, and {like} is {wants[0]}")
    for (path, _), mine, theirs in zip(jax.tree_util.tree_leaves_with_path(got), has[1], wants[1], strict=True):
        if mine != theirs:
            where = jax.tree_util.keystr(path)
            raise AssertionError(f"{name}{where} is {mine[1]}{list(mine[0])}, and {like} {theirs[1]}{list(theirs[0])}")


def close(
    name: str, got: chex.ArrayTree, expected: chex.ArrayTree, rtol: float = 1e-10, atol: float | None = None
) -> None:
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
    where = f" at [{', '.join(map(str, at))}]" if at else ""
    pair = f"{got[at]:.6g}, expected {expected[at]:.6g}"
    raise AssertionError(f"{name} differs by up to {off[at]:.3g}{percent}{where}: {pair}")


def differ(name: str, one: chex.ArrayTree, other: chex.ArrayTree, rtol: float = 1e-6) -> None:
    """Raises AssertionError if all numbers agree up to rtol."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    if all(np.allclose(a, b, rtol=rtol, atol=rtol, equal_nan=True) for a, b in pairs):
        raise AssertionError(f"{name} is {jax.tree.leaves(one)[0]} both times")


def scalars(name: str, tree: chex.ArrayTree) -> None:
    """Raises AssertionError unless every leaf is a scalar."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.ndim(leaf):
            raise AssertionError(f"{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; one number is meant")


def finite(name: str, tree: chex.ArrayTree) -> None:
    """Raises AssertionError if any number is not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not np.isfinite(np.asarray(leaf, float)).all():
            raise AssertionError(f"{name}{jax.tree_util.keystr(path)} is {leaf}")


def truth(condition: Any, seen: str) -> None:
    """Raises AssertionError with what was seen unless the condition holds."""
    if not condition:
        raise AssertionError(seen)
