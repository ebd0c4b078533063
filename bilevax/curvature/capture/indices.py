"""Indices by which each example reads or writes its own row alone, as in p[jnp.arange(N), ids]: its axis stays.

They are recognised by their numbers: an index array that is 0, 1, 2, ... along an axis, beside others that say where in
the row.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bilevax.curvature.capture.places import NEVER, SHARED, Place

Counts = tuple[int | None, ...]


def counted(eqn: Any, places: Sequence[Place]) -> Counts:
    """What the single result of an equation counts, from what its operands do."""
    # jnp.arange(5)[:, None] beside ids [5, 2], as JAX writes it: i = iota [5], (0,) -> [5, 1], (0,); i < 0 is NEVER, so
    # that where(i < 0, i + 5, i) is i; -> [5, 2], (0,) -> [5, 2, 1], (0,), and joined with the ids [5, 2, 2], (0, None)
    name, params = eqn.primitive.name, eqn.params
    if name == "iota":
        return (params["dimension"],)
    if not any(place.counts for place in places):
        return ()
    first = places[0].counts
    if name == "concatenate":
        last = params["dimension"] == len(eqn.outvars[0].aval.shape) - 1
        columns = last and all(var.aval.shape[-1] == 1 for var in eqn.invars)
        return tuple(p.counts[0] if p.counts else None for p in places) if columns else ()
    if name == "select_n":
        return places[1].counts if first == (NEVER,) else ()
    if len(first) != 1 or first[0] is None:
        return ()
    if name in ("convert_element_type", "copy"):
        return first if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer) or first == (NEVER,) else ()
    if name == "lt":
        bound = eqn.invars[1]
        return (NEVER,) if isinstance(bound, core.Literal) and np.ndim(bound.val) == 0 and bound.val <= 0 else ()
    if name not in ("broadcast_in_dim", "reshape", "squeeze"):
        return ()
    return first if first == (NEVER,) else _moved(eqn, first[0])


def _moved(eqn: Any, axis: int) -> Counts:
    """The axis of what was broadcast, or reshaped by axes of length 1."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.primitive.name == "broadcast_in_dim":
        place = eqn.params["broadcast_dimensions"][axis]
        return (place,) if new[place] == old[axis] else ()
    wide = [k for k, size in enumerate(new) if size > 1]
    if old[axis] == 1 or [size for size in old if size > 1] != [new[k] for k in wide]:
        return ()
    return (wide[sum(size > 1 for size in old[:axis])],)


def counted_by(array: Any) -> Counts:
    """What an array of known numbers counts."""
    if isinstance(array, jax.core.Tracer) or not 0 < jnp.size(array) <= 2**20:
        return ()
    if array.dtype == bool:
        return () if np.any(array) else (NEVER,)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        return ()
    axes = (a for a in range(np.ndim(array)) if np.shape(array)[a] > 1)
    return tuple(a for a in axes if np.array_equal(array, np.indices(array.shape, sparse=True)[a] + 0 * array))[:1]


def own_rows(eqn: Any, places: Sequence[Place]) -> int | None:
    """The axis of the examples where each takes from its own row, or writes there; None for any other equation."""
    # p [5, 3] at [arange(5)[:, None], ids], indices [5, 2, 2] -> [5, 2]: axis 0. Rows [5, 2] into zeros [5, 3]: axis 0
    name = eqn.primitive.name
    if not name.startswith(("gather", "scatter")) or len(eqn.outvars) != 1:
        return SHARED
    numbers, shapes = eqn.params["dimension_numbers"], [var.aval.shape for var in eqn.invars]
    gathers = name == "gather"
    starts = numbers.start_index_map if gathers else numbers.scatter_dims_to_operand_dims
    batched = numbers.start_indices_batching_dims if gathers else numbers.scatter_indices_batching_dims
    gone = numbers.collapsed_slice_dims if gathers else numbers.inserted_window_dims
    columns = places[1].counts if len(places[1].counts) == len(starts) else ()
    pairs = [(start, row) for start, row in zip(starts, columns, strict=False) if start in gone and row is not None]
    pairs += zip(numbers.operand_batching_dims, batched, strict=True)
    for axis, row in pairs:
        if not 0 <= row < len(shapes[1]) - 1 or shapes[0][axis] != shapes[1][row]:
            continue
        shape = eqn.outvars[0].aval.shape if gathers else shapes[2]
        kept = numbers.offset_dims if gathers else numbers.update_window_dims
        there = [a for a in range(len(shape)) if a not in kept][row]
        wanted = (axis, row) if gathers else (axis, row, there)
        held = [place.axis for place in places]
        if any(a is not SHARED for a in held) and all(a in (SHARED, w) for a, w in zip(held, wanted, strict=True)):
            return there if gathers else axis
    return SHARED
