"""A walk through a traced model that meets every use of a parameter, and may change what flows there."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from bilevax.curvature.capture._observe import tap
from bilevax.curvature.capture.batch_axis import by_line, scan_places
from bilevax.curvature.capture.indices import counted_by
from bilevax.curvature.capture.layers import RULES, layer
from bilevax.curvature.capture.leaf_functions import rearranged, seen_through
from bilevax.curvature.capture.places import FLAT, SHARED, Axis, Spread, literal_kind, lost, of_dtype
from bilevax.curvature.capture.programs import Program, at_once, body, opened, scan_counts, ungrouped, unsharded
from bilevax.curvature.capture.rows import unpushed
from bilevax.curvature.capture.uses import (
    ELEMENTWISE,
    MARK,
    Path,
    Use,
    Value,
    Visitor,
    bind,
    elementwise,
    entering,
    forget,
    plain,
    unsupported,
)
from bilevax.curvature.capture.view import WHOLE, Strided
from bilevax.typing import Array

INDICES = tuple(map(jnp.dtype, ("bool", "int32", "int64", "uint32", "uint64")))


def walk(program: Program, values: Sequence[Value], visitor: Visitor, n: int, path: Path = ()) -> list[Value]:
    """Evaluates a program equation by equation, and calls the visitor at each use of a leaf; n examples."""
    jaxpr, consts = program
    reads = Counter(var for eqn in jaxpr.eqns for var in eqn.invars if not isinstance(var, core.Literal))
    reads.update(var for var in jaxpr.outvars if not isinstance(var, core.Literal))
    known: dict[Any, Value] = {}

    def read(var: Any) -> Value:
        return Value(var.val, kind=literal_kind(var.val)) if isinstance(var, core.Literal) else known[var]

    def write(variables: Sequence[Any], values: Sequence[Value]) -> None:
        # h = a w and h + b have one block [w; b]; in h + b + h they have not, since the gradient at h is not that at b:
        # what is read twice is no longer known as the output of a layer
        for var, value in zip(variables, values, strict=True):
            known[var] = value if reads[var] == 1 else value._replace(output=None)

    kinds = [of_dtype(jnp.result_type(const), FLAT) for const in consts]
    constants = [Value(c, kind=kind, counts=counted_by(c)) for c, kind in zip(consts, kinds, strict=True)]
    write(jaxpr.constvars, constants)
    write(jaxpr.invars, values)
    for number, eqn in enumerate(jaxpr.eqns):
        write(eqn.outvars, _equation(eqn, [read(var) for var in eqn.invars], visitor, n, (*path, number)))
    return [read(var) for var in jaxpr.outvars]


# For leaves w, γ and data a [5, 3, 4]:
#   no leaf                     evaluated; [15, 6] -> [5, 3, 6] of an output of a layer stays known, a bias may follow
#   a call, a scan              entered; a custom rule, a scan only where it sees the examples
#   leaves, and constants       a view of these leaves still: wᵀ, 2 w, w[1], [w1 w2], softplus(γ), u vᵀ
#   a leaf that meets examples  a use, by its rule: a w, table[ids], conv(a, w), γ a
#   anything else               unsupported, evaluated all the same: cond, while, an einsum in which examples are mixed
def _equation(eqn: Any, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    name = eqn.primitive.name
    if eqn.params.get("name") == MARK:
        return tap(values, visitor, n, path)
    if name == "optimization_barrier":  # of several arrays, each of which stays what it is
        arrays = bind(eqn, [value.array for value in values])
        return [value._replace(array=array) for value, array in zip(values, arrays, strict=True)]
    if not any(value.views for value in values):
        results = _unviewed(eqn, values, n)
        if any(unpushed(result.axis) for result in results) and (inner := body(eqn)) is not None:
            return _call(eqn, inner, values, visitor, n, path)  # what went into the slots is known inside
        return results
    if (program := unsharded(eqn) or ungrouped(eqn)) is not None:
        return walk(program, values, visitor, n, path)
    if name not in RULES and not any(value.output is not None for value in values):
        values = [value._replace(axis=_statistic(value.axis)) for value in values]
    sees = any(value.axis is not SHARED for value in values)
    if (inner := body(eqn)) is not None and (sees or not name.startswith("custom")):  # else its rule stays in force
        return _call(eqn, inner, values, visitor, n, path)
    if name == "scan" and sees:
        return _scan(eqn, values, visitor, n, path)
    others = [value for value in values if not value.views]
    # Ids that the model makes itself, such as positions 0, 1, 2 of each example, [5, 3, 1], are SHARED, and yet pick a
    # row for each example: an embedding. Positions [3, 1] pick a [3, 4] for all: a view of the table.
    by_example = (
        name == "gather" and n > 1 and [value.array.shape[:1] for value in others if value.array.ndim > 2] == [(n,)]
    )
    if not sees and not by_example:
        return seen_through(eqn, values, path)
    if name in RULES and len(others) == 1:
        return layer(eqn, values, visitor, n, path)
    if name in ELEMENTWISE:
        return elementwise(eqn, values, visitor, n, path)
    return unsupported(eqn, values, visitor, n, path, name)


def _unviewed(eqn: Any, values: list[Value], n: int) -> list[Value]:
    """What an equation without leaves gives; numbers that are known are computed, since they may be indices."""
    small = [math.prod(var.aval.shape) == 1 and var.aval.dtype in INDICES for var in eqn.outvars]
    known = [jnp.size(value.array) == 1 and not isinstance(value.array, jax.core.Tracer) for value in values]
    if values and all(small) and all(known):
        with jax.ensure_compile_time_eval():
            return plain(eqn, values, n)
    results = plain(eqn, values, n)
    source = values[0].output if len(values) == len(results) == 1 else None
    if source is None or (strided := rearranged(eqn, source.strided)) is None:
        return results
    return [results[0]._replace(output=source._replace(strided=strided))]


def _statistic(axis: Axis) -> Axis:
    """The axis of what holds sums over examples, for leaves that make no layer of it: it belongs to none."""
    return SHARED if isinstance(axis, Spread) and not axis.ordered and axis.otherwise is SHARED else axis


# Calls and loops


def _call(eqn: Any, inner: Program, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    """Enters a call; one that forgets what it computed goes on forgetting."""
    if "policy" not in eqn.params:
        inside = [(value, by_line(value.place, eqn)) for value in walk(inner, values, visitor, n, path)]
        return [value._replace(axis=place.axis, summed=place.summed) for value, place in inside]
    results: list[Value] = []

    def call(arrays: list[Array]) -> list[Array]:
        # jax.checkpoint returns arrays alone; their axes leave by `results`, whose arrays are not touched outside
        inside = [value._replace(array=array) for value, array in zip(values, arrays, strict=True)]
        results[:] = walk(inner, inside, visitor, n, path)
        forget(results, visitor, path, "returned by checkpoint")
        return [value.array for value in results]

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    arrays = jax.checkpoint(call, policy=policy, prevent_cse=prevent_cse)([value.array for value in values])
    axes = [lost(eqn) if isinstance(a := value.axis, Spread) and not a.ordered else a for value in results]
    places = [value.place._replace(axis=axis) for value, axis in zip(results, axes, strict=True)]
    return [Value.at(array, place) for array, place in zip(arrays, places, strict=True)]


def _scan(eqn: Any, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    """Enters a scan: leaves that it slices are stacked layers, the others are used once in each iteration."""
    first, carries = scan_counts(eqn)
    last = first + carries
    stacked = {k: view for k, value in enumerate(values) if k >= last for view in value.views}
    if not stacked and (program := at_once(eqn, [value.axis for value in values])) is not None:
        return walk(program, values, visitor, n, path)
    whole = all(
        len(values[k].views) == 1
        and view.part == WHOLE
        and view.linear is not None
        and view.linear.strided == Strided.whole(view.array.shape)
        for k, view in stacked.items()
    )
    if not whole:
        parts = any(view.part != WHOLE and view.linear is not None for view in stacked.values())
        return unsupported(eqn, values, visitor, n, path, f"scan over a {'part' if parts else 'function'} of it")
    # Six layers w [6, 4, 4] over h [5, 4]: inside, the leaf is [4, 4] with stack 1, and what the visitor keeps for it
    # is sliced beside it, A [6, 4, 4] -> [4, 4]. A weight among the constants is the same [4, 4] in all iterations, and
    # the cotangents of what is kept for it add up.
    inside, outside = scan_places(eqn, [value.place for value in values], n)
    held = {view.leaf for value in values[:first] for view in value.views}

    def kronecker(slot: Any, use: Use, *layer: Any) -> Array:
        times = use.times * (eqn.params["length"] if use.leaf in held else 1)
        return visitor.kronecker(slot, use._replace(times=times), *layer)

    leaves = {view.leaf for view in stacked.values()}
    sliced = {covers: slot for covers, slot in visitor.slots.items() if covers[0] in leaves}

    def iterate(carry: list[Array], slices: tuple[Any, ...]) -> tuple[list[Array], list[Array]]:
        xs, slots, own = slices
        again = []
        for k, (array, place) in enumerate(zip([*consts, *carry, *xs], inside, strict=True)):
            views = values[k].views
            if k in stacked:
                views = (stacked[k].sliced(array, own.get(k, array)),)
            again.append(Value.at(array, place)._replace(views=views))
        there = visitor._replace(slots={**visitor.slots, **slots}, kronecker=kronecker)
        results = walk(opened(eqn.params["jaxpr"]), again, there, n, path)
        forget(results, visitor, path, "returned by scan")
        arrays = [value.array for value in results]
        return arrays[: last - first], arrays[last - first :]

    pairs = list(zip(values, inside, strict=True))[first:last]
    firsts = [entering(value, place, visitor, n, path) if value.views else value for value, place in pairs]
    values = [*values[:first], *firsts, *values[last:]]
    arrays = [value.array for value in values]
    consts = arrays[:first]
    leaf_of = {k: view.array for k, view in stacked.items() if view.base is not None}
    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    results: Any = jax.lax.scan(iterate, arrays[first:last], (arrays[last:], sliced, leaf_of), **options)
    arrays = [*results[0], *results[1]]
    return [Value.at(array, place) for array, place in zip(arrays, outside, strict=True)]
