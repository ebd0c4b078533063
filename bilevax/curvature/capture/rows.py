"""How rows of examples, or of slots that hold them, lie in arrays, and what they weigh."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from bilevax.curvature.capture.places import Axis, Spread, axes_of
from bilevax.typing import Array

Window = Mapping[int, tuple[int, int]]
"""Axes of an array of which but a part is read: where it starts, and its size."""


class RowReaders(NamedTuple):
    """How rows of features lie in the arrays around a Kronecker use: functions to [*layers, N, positions, features]."""

    # einsum("ntd,dhe->nthe") of a [5, 7, 4] and w [4, 2, 3], a matrix [4, 6]: inputs [5, 7, 4] -> [5, 7, 4], outputs
    # [5, 7, 2, 3] -> [5, 7, 6]; on positions merged before, [35, 4] -> [5, 7, 4]; ids of rows of a table -> [5, 7, 1].
    # Three experts w [3, 4, 6] on one a [5, 4]: outputs [5, 3, 6] -> [3, 5, 1, 6], inputs [5, 1, 4], `same` = (True,)
    inputs: Callable[[Array], Array]
    outputs: Callable[[Array], Array]
    same: tuple[bool, ...] = ()  # for each axis of layers, whether all of them read the same inputs, without that axis
    weights: "Weigh | None" = None  # of rows that are slots, and not the examples in their order


class Weigh(Protocol):
    """Weights q [N] and a mask [N, T] or None of the examples to those of the rows, with leading axes of layers."""

    def __call__(self, q: Array, mask: Array | None, /) -> tuple[Array, Array | None]: ...


def rows_of(
    array: Array, axis: Axis, features: Sequence[int], n: int, layers: Sequence[int] = (), window: Window | None = None
) -> Array:
    """Rows [*layers, N, positions, features] of (a window of) an array with examples along `axis`, or slots."""
    # n = 5: [3, 5, 2, 4] with axis 1 and features (2, 3) -> transposed [5, 3, 2, 4] -> [5, 3, 8]; merged [15, 4] with
    # axis 0 -> [5, 3, 4]; with layers (2,) and features (3,) -> [2, 5, 3, 4]
    for place, (start, size) in (window or {}).items():
        array = jax.lax.slice_in_dim(array, start, start + size, axis=place)
    axes = [a for a in axes_of(axis) if a not in layers]
    others = [a for a in range(array.ndim) if a not in axes and a not in features and a not in layers]
    size = math.prod(array.shape[a] for a in features)
    rows = jnp.transpose(array, [*layers, *axes, *others, *features])
    return rows.reshape(*rows.shape[: len(layers)], slots_of(axis, array.shape, layers) or n, -1, size)


def slots_of(axis: Axis, shape: Sequence[int], layers: Sequence[int] = ()) -> int:
    """How many slots of an array hold examples for each layer; 0 where they lie in their order."""
    if not isinstance(axis, Spread) or axis.ordered:
        return 0
    return math.prod(shape[a] for a in axis.axes if a not in layers)


def weigh(axis: Axis, layers: Sequence[int | None], sizes: Sequence[int], positions: int) -> Weigh | None:
    """What rows weigh where examples lie in slots, some of which belong to each layer; None where they are in order."""
    if not isinstance(axis, Spread) or axis.ordered:
        return None
    slots: Any = axis

    def single(q: Array, mask: Array | None) -> Array:
        found = slots.push(q, mask)
        ours = [slots.axes.index(a) for a in layers if a in slots.axes]
        found = jnp.transpose(found, [*ours, *(k for k in range(found.ndim) if k not in ours)])
        thin = [size if a in slots.axes else 1 for a, size in zip(layers, sizes, strict=True)]
        found = found.reshape(*thin, -1)
        return jnp.broadcast_to(found, (*sizes, found.shape[-1]))

    def weights(q: Array, mask: Array | None) -> tuple[Array, Array | None]:
        if mask is None or positions == 1 or mask.shape[1] != positions:
            return single(q, mask), None
        found = jax.vmap(lambda column: single(q * column, None), 1, -1)(mask)  # positions that went with the examples
        return jnp.ones(found.shape[:-1], q.dtype), found

    return weights


def unpushed(axis: Axis) -> bool:
    """Whether an axis counts slots of which it is not known what goes there."""
    return isinstance(axis, Spread) and not axis.ordered and axis.push is None


def in_order(q: Array, mask: Array | None, sizes: Sequence[int]) -> Array:
    """Weights of examples, and of their positions where these are merged with them, in so many rows."""
    rows = math.prod(sizes) // len(q)
    positions = jnp.ones((len(q), rows), q.dtype)
    if mask is not None and mask.shape == positions.shape:
        positions = mask.astype(q.dtype)
    return (q[:, None] * positions).reshape(sizes)
