"""A walk through a traced model that meets every use of a parameter, and may change what flows there."""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from bilevax.curvature.capture.batch_axis import SHARED, Program, body, opened, scan_axes, scan_counts
from bilevax.curvature.capture.layers import RULES
from bilevax.curvature.capture.uses import (
    ELEMENTWISE,
    MARK,
    Path,
    Use,
    Value,
    View,
    Visitor,
    bind,
    elementwise,
    forget,
    plain,
    tap,
    unsupported,
)
from bilevax.curvature.capture.view import Strided
from bilevax.typing import Array

SAME = ("convert_element_type", "copy", "copy_p", "optimization_barrier")


def walk(program: Program, values: Sequence[Value], visitor: Visitor, n: int, path: Path = ()) -> list[Value]:
    """Evaluates a program equation by equation, and calls the visitor at each use of a leaf; n examples."""
    jaxpr, consts = program
    reads = Counter(var for eqn in jaxpr.eqns for var in eqn.invars if not isinstance(var, core.Literal))
    reads.update(var for var in jaxpr.outvars if not isinstance(var, core.Literal))
    known: dict[Any, Value] = {}

    def read(var: Any) -> Value:
        return Value(var.val) if isinstance(var, core.Literal) else known[var]

    def write(variables: Sequence[Any], values: Sequence[Value]) -> None:
        # h = a w and h + b have one block [w; b]; in h + b + h they have not, since the gradient at h is not that at b:
        # what is read twice is no longer known as the output of a layer
        for var, value in zip(variables, values, strict=True):
            known[var] = value if reads[var] == 1 else value._replace(output=None)

    write(jaxpr.constvars, [Value(const) for const in consts])
    write(jaxpr.invars, values)
    for number, eqn in enumerate(jaxpr.eqns):
        write(eqn.outvars, _equation(eqn, [read(var) for var in eqn.invars], visitor, n, (*path, number)))
    return [read(var) for var in jaxpr.outvars]


# For leaves w, γ and data a [5, 3, 4]:
#   no leaf                     evaluated; [15, 6] -> [5, 3, 6] of an output of a layer stays known, a bias may follow
#   a call, a scan              entered; a custom rule only where it sees the examples
#   one leaf, and constants     a view of this leaf still: wᵀ, 2 w, softplus(γ), γ [4] -> [1, 1, 4]
#   a leaf that meets examples  a use, by its rule: a w, table[ids], conv(a, w), γ a
#   anything else               unsupported, evaluated all the same: u vᵀ of two leaves, an einsum with 2 w
def _equation(eqn: Any, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    name = eqn.primitive.name
    if eqn.params.get("name") == MARK:
        return tap(values, visitor, n, path)
    views = [value.view for value in values if value.view is not None]
    if not views:
        results = plain(eqn, values, n)
        source = values[0].output if len(values) == len(results) == 1 else None
        if source is None or (strided := _moved(eqn, source.strided)) is None:
            return results
        return [results[0]._replace(output=source._replace(strided=strided))]
    sees = any(value.axis is not SHARED for value in values)
    if (inner := body(eqn)) is not None and (sees or not name.startswith("custom")):  # else its rule stays in force
        return _call(eqn, inner, values, visitor, n, path)
    if name == "scan":
        return _scan(eqn, values, visitor, n, path)
    others = [value for value in values if value.view is None]
    # Ids that the model makes itself, such as positions 0, 1, 2 of each example, [5, 3, 1], are SHARED, and yet pick a
    # row for each example: an embedding. Positions [3, 1] pick a [3, 4] for all: a view of the table.
    by_example = (
        name == "gather" and n > 1 and [value.array.shape[:1] for value in others if value.array.ndim > 2] == [(n,)]
    )
    if len({view.leaf for view in views}) == 1 and all(value.axis is SHARED for value in others) and not by_example:
        return _seen_through(eqn, values, views[0])
    if name in RULES and len(views) == 1:
        return RULES[name](eqn, values, visitor, n, path)
    if name in ELEMENTWISE:
        return elementwise(eqn, values, visitor, n, path)
    return unsupported(eqn, values, visitor, n, path, name)


# Views


def _moved(eqn: Any, strided: Strided) -> Strided | None:
    """The arrangement after an equation that only rearranges its first operand; None for any other."""
    name = eqn.primitive.name
    if name in SAME:
        return strided
    if name == "reshape" and eqn.params["dimensions"] is None:
        return strided.reshape(eqn.params["new_sizes"])
    if name == "tile":
        repeats = zip(eqn.params["reps"], strided.shape, strict=True)
        ones = all(repeat == 1 or size == 1 for repeat, size in repeats)
        return strided.broadcast(eqn.outvars[0].aval.shape, range(len(strided.shape))) if ones else None
    if name == "transpose":
        return strided.transpose(eqn.params["permutation"])
    if name == "squeeze":
        return strided.reshape(eqn.outvars[0].aval.shape)
    if name == "broadcast_in_dim":
        return strided.broadcast(eqn.params["shape"], eqn.params["broadcast_dimensions"])
    return None


def _seen_through(eqn: Any, values: list[Value], view: View) -> list[Value]:
    """What an equation makes of one leaf and constants is a function of that leaf alone."""
    arrays = bind(eqn, [value.array for value in values])
    if len(values) == 1 and (strided := _moved(eqn, view.strided)) is not None:
        return [Value(arrays[0], view=view._replace(strided=strided))]

    # 2 w of w [4, 2]: base = leaf -> 2 leaf, arranged as the whole [4, 2]. The equation is bound again at other leaves,
    # those of single examples above all: γ [4] becomes [5, 4] and softplus(γ) too, one for each.
    def result(leaf: Array, number: int) -> Array:
        again = [
            value.array if value.view is None else value.view.of(leaf, value.view.strided).astype(value.array.dtype)
            for value in values
        ]
        return bind(eqn, again)[number]

    return [
        Value(array, view=view._replace(base=functools.partial(result, number=k), strided=Strided.whole(array.shape)))
        for k, array in enumerate(arrays)
    ]


# Calls and loops


def _call(eqn: Any, inner: Program, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    """Enters a call; one that forgets what it computed goes on forgetting."""
    if "policy" not in eqn.params:
        return walk(inner, values, visitor, n, path)
    results: list[Value] = []

    def call(arrays: list[Array]) -> list[Array]:
        # jax.checkpoint returns arrays alone; their axes leave by `results`, whose arrays are not touched outside
        inside = [value._replace(array=array) for value, array in zip(values, arrays, strict=True)]
        results[:] = walk(inner, inside, visitor, n, path)
        forget(results, visitor, path, "returned by checkpoint")
        return [value.array for value in results]

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    arrays = jax.checkpoint(call, policy=policy, prevent_cse=prevent_cse)([value.array for value in values])
    return [Value(array, value.axis) for array, value in zip(arrays, results, strict=True)]


def _scan(eqn: Any, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    """Enters a scan: leaves that it slices are stacked layers, the others are used once in each iteration."""
    first, carries = scan_counts(eqn)
    last = first + carries
    stacked = {k: v.view for k, v in enumerate(values) if k >= last and v.view is not None}
    whole = all(view.base is None and view.strided == Strided.whole(view.array.shape) for view in stacked.values())
    if any(value.view is not None for value in values[first:last]) or not whole:
        return unsupported(eqn, values, visitor, n, path, "scan over a function of it")
    # Six layers w [6, 4, 4] over h [5, 4]: inside, the leaf is [4, 4] with stack 1, and what the visitor keeps for it
    # is sliced beside it, A [6, 4, 4] -> [4, 4]. A weight among the constants is the same [4, 4] in all iterations, and
    # the cotangents of what is kept for it add up.
    inside, outside = scan_axes(eqn, [value.axis for value in values], n)
    held = {value.view.leaf for value in values[:first] if value.view is not None}

    def kronecker(slot: Any, use: Use, *layer: Any) -> Array:
        times = use.times * (eqn.params["length"] if use.leaf in held else 1)
        return visitor.kronecker(slot, use._replace(times=times), *layer)

    sliced = {view.leaf: visitor.slots[view.leaf] for view in stacked.values() if view.leaf in visitor.slots}

    def iterate(carry: list[Array], slices: tuple[list[Array], dict[int, Any]]) -> tuple[list[Array], list[Array]]:
        xs, slots = slices
        again = []
        for k, (array, axis) in enumerate(zip([*consts, *carry, *xs], inside, strict=True)):
            view = values[k].view
            if k in stacked:
                view = View(stacked[k].leaf, stacked[k].stack + 1, array, None, Strided.whole(array.shape))
            again.append(Value(array, axis, view))
        there = visitor._replace(slots={**visitor.slots, **slots}, kronecker=kronecker)
        results = walk(opened(eqn.params["jaxpr"]), again, there, n, path)
        forget(results, visitor, path, "returned by scan")
        arrays = [value.array for value in results]
        return arrays[: last - first], arrays[last - first :]

    arrays = [value.array for value in values]
    consts = arrays[:first]
    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    results: Any = jax.lax.scan(iterate, arrays[first:last], (arrays[last:], sliced), **options)
    return [Value(array, axis) for array, axis in zip([*results[0], *results[1]], outside, strict=True)]
