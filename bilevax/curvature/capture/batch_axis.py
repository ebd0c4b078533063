"""Where the examples are: the axis of each intermediate array that counts them, followed through a traced program.

An axis is an int; `SHARED` for arrays that belong to no example (weights, constants, statistics of a batch); a `Lost`
for arrays that do depend on the examples but keep them along no axis; a `Spread` for examples along several axes, or in
slots. An axis that was merged with others still counts as long as the examples are its leading factor: [N, T] -> [NT].

An array that has no derivative in y, such as an input, an index or a mask, is a constant of the model: it does not
spoil the axis of what it meets, wherever its own examples are.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from bilevax.curvature.capture.indices import counted, own_rows
from bilevax.curvature.capture.places import (
    PAIRS,
    SELECTS,
    SHARED,
    SMOOTH,
    Axis,
    Lost,
    Place,
    Spread,
    axes_of,
    kinds_of,
    literal_kind,
    lost,
    of_dtype,
)
from bilevax.curvature.capture.programs import at_once, body, opened, scan_counts, unsharded

COLLECTIVES = ("psum", "pmax", "pmin")  # over a mapped axis, once it has a place in the shape
REDUCTIONS = ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum")
CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev")


# Single axes


def _dot(eqn: Any, axes: Sequence[Axis]) -> Axis:
    # The result has the batched axes first, then the free axes of the left operand, then those of the right. N = 5:
    #   a w, [5, 3, 4] · [4, 2] -> [5, 3, 2]: axis 0 -> 0;    wᵀ aᵀ, [4, 2] · [5, 3, 4] -> [2, 5, 3]: 0 -> 1
    #   q kᵀ of attention, twice [5, 3, 2, 4], axes 0 and 2 batched -> [5, 2, 3, 3]: both operands say 0 -> 0
    #   a aᵀ, [5, 3] · [3, 5] -> [5, 5]: 0 and 1, LOST;       aᵀ a -> [3, 3]: summed over the examples, SHARED
    (contracted, batched), found = eqn.params["dimension_numbers"], set()
    before = len(batched[0])
    for side, axis in enumerate(axes):
        rank = eqn.invars[side].aval.ndim
        free = [a for a in range(rank) if a not in contracted[side] and a not in batched[side]]
        if axis in batched[side]:
            found.add(batched[side].index(axis))
        elif axis in free:
            found.add(before + free.index(axis))
        before += len(free)
    return SHARED if not found else found.pop() if len(found) == 1 else lost(eqn, remedy=PAIRS)


def _gather(eqn: Any, axes: Sequence[Any]) -> Axis:
    # Each axis of the result numbers the indices (`rows`), or runs along the slices (`offset_dims`). N = 5:
    #   a table [7, 4] at ids [5, 3, 1] -> [5, 3, 4]: rows [0, 1], offset_dims (2,); axis 0 of the ids -> 0
    #   a [5, 6, 4] at [:, ids], ids [3, 1] -> [5, 3, 4]: rows [1], offset_dims (0, 2) for the axes 0, 2 of a that are
    #   kept; axis 0 of a -> 0, since a slice holds all of it
    numbers, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    operand, indices = axes
    rows = [axis for axis in range(out.ndim) if axis not in numbers.offset_dims]
    if indices is not SHARED:
        return rows[indices] if indices < len(rows) else lost(eqn)
    if operand in numbers.operand_batching_dims:
        return rows[numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(operand)]]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(eqn.invars[0].aval.ndim) if axis not in gone]
    if operand not in kept or eqn.params["slice_sizes"][operand] != eqn.invars[0].aval.shape[operand]:
        return lost(eqn)
    return numbers.offset_dims[kept.index(operand)]


def _reshape(eqn: Any, axis: int, n: int) -> Axis:
    # Where as many elements lie before, and the examples are the leading factor of the axis. N = 5:
    #   [5, 3, 4] -> [15, 4]: 0 -> 0, and back 0 -> 0;    [5, 4] -> [1, 5, 4]: 0 -> 1;    [3, 5, 4] -> [3, 20]: 1 -> 1
    #   [3, 5, 4] -> [15, 4]: lost, since the 3 leads;    [10, 4] -> [2, 5, 4]: the 10 was 5 · 2, lost; of N = 10 two
    #   microbatches
    shape, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params["dimensions"] is not None:
        return lost(eqn)
    before = math.prod(shape[:axis])
    for place, size in enumerate(new):
        if math.prod(new[:place]) == before and size % n == 0 and size:
            return place
    parts = _block(new, before, n)
    return lost(eqn) if parts is None else Spread(parts, ordered=True, otherwise=lost(eqn))


def _block(shape: Sequence[int], before: int, size: int) -> tuple[int, ...] | None:
    """Neighbouring axes with `size` elements together, behind axes with `before` elements."""
    for first in range(len(shape)):
        if math.prod(shape[:first]) == before and shape[first] > 1:
            for last in range(first, len(shape)):
                if math.prod(shape[first : last + 1]) == size:
                    return tuple(range(first, last + 1))
    return None


def _one(eqn: Any, axes: Sequence[Axis], n: int) -> Axis:
    """The axis of a single result, from ints and SHARED."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if name == "dot_general":
        return _dot(eqn, axes)
    if name == "gather":
        return _gather(eqn, axes)
    held: list[Any] = [(var.aval, axis) for var, axis in zip(eqn.invars, axes, strict=True) if axis is not SHARED]
    aval, axis = held[0]
    if name == "reshape":
        return _reshape(eqn, axis, n)
    if name == "transpose":
        return tuple(eqn.params["permutation"]).index(axis)
    if name == "broadcast_in_dim":
        place = eqn.params["broadcast_dimensions"][axis]
        return int(place) if out.shape[place] == aval.shape[axis] else lost(eqn)
    if name == "squeeze":
        gone = [d % aval.ndim for d in eqn.params["dimensions"]]
        return lost(eqn) if axis in gone else axis - sum(d < axis for d in gone)
    if name in REDUCTIONS:
        return _reduced(axis, eqn.params["axes"])
    if name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        return numbers.out_spec[0] if axes[1] is SHARED and axis == numbers.lhs_spec[0] else lost(eqn)
    if name == "stack":
        place = eqn.params.get("axis", 0)
        return axis + (place <= axis) if len({axis for _, axis in held}) == 1 else lost(eqn)
    return lost(eqn) if axis in _crossed(eqn, aval.ndim) else _alike(eqn, held, out)


def _reduced(axis: int, gone: Sequence[int]) -> int | None:
    return SHARED if axis in gone else axis - sum(d < axis for d in gone)


def _summed(eqn: Any, axis: Axis, gone: Sequence[int]) -> Axis:
    """The axis of what a collective sums over these axes, or the axes."""
    found = [_reduced(a, gone) for a in axes_of(axis)]
    left = tuple(a for a in found if a is not None)
    if isinstance(axis, Spread) and left:
        return axis._replace(axes=left, partial=axis.partial or len(left) < len(found)) if axis.ordered else lost(eqn)
    return axis if isinstance(axis, Lost) else left[0] if left else SHARED


def _crossed(eqn: Any, rank: int) -> list[int]:
    """Axes along which an equation mixes or moves elements without a change of shape."""
    if eqn.primitive.name == "pad":
        return [axis for axis, config in enumerate(eqn.params["padding_config"]) if config != (0, 0, 0)]
    found = next((eqn.params[name] for name in ("dimensions", "dimension", "axis", "axes") if name in eqn.params), ())
    return [a % rank for a in (found if isinstance(found, tuple | list) else (found,)) if isinstance(a, int)]


def _alike(eqn: Any, held: Sequence[tuple[Any, int]], out: Any) -> Axis:
    """The axis of a result that is shaped like what it came from."""
    found = {axis for aval, axis in held if aval.ndim == out.ndim and aval.shape[axis] == out.shape[axis]}
    alike = len(found) == 1 and all(aval.ndim == out.ndim for aval, _ in held)
    return found.pop() if alike else lost(eqn)


# Several axes


def _several(eqn: Any, axes: Sequence[Axis], n: int) -> Axis:
    """The axes of a single result where the examples of an operand lie along several."""
    # Microbatches [4, 3, 7] of N = 12, axes (0, 1): each axis is followed as if it were alone, transposed [3, 4, 7] has
    # (1, 0). [4, 3, 7] -> [12, 7] has them on one again.
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    spread: Any = next(axis for axis in axes if isinstance(axis, Spread))
    side, elsewhere = list(axes).index(spread), lost(eqn) if spread.ordered else spread.otherwise
    shape = eqn.invars[side].aval.shape
    sizes = [shape[axis] for axis in spread.axes]
    if any(isinstance(axis, Spread) and len(axis.axes) != len(sizes) for axis in axes):
        return elsewhere
    if name == "reshape" and eqn.params["dimensions"] is None:
        return _regrouped(eqn, spread, shape, out.shape, n)
    if name == "slice" and not spread.ordered:
        return spread._replace(push=None)
    if name == "concatenate" and not spread.ordered and eqn.params["dimension"] in spread.axes:
        alike = all(isinstance(axis, Spread) and axis.axes == spread.axes for axis in axes)
        return spread._replace(moves=spread.moves + 1, push=None) if alike else elsewhere
    if name == "squeeze" and not spread.ordered:
        gone = [d % len(shape) for d in eqn.params["dimensions"]]
        left = tuple(a - sum(d < a for d in gone) for a in spread.axes if a not in gone)
        return spread._replace(axes=left, push=spread.push if len(left) == len(sizes) else None)
    ints = [axis if isinstance(axis, int) else SHARED for axis in axes]
    picked = eqn.params["dimension_numbers"].collapsed_slice_dims if name == "gather" and side == 0 else ()
    if set(spread.axes) <= set(picked) and ints[1] is not SHARED:
        return _one(eqn, ints, n)  # what examples take from the slots
    found: list[Axis] = []
    for k, size in enumerate(sizes):
        alone = [axis.axes[k] if isinstance(axis, Spread) else SHARED for axis in axes]
        found.append(_one(eqn, alone, size))
    places = [axis for axis in found if isinstance(axis, int)]
    if any(axis is not SHARED for axis in ints):
        # x + y of slots in the order of the examples; an example that takes from the slots; a statistic, or one example
        together = name != "dot_general" and tuple(places) == tuple({axis for axis in ints if axis is not SHARED})
        summed = name == "dot_general" and all(axis is SHARED for axis in found)
        return _one(eqn, ints, n) if together or summed or elsewhere is SHARED or math.prod(sizes) == 1 else elsewhere
    if all(axis is SHARED for axis in found):
        return SHARED
    if spread.ordered and None in found and name in REDUCTIONS:
        return spread._replace(axes=tuple(places), partial=True)
    if len(places) < len(found) or [out.shape[a] for a in places] != sizes:
        return elsewhere
    return spread._replace(axes=tuple(places))


def _whole(axes: Sequence[Axis]) -> list[Axis]:
    """The axes where statistics of parts of the batch belong to none, if they meet examples."""
    partial = [isinstance(axis, Spread) and axis.partial for axis in axes]
    meet = any(axes_of(axis) and not part for axis, part in zip(axes, partial, strict=True))
    return [SHARED if part and meet else axis for axis, part in zip(axes, partial, strict=True)]


def _regrouped(eqn: Any, spread: Spread, shape: Sequence[int], new: Sequence[int], n: int) -> Axis:
    """Axes that are merged or split, together with nothing else."""
    elsewhere = lost(eqn) if spread.ordered else spread.otherwise
    n = math.prod(shape[a] for a in spread.axes) if spread.partial else n
    first, count = min(spread.axes, default=0), math.prod(shape[a] for a in spread.axes)
    if spread.axes != tuple(range(first, first + len(spread.axes))) or count == 1:
        return elsewhere
    before = math.prod(shape[:first])
    parts = _block(new, before, count)
    if parts is None and spread.ordered:  # together with positions behind them, [2, 5, 3, 4] -> [30, 4]
        merged = [p for p, size in enumerate(new) if math.prod(new[:p]) == before and size % n == 0 and size]
        return merged[0] if merged and not spread.partial else elsewhere
    if parts is None:
        return elsewhere
    return (
        parts[0]
        if spread.ordered and len(parts) == 1 and not spread.partial
        else spread._replace(axes=parts, push=None)
    )


def selection(eqn: Any, places: Sequence[Place]) -> tuple[int, tuple[int, ...]] | None:
    """The operand whose examples an equation puts into slots, and the axes of these; None for any other equation."""
    # a [6, 4] at ids [3, 2, 1], which belong to no example -> [3, 2, 4]: slots (0, 1). Its reverse: slots (0,).
    # einsum("sec,sd->ecd", send, a) of zeros and ones [6, 3, 2]: slots (0, 1) of [3, 2, 4]. zeros [6, 4] to which rows
    # of a are added at ids: slots (0,)
    name = eqn.primitive.name
    if name == "gather":
        numbers, (operand, ids) = eqn.params["dimension_numbers"], places
        axes = axes_of(operand.axis)
        if not axes or not set(axes) <= set(numbers.collapsed_slice_dims) or isinstance(ids.axis, int):
            return None
        return 0, tuple(a for a in range(eqn.outvars[0].aval.ndim) if a not in numbers.offset_dims)
    if name == "slice" and isinstance(places[0].axis, int):
        axis = places[0].axis
        return (0, (axis,)) if eqn.outvars[0].aval.shape[axis] != eqn.invars[0].aval.shape[axis] else None
    if name == "rev":
        axes = axes_of(places[0].axis)
        return (0, axes) if set(axes) & set(eqn.params["dimensions"]) and places[0].kind == SMOOTH else None
    if name in ("scatter", "scatter-add"):
        numbers, axes = eqn.params["dimension_numbers"], axes_of(places[2].axis)
        chosen = tuple(numbers.inserted_window_dims)
        inside = any(axis in numbers.update_window_dims for axis in axes)
        return (2, chosen) if places[0].axis is SHARED and axes and chosen and not inside else None
    if name != "dot_general" or eqn.params["dimension_numbers"][1][0]:
        return None
    contracted, _ = eqn.params["dimension_numbers"]
    free = [var.aval.ndim - len(contracted[k]) for k, var in enumerate(eqn.invars)]
    for side in (0, 1):
        send, axes = places[side], axes_of(places[1 - side].axis)
        theirs = {contracted[side][contracted[1 - side].index(a)] for a in axes if a in contracted[1 - side]}
        meets = axes and len(theirs) == len(axes) and set(axes_of(send.axis)) <= theirs
        if send.kind == SELECTS and meets and free[side]:
            first = side * free[0]
            return 1 - side, tuple(range(first, first + free[side]))
    return None


# Loops


def _inside(axis: Axis, eqn: Any) -> Axis:
    """The axis of a slice of what a scan slices."""
    if isinstance(axis, int):
        return axis - 1 if axis else lost(eqn, "which passes something on from one example to the next")
    if isinstance(axis, Spread):
        left = tuple(a - 1 for a in axis.axes)
        return axis._replace(axes=left) if min(left, default=0) >= 0 else lost(eqn)
    return axis


def _outside(axis: Axis, eqn: Any) -> Axis:
    """The axis of what a scan stacks, and of what it made in slots."""
    if isinstance(axis, int):
        return axis + 1
    if isinstance(axis, Spread):
        return axis._replace(axes=tuple(a + 1 for a in axis.axes)) if axis.ordered else lost(eqn)
    return axis


def scan_places(eqn: Any, places: Sequence[Place], n: int) -> tuple[list[Place], list[Place]]:
    """The places of what goes into the body of a scan, and of its results."""
    consts, carries = scan_counts(eqn)
    jaxpr, _ = opened(eqn.params["jaxpr"])
    last = consts + carries
    inside = [*places[:last], *(p._replace(axis=_inside(p.axis, eqn), counts=()) for p in places[last:])]
    # Axes of carries may show only after an iteration: from zeros h [5, 2], SHARED, and slices a [5, 4] of [3, 5, 4]
    # (axis 1, inside 0), h + a w has the axis 0. It is read again until nothing changes: each time but the last moves a
    # carry from SHARED to an axis, or from there to lost, gives it a derivative or a sum, or forgets what it counts.
    for _ in range(6 * carries + 1):
        outside = follow(jaxpr, inside, n)
        carried = [_join(a, b, eqn) for a, b in zip(inside[consts:last], outside, strict=False)]
        if carried == inside[consts:last]:
            break
        inside[consts:last] = carried
    stacked = [p._replace(axis=_outside(p.axis, eqn), counts=()) for p in outside[carries:]]
    return inside, [*carried, *stacked]


def _join(before: Place, after: Place, eqn: Any) -> Place:
    counts = before.counts if before.counts == after.counts else ()
    place = Place(SHARED, min(before.kind, after.kind), before.summed or after.summed, counts)
    if before.axis is SHARED or before.axis == after.axis:
        return place._replace(axis=after.axis)
    if after.axis is SHARED or isinstance(before.axis, Lost):
        return place._replace(axis=before.axis)
    return place._replace(axis=after.axis if isinstance(after.axis, Lost) else lost(eqn))


# Programs


def result_places(eqn: Any, places: Sequence[Place], n: int) -> list[Place]:
    """The places of the results of one equation, from those of its operands; n examples."""
    name = eqn.primitive.name
    kinds = kinds_of(eqn, [place.kind for place in places])
    if (inner := body(eqn)) is not None:
        results = [by_line(place, eqn) for place in follow(inner[0], places, n)]
        if name.startswith("custom") and any(place.kind == SMOOTH for place in places):  # with a derivative of its own
            return [
                p._replace(kind=of_dtype(var.aval.dtype, SMOOTH)) for p, var in zip(results, eqn.outvars, strict=True)
            ]
        return results
    if (program := unsharded(eqn)) is not None:
        return follow(program[0], places, n)
    if name == "scan":
        if (program := at_once(eqn, [place.axis for place in places])) is not None:
            return follow(program[0], places, n)
        return scan_places(eqn, places, n)[1]
    if name == "cond":
        branches = [follow(opened(branch)[0], places[1:], n) for branch in eqn.params["branches"]]
        return [_same(eqn, branch) for branch in zip(*branches, strict=True)]
    own = own_rows(eqn, places)
    axes = _axes(eqn, places, n) if own is SHARED else [own]
    counts = counted(eqn, places)
    return [
        Place(axis, kind, _summed_by(eqn, places, axis, kind), counts) for axis, kind in zip(axes, kinds, strict=True)
    ]


def _summed_by(eqn: Any, places: Sequence[Place], axis: Axis, kind: int) -> Lost | None:
    """The first equation on the way to a result that summed over the examples, if it holds no axis of them."""
    if axis is not SHARED or kind != SMOOTH:
        return None
    held = any(axes_of(place.axis) and place.kind == SMOOTH for place in places)
    return next((place.summed for place in places if place.summed), lost(eqn) if held else None)


def by_line(place: Place, eqn: Any) -> Place:
    """The place of what a call returns: an axis that was lost inside was lost at this line."""
    axis = place.axis.inside(eqn) if isinstance(place.axis, Lost) else place.axis
    return place._replace(axis=axis, summed=place.summed and place.summed.inside(eqn))


def _same(eqn: Any, branches: Sequence[Place]) -> Place:
    axes, kind = {place.axis for place in branches}, min(place.kind for place in branches)
    axis = axes.pop() if len(axes) == 1 else lost(eqn, "whose branches keep them elsewhere")
    return Place(axis, kind, next((place.summed for place in branches if place.summed), None))


def _axes(eqn: Any, places: Sequence[Place], n: int) -> list[Axis]:
    """The axes of the results of one equation that calls nothing."""
    axes = [place.axis for place in places]
    if eqn.primitive.name in CUMULATIVE and places[0].kind != SMOOTH and not isinstance(axes[0], Spread):
        return axes  # numbers that belong to their rows, wherever they come from
    if (chosen := selection(eqn, places)) is not None:
        data, slots = axes[chosen[0]], chosen[1]
        moves = data.moves + 1 if isinstance(data, Spread) and not data.ordered else 1
        summed = eqn.primitive.name == "dot_general"
        return [Spread(slots, ordered=False, otherwise=SHARED if summed else lost(eqn), moves=moves)]
    smooth = [place.axis for place in places if place.kind == SMOOTH and place.axis is not SHARED]
    if smooth:  # what has no derivative is a constant, if its examples cannot be followed
        axes = [SHARED if place.kind != SMOOTH and isinstance(place.axis, Lost) else place.axis for place in places]
    found = _followed(eqn, axes, n)
    if smooth and len(smooth) < len(axes) and any(isinstance(axis, Lost) for axis in found):
        alone = [place.axis if place.kind == SMOOTH else SHARED for place in places]  # or if they lie elsewhere
        return _followed(eqn, alone, n)
    return found


def _followed(eqn: Any, axes: Sequence[Axis], n: int) -> list[Axis]:
    name, results = eqn.primitive.name, eqn.outvars
    if all(axis is SHARED for axis in axes):
        return [SHARED] * len(results)
    if name in COLLECTIVES:
        gone = [axis for axis in eqn.params["axes"] if isinstance(axis, int)]
        if eqn.params.get("axis_index_groups") is not None:
            return [lost(eqn)] * len(results)
        return [_summed(eqn, axis, gone) for axis in axes]
    if name in ("while", "sort") or len(results) != 1:
        held: list[Any] = [(var.aval, a) for var, a in zip(eqn.invars, axes, strict=True) if a is not SHARED]
        if any(not isinstance(a, int) or a in _crossed(eqn, aval.ndim) for aval, a in held):
            return [next((a for _, a in held if isinstance(a, Lost)), lost(eqn))] * len(results)
        return [_alike(eqn, held, out.aval) for out in results]
    if any(isinstance(axis, Lost) for axis in axes):
        return [next(axis for axis in axes if isinstance(axis, Lost))]
    if any(isinstance(axis, Spread) for axis in axes):
        axes = _whole(axes)
        several = any(isinstance(axis, Spread) for axis in axes)
        return [_several(eqn, axes, n) if several else _one(eqn, axes, n)]
    return [_one(eqn, axes, n)]


def follow(jaxpr: Any, places: Sequence[Place], n: int) -> list[Place]:
    """The places of the results of a program, from those of its arguments."""
    known = dict(zip(jaxpr.invars, places, strict=True))

    def read(var: Any) -> Place:
        return Place(SHARED, literal_kind(var.val)) if isinstance(var, core.Literal) else known.get(var, Place())

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, result_places(eqn, [read(var) for var in eqn.invars], n), strict=True))
    return [read(var) for var in jaxpr.outvars]
