"""What becomes of the views of leaves where an equation sees no examples."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.curvature.capture.uses import Covered, Path, Value, View, bind
from bilevax.curvature.capture.view import WHOLE, Linear, Part, Strided, contiguous
from bilevax.typing import Array

SAME = (
    "convert_element_type",
    "copy",
    "copy_p",
    "mesh_cast",
    "optimization_barrier",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
)


def rearranged(eqn: Any, strided: Strided) -> Strided | None:
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


def seen_through(eqn: Any, values: list[Value], path: Path) -> list[Value]:
    """What an equation makes of leaves and constants is a function of these leaves alone."""
    # 2 w of w [4, 2]: base = leaf -> 2 leaf, arranged as the whole [4, 2]. The equation is bound again at other leaves,
    # those of single examples above all: γ [4] becomes [5, 4] and softplus(γ) too, one for each. Of u vᵀ the base of u
    # holds v. `made` keeps what an equation gave for this leaf, which others read too.
    arrays = bind(eqn, [value.array for value in values])

    def again(leaf: Array, made: dict[Path, list[Any]], number: int, covers: Covered) -> Array:
        def read(value: Value) -> Array:
            own = [view for view in value.views if view.covers == covers]
            return own[0].of(leaf, own[0].strided, made).astype(value.array.dtype) if own else value.array

        if path not in made:
            made[path] = bind(eqn, [read(value) for value in values])
        return made[path][number]

    covered = {view.covers: view for value in values for view in value.views}
    summed = next((value.summed for value in values if value.summed), None)
    results = []
    for number, array in enumerate(arrays):
        views: list[View] = []
        for covers, view in covered.items():
            strided = rearranged(eqn, view.strided) if len(values) == 1 else None
            if strided is not None:
                linear = view.linear and moved(eqn, view.linear, values[0].array.shape)
                views.append(view._replace(strided=strided, linear=linear))
                continue
            taken = slices(eqn, [value.array for value in values], number) if view.linear else None
            if taken is not None and (found := cut(view, array, *taken)) is not None:
                views += found
                continue
            base = functools.partial(again, number=number, covers=covers)
            whole = Strided.whole(array.shape)
            views.append(view._replace(base=base, strided=whole, linear=combined(eqn, values, covers)))
        results.append(Value(array, views=tuple(views), summed=summed))
    return results


def moved(eqn: Any, linear: Linear, shape: Sequence[int]) -> Linear | None:
    """The same for the derivative, which may fill but a window of the array, of this shape."""
    name = eqn.primitive.name
    if name in SAME:
        return linear
    if name == "transpose":
        return linear.transpose(eqn.params["permutation"])
    if name == "squeeze" or (name == "reshape" and eqn.params["dimensions"] is None):
        return linear.reshape(shape, eqn.outvars[0].aval.shape)
    if name == "broadcast_in_dim":
        return linear.broadcast(shape, eqn.params["shape"], eqn.params["broadcast_dimensions"])
    strided = rearranged(eqn, linear.strided) if linear.start is None else None
    return None if strided is None else linear._replace(strided=strided)


def combined(eqn: Any, values: list[Value], covers: Covered) -> Linear | None:
    """The derivative after an equation of several operands: a number times a leaf, a sum, arrays side by side."""
    places = [(k, view) for k, value in enumerate(values) for view in value.views if view.covers == covers]
    ((k, view), *twice), name, shape = places, eqn.primitive.name, eqn.outvars[0].aval.shape
    linear, old = view.linear, values[k].array.shape
    if twice or linear is None:
        return None
    if name == "neg":
        return linear.times(jnp.asarray(-1, values[k].array.dtype))
    if name == "mul" and jnp.size(number := values[1 - k].array) == 1 and old == shape:
        return linear.times(jnp.reshape(number, ()))
    if name == "div" and k == 0 and jnp.size(number := values[1].array) == 1:
        return linear.times(1 / jnp.reshape(number, ()))
    if name in ("add", "sub") and old == shape:
        placed = linear.shift([0] * len(shape))
        return placed.times(jnp.asarray(-1, values[k].array.dtype)) if name == "sub" and k == 1 else placed
    if name in ("concatenate", "stack"):
        axis = eqn.params.get("dimension", eqn.params.get("axis", 0))
        if name == "stack":
            linear = linear.broadcast(old, (*old[:axis], 1, *old[axis:]), [a + (a >= axis) for a in range(len(old))])
        before = k if name == "stack" else sum(value.array.shape[axis] for value in values[:k])
        return linear.shift([before * (a == axis) for a in range(len(shape))])
    if name == "pad" and k == 0 and all(min(config) >= 0 and config[2] == 0 for config in eqn.params["padding_config"]):
        return linear.shift([low for low, _, _ in eqn.params["padding_config"]])
    return None


# Slices

Taken = tuple[list[int], list[int], list[int]]  # where a slice starts, how many elements it takes, and its steps


def slices(eqn: Any, arrays: Sequence[Array], number: int) -> Taken | None:
    """What a result takes of its first operand, where that is known before the model runs; up to axes of length 1."""
    name, shape, params = eqn.primitive.name, list(arrays[0].shape), eqn.params
    ones = [1] * len(shape)
    if name == "slice":
        steps = list(params["strides"] or ones)
        spans = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
        return list(params["start_indices"]), [len(range(*span)) for span in spans], steps
    if name in ("split", "unstack"):
        axis, sizes = params["axis"], params.get("sizes", [1] * len(eqn.outvars))
        start = [sum(map(int, sizes[:number])) * (a == axis) for a in range(len(shape))]
        return start, [int(sizes[number]) if a == axis else size for a, size in enumerate(shape)], ones
    known = all(not isinstance(index, jax.core.Tracer) for index in arrays[1:])
    if name == "dynamic_slice" and known:
        spans = zip(arrays[1:], shape, params["slice_sizes"], strict=True)
        return [min(max(int(at), 0), full - size) for at, full, size in spans], list(params["slice_sizes"]), ones
    if name == "gather" and known and jnp.size(arrays[1]) == len(params["dimension_numbers"].start_index_map):
        start, sizes = [0] * len(shape), list(params["slice_sizes"])
        for axis, at in zip(params["dimension_numbers"].start_index_map, np.ravel(arrays[1]).tolist(), strict=True):
            start[axis] = at
        inside = all(0 <= at <= full - size for at, full, size in zip(start, shape, sizes, strict=True))
        return (start, sizes, ones) if inside and not params["dimension_numbers"].operand_batching_dims else None
    return None


def cut(view: View, array: Array, start: list[int], sizes: list[int], steps: list[int]) -> list[View] | None:
    """The view of the part of a leaf that stands in a slice, which is a leaf of its own; [] where none does."""
    # Of a fused kernel [4, 12] the columns 4 to 8: an array [4, 4], contiguous, of the part (4, (4, 4), (12, 1)). Of
    # [w1 w2], each [4, 3], the columns 2 to 6 hold one column of w1 and all of w2, which begins at 1
    linear: Any = view.linear
    offset, window, places, strides = 0, [], [], []
    for at, size, step, begin, length, stride in zip(start, sizes, steps, linear.starts, *linear.strided, strict=True):
        first, last = max(0, -(-(begin - at) // step)), min(size, -(-(begin + length - at) // step))
        if last <= first:
            return []
        offset += (at + step * first - begin) * stride
        window.append(last - first)
        places.append(first)
        strides.append(stride * step if last - first > 1 else 0)
    whole = Part.ordered(0, [(view.array.size, 1)])
    old = whole if view.part == WHOLE else view.part
    found = {a: old.stride(window[a], stride) for a, stride in enumerate(strides) if stride}
    outer = {a: stride for a, stride in found.items() if stride is not None}
    if len(outer) < len(found):
        return None
    axes = sorted(outer, key=lambda a: -outer[a])
    part = Part.ordered(old.element(offset), [(window[a], outer[a]) for a in axes])
    inner = dict(zip(axes, contiguous([window[a] for a in axes]), strict=True))
    strided = Strided(tuple(window), tuple(inner.get(a, 0) for a in range(len(window))))
    there = linear._replace(strided=strided, start=None if linear.start is None else tuple(places))
    flat: Any = there.reshape(sizes, array.shape)
    if flat is None:
        return None
    here = view._replace(base=None, strided=flat.strided, linear=flat, part=WHOLE if part == whole else part)
    if view.base is not None:
        ends = [full - first - n for full, first, n in zip(sizes, places, window, strict=True)]
        margin, root = list(zip(places, ends, strict=True)), here.root

        def base(leaf: Array, made: Any) -> Array:
            change = strided.of(leaf - root) * (1 if linear.scale is None else linear.scale)
            return array + jnp.pad(change, margin).reshape(array.shape).astype(array.dtype)

        here = here._replace(base=base, strided=Strided.whole(array.shape))
    return [here]
