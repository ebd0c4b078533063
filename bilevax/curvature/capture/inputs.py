"""Which arrays among the inputs of a model hold the examples, and along which axis."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.typing import PyTree

Examples = Callable[[PyTree], PyTree]  # inputs -> axes, or a prefix of them


class Rows(NamedTuple):
    """The axis of each leaf of the inputs that counts the examples, None where all share it; and what is in doubt."""

    axes: Sequence[int | None]
    doubt: str


def where(inputs: PyTree, n: int, examples: Examples | None) -> Rows:
    """The axes of the n examples, as `examples` says them; the first ones of length n where it says nothing."""
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/") or "inputs", jnp.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(inputs)
    ]
    if examples is not None:
        return Rows(_said(inputs, n, examples, named), "")
    axes = [0 if shape[:1] == (n,) else None for _, shape in named]
    if all(axis is None for axis in axes):
        raise ValueError(
            f"inputs must hold the examples of the outputs [N, ..., C] along the first axis of an array; got outputs "
            f"with {n} rows and no array with {n} rows. Return outputs with one row for each example, or say where the "
            f"examples are: ModelLoss(..., examples=lambda inputs: 1)."
        )
    taken = ", ".join(f"{name} {list(shape)}" for (name, shape), axis in zip(named, axes, strict=True) if axis == 0)
    twice = any(n in (shape if axis is None else shape[1:]) for (_, shape), axis in zip(named, axes, strict=True))
    doubt = (
        f"Taken for examples, by a first axis of N = {n}: {taken}. An array that all share is passed as mask[None], or "
        f"named by ModelLoss(..., examples=lambda inputs: ...)."
    )
    return Rows(axes, doubt if twice else "")


def _said(inputs: PyTree, n: int, examples: Examples, named: Sequence[tuple[str, Any]]) -> list[int | None]:
    checks.function("examples", examples, "inputs")
    prefix = jax.tree.map(lambda axis: "all" if axis is None else axis, examples(inputs), is_leaf=lambda a: a is None)
    try:
        axes = jax.tree.leaves(jax.tree.broadcast(prefix, inputs))
    except ValueError as error:
        raise ValueError(
            f"examples must return an axis for each array of the inputs, or for a part of them, and None for what all "
            f"share; got {examples(inputs)!r:.80} for inputs {jax.tree.structure(inputs)}. Return, say, 0."
        ) from error
    for axis, (name, shape) in zip(axes, named, strict=True):
        fits = isinstance(axis, int) and not isinstance(axis, bool) and -len(shape) <= axis < len(shape)
        if axis != "all" and not (fits and shape[axis] == n):
            raise ValueError(
                f"examples must return an axis of {name} with the {n} rows of the outputs, or None; got {axis!r} for "
                f"shape {shape}. Return the axis that counts the examples."
            )
    if all(axis == "all" for axis in axes):
        raise ValueError("examples must return the axis of at least one array; got None for all. Return, say, 0.")
    return [None if axis == "all" else axis % len(shape) for axis, (_, shape) in zip(axes, named, strict=True)]
