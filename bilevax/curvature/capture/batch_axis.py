"""Where the examples are: the axis of each intermediate array that counts them, followed through a traced program.

An axis is an int; `SHARED` for arrays that belong to no example (weights, constants, statistics of a batch), and `LOST`
for arrays that do depend on the examples but keep them along no axis. An axis that was merged with others still counts
as long as the examples are its leading factor: [N, T] -> [N T].
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core

SHARED = None
LOST = -1
Axis = int | None

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call")
CUSTOM = ("custom_vjp_call", "custom_vjp_call_jaxpr")
REDUCTIONS = ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum")


Program = tuple[Any, Sequence[Any]]
"""A jaxpr, in the form of this version of JAX, and its constants."""


def body(eqn: Any) -> Program | None:
    """The program that an equation calls once, with its constants; None where it calls none."""
    if eqn.primitive.name not in (*CALLS, *CUSTOM):
        return None
    inner = next(value for value in eqn.params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr"))
    return opened(inner)


def opened(jaxpr: Any) -> Program:
    """A program and its constants, however this version of JAX keeps them."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


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
        elif axis == LOST:
            found.add(LOST)
        before += len(free)
    return SHARED if not found else found.pop() if len(found) == 1 else LOST


def _gather(eqn: Any, axes: Sequence[Axis]) -> Axis:
    # Each axis of the result numbers the indices (`rows`), or runs along the slices (`offset_dims`). N = 5:
    #   a table [7, 4] at ids [5, 3, 1] -> [5, 3, 4]: rows [0, 1], offset_dims (2,); axis 0 of the ids -> 0
    #   a [5, 6, 4] at [:, ids], ids [3, 1] -> [5, 3, 4]: rows [1], offset_dims (0, 2) for the axes 0, 2 of a that are
    #   kept; axis 0 of a -> 0, since a slice holds all of it
    numbers, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    operand, indices = axes
    rows = [axis for axis in range(out.ndim) if axis not in numbers.offset_dims]
    if indices is not SHARED:
        return rows[indices] if indices < len(rows) and indices != LOST else LOST
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(eqn.invars[0].aval.ndim) if axis not in gone]
    if operand not in kept or eqn.params["slice_sizes"][operand] != eqn.invars[0].aval.shape[operand]:
        return LOST
    return numbers.offset_dims[kept.index(operand)]


def _reshape(shape: Sequence[int], axis: int, new: Sequence[int], n: int) -> Axis:
    # Where as many elements lie before, and the examples are the leading factor of the axis. N = 5:
    #   [5, 3, 4] -> [15, 4]: 0 -> 0, and back 0 -> 0;    [5, 4] -> [1, 5, 4]: 0 -> 1;    [3, 5, 4] -> [3, 20]: 1 -> 1
    #   [3, 5, 4] -> [15, 4]: LOST, since the 3 leads;    [10, 4] -> [2, 5, 4]: LOST, since the 10 was 5 · 2
    before = math.prod(shape[:axis])
    for place, size in enumerate(new):
        if math.prod(new[:place]) == before and size % n == 0 and size:
            return place
    return LOST


def _one(eqn: Any, axes: Sequence[Axis], n: int) -> Axis:
    """The axis of a single result."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if name == "dot_general":
        return _dot(eqn, axes)
    if name == "gather":
        return _gather(eqn, axes)
    held = [(var.aval, axis) for var, axis in zip(eqn.invars, axes, strict=True) if axis is not SHARED]
    aval, axis = held[0]
    if any(other == LOST for _, other in held):
        return LOST
    if name == "reshape":
        return LOST if eqn.params["dimensions"] is not None else _reshape(aval.shape, axis, out.shape, n)
    if name == "transpose":
        return tuple(eqn.params["permutation"]).index(axis)
    if name == "broadcast_in_dim":
        place = eqn.params["broadcast_dimensions"][axis]
        return place if out.shape[place] == aval.shape[axis] else LOST
    if name == "squeeze":
        gone = [d % aval.ndim for d in eqn.params["dimensions"]]
        return LOST if axis in gone else axis - sum(d < axis for d in gone)
    if name in REDUCTIONS:
        gone = eqn.params["axes"]
        return SHARED if axis in gone else axis - sum(d < axis for d in gone)
    if name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        return numbers.out_spec[0] if axes[1] is SHARED and axis == numbers.lhs_spec[0] else LOST
    if name == "stack":
        place = eqn.params.get("axis", 0)
        return axis + (place <= axis) if len({axis for _, axis in held}) == 1 else LOST
    return LOST if axis in _crossed(eqn, aval.ndim) else _alike(held, out)


def _crossed(eqn: Any, rank: int) -> list[int]:
    """Axes along which an equation mixes or moves elements without a change of shape."""
    if eqn.primitive.name == "pad":
        return [axis for axis, config in enumerate(eqn.params["padding_config"]) if config != (0, 0, 0)]
    found = next((eqn.params[name] for name in ("dimensions", "dimension", "axis", "axes") if name in eqn.params), ())
    return [a % rank for a in (found if isinstance(found, tuple | list) else (found,)) if isinstance(a, int)]


def _alike(held: Sequence[tuple[Any, int]], out: Any) -> Axis:
    """The axis of a result that is shaped like what it came from."""
    found = {axis for aval, axis in held if aval.ndim == out.ndim and aval.shape[axis] == out.shape[axis]}
    return found.pop() if len(found) == 1 and all(aval.ndim == out.ndim for aval, _ in held) else LOST


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many constants and carries a scan has: what it slices or stacks has one axis more outside."""
    inner, _ = opened(eqn.params["jaxpr"])
    carries = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, inner.outvars, strict=True))
    sliced = sum(a.aval.ndim != b.aval.ndim for a, b in zip(eqn.invars, inner.invars, strict=True))
    return len(eqn.invars) - carries - sliced, carries


def scan_axes(eqn: Any, axes: Sequence[Axis], n: int) -> tuple[list[Axis], list[Axis]]:
    """The axes of what goes into the body of a scan, and of its results."""
    consts, carries = scan_counts(eqn)
    jaxpr, _ = opened(eqn.params["jaxpr"])
    slices = [axis if axis in (SHARED, LOST) else axis - 1 for axis in axes[consts + carries :]]  # axis 0 becomes LOST
    inside = [*axes[: consts + carries], *slices]
    # Axes of carries may show only after an iteration: from zeros h [5, 2], SHARED, and slices a [5, 4] of [3, 5, 4]
    # (axis 1, inside 0), h + a w has the axis 0. It is read again until nothing changes: each time but the last moves a
    # carry from SHARED to an axis, or from there to LOST.
    for _ in range(2 * carries + 1):
        outside = follow(jaxpr, inside, n)
        carried = [_join(a, b) for a, b in zip(inside[consts : consts + carries], outside, strict=False)]
        if carried == inside[consts : consts + carries]:
            break
        inside[consts : consts + carries] = carried
    stacked = [axis if axis in (SHARED, LOST) else axis + 1 for axis in outside[carries:]]
    return inside, [*carried, *stacked]


def _join(before: Axis, after: Axis) -> Axis:
    if before is SHARED or before == after:
        return after
    return before if after is SHARED else LOST


def result_axes(eqn: Any, axes: Sequence[Axis], n: int) -> list[Axis]:
    """The axes of the results of one equation, from those of its operands; n examples."""
    if all(axis is SHARED for axis in axes):
        return [SHARED] * len(eqn.outvars)
    name = eqn.primitive.name
    if (inner := body(eqn)) is not None:
        return follow(inner[0], axes, n)
    if name == "scan":
        return scan_axes(eqn, axes, n)[1]
    if name == "cond":
        branches = [follow(opened(branch)[0], axes[1:], n) for branch in eqn.params["branches"]]
        return [a if all(a == b for b in rest) else LOST for a, *rest in zip(*branches, strict=True)]
    if name in ("while", "sort") or len(eqn.outvars) != 1:
        held = [(var.aval, axis) for var, axis in zip(eqn.invars, axes, strict=True) if axis is not SHARED]
        lost = any(axis == LOST or axis in _crossed(eqn, aval.ndim) for aval, axis in held)
        return [LOST if lost else _alike(held, out.aval) for out in eqn.outvars]
    return [_one(eqn, axes, n)]


def follow(jaxpr: Any, axes: Sequence[Axis], n: int) -> list[Axis]:
    """The axes of the results of a program, from those of its arguments."""
    known = dict(zip(jaxpr.invars, axes, strict=True))

    def read(var: Any) -> Axis:
        return SHARED if isinstance(var, core.Literal) else known.get(var, SHARED)

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, result_axes(eqn, [read(var) for var in eqn.invars], n), strict=True))
    return [read(var) for var in jaxpr.outvars]
