"""The uses of a leaf that have a Kronecker block: products with data, convolutions, and rows of a table by index."""

import functools
import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from bilevax.curvature.capture.batch_axis import result_places
from bilevax.curvature.capture.places import FLAT, SHARED, Axis, Lost, Place, Spread, axes_of, lost
from bilevax.curvature.capture.rows import RowReaders, Window, rows_of, slots_of, unpushed, weigh
from bilevax.curvature.capture.uses import (
    Covered,
    Output,
    Path,
    Use,
    Value,
    View,
    Visitor,
    bind,
    changed,
    plain,
    uncovered,
)
from bilevax.curvature.capture.view import Part, Strided, contiguous
from bilevax.typing import Array


def _roles(shape: Sequence[int], features: Sequence[int], size: int) -> Strided:
    """An output whose features have the strides of a row of `size`, and whose rows have larger ones."""
    # [5, 3, 2, 4] with features (2, 3) in rows of 8: strides (24, 8, 4, 1); [2, 5] with the features first: (1, 2)
    rows = [a for a in range(len(shape)) if a not in features]
    strides = dict(zip(features, contiguous([shape[a] for a in features]), strict=True))
    strides |= {a: s * size for a, s in zip(rows, contiguous([shape[a] for a in rows]), strict=True)}
    return Strided(tuple(shape), tuple(strides[a] for a in range(len(shape))))


class Layer(NamedTuple):
    """What a rule says of an equation: its use, the rows, and where the examples of the result are.

    Attributes:
      use: of the leaf.
      rows: how they lie in data and result.
      axis: of the examples in the result.
      features: axes of the result that count layers and features, in this order; () where no bias can join.
      window: what the leaf makes of the result.
    """

    use: Use
    rows: RowReaders
    axis: Axis
    features: Sequence[int] = ()
    window: Window = MappingProxyType({})


class Rule(Protocol):
    """The layer whose kernel, operand `side` of an equation, this is a view of; or what is wrong with it."""

    def __call__(self, eqn: Any, values: list[Value], side: int, view: View, n: int, path: Path, /) -> Layer | str: ...


def layer(eqn: Any, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    """A product, convolution or look-up whose kernel depends on leaves: a layer for each that it was but moved from.

    Where it is another function of a leaf, or the visitor wants it so, each example gets a kernel of its own.
    """
    side = next(k for k, value in enumerate(values) if value.views)
    kernel, data, divided = values[side], values[1 - side], _divided(eqn, values, side, n)
    found: list[tuple[View, Layer]] = []
    kernels = None
    for view in kernel.views:
        here = RULES[eqn.primitive.name](eqn, values, side, view, n, path)
        if isinstance(here, Layer):
            found.append((view, here))
            use = here.use
        elif divided is None:
            visitor.unsupported(uncovered(path, view, here))
            continue
        else:
            use = Use("diagonal", path, view.leaf, view.stack, here, part=view.part, derived=True)
        kernels = changed(kernel, kernels, view, view.strided, visitor.own(use, view) if divided else None)
    (result,) = plain(eqn, values, n)
    array, axis = result.array, result.axis
    scales: list[Any] = [view.linear.scale if view.linear else None for view, _ in found]
    factor = scales[0] if found and found[0][1].use.by_row else None
    if kernels is not None and divided is not None:
        array = _for_each(eqn, data.array, kernels, side, divided, n).reshape(array.shape)
    elif factor is not None:
        linear: Any = found[0][0].linear
        (array,) = bind(eqn, [linear.strided.of(found[0][0].root), data.array])
    for (_, here), scale in zip(found, scales, strict=True):
        inputs = data.array if scale is None or here.use.by_row else (data.array * scale).astype(data.array.dtype)
        positions = jax.eval_shape(here.rows.outputs, array).shape[-2]
        use = here.use._replace(divides=divided is not None, positions=positions)
        array, axis = visitor.kronecker(visitor.slots.get(use.covers), use, here.rows, array, inputs), here.axis
    if factor is not None and kernels is None:
        array = (array * factor).astype(result.array.dtype)
    return [Value(array, axis, (), _output(path, array.shape, found), summed=result.summed)]


def _divided(eqn: Any, values: list[Value], side: int, n: int) -> tuple[int, int] | None:
    """The axes of data and result along which each example has its own; None where an equation mixes them."""
    name, data = eqn.primitive.name, values[1 - side]
    axis = 0 if name == "gather" and data.axis is SHARED else data.axis
    if not isinstance(axis, int):
        return None
    if name == "dot_general":
        contracted, batched = eqn.params["dimension_numbers"]
        apart = axis not in (*contracted[1 - side], *batched[1 - side])
    elif name == "gather":
        apart = side == 0 and not eqn.params["dimension_numbers"].operand_batching_dims
    else:
        apart = side == 1 and eqn.params["batch_group_count"] == 1
        apart = apart and axis == eqn.params["dimension_numbers"].lhs_spec[0]
    places = [Place(SHARED if k == side else axis, FLAT) for k in range(2)]
    there = result_places(eqn, places, n)[0].axis if apart else None
    return (axis, there) if isinstance(there, int) else None


def _for_each(eqn: Any, data: Array, kernels: Array, side: int, axes: tuple[int, int], n: int) -> Array:
    """The results of an equation, in which each example has a kernel of its own, [N, ...]."""
    # a [15, 4], five examples in 3 rows each, and kernels [5, 4, 2]: [5, 3, 4] -> [5, 3, 2], one product for each
    axis, there = axes
    data = data.reshape(*data.shape[:axis], n, -1, *data.shape[axis + 1 :])

    def one(data: Array, kernel: Array) -> Array:
        return bind(eqn, [kernel, data] if side == 0 else [data, kernel])[0]

    return jax.vmap(one, (axis, 0), there)(data, kernels)


def _output(path: Path, shape: Sequence[int], found: Sequence[tuple[View, Layer]]) -> Output | None:
    """What is known of the result of layers, which a bias may follow: all of them have its features in common."""
    if not found or not found[0][1].features:
        return None
    size = math.prod(shape[a] for a in found[0][1].features)
    roles = _roles(shape, found[0][1].features, size)
    pieces: dict[Covered, Part] = {}
    for _, here in found:
        made = {a: here.window.get(a, (0, shape[a])) for a in here.features}
        offset = sum(start * roles.strides[a] for a, (start, _) in made.items())
        pieces[here.use.covers] = Part.ordered(offset, [(length, roles.strides[a]) for a, (_, length) in made.items()])
    return Output(path, size, roles, pieces)


def _outer(strided: Strided, contracted: Sequence[int], free: Sequence[int]) -> list[int]:
    """Free axes that count layers: those before the contracted ones in the leaf, where outputs stand behind them."""
    # Experts [3, 4, 6] on a [5, 4]: the 3 counts layers [4, 6]. A kernel [4, 2, 3] with two axes of outputs has none
    # before its 4, and wᵀ [2, 3, 4] none behind it.
    inner = [strided.strides[a] for a in contracted if strided.shape[a] > 1]
    if not inner or all(strided.strides[a] >= min(inner) for a in free):
        return []
    return [a for a in free if strided.shape[a] > 1 and strided.strides[a] > max(inner)]


def dense(eqn: Any, values: list[Value], side: int, view: View, n: int, path: Path) -> Layer | str:
    """Data · weight, whichever axes are contracted and whichever operand comes first."""
    linear, data = view.linear, values[1 - side]
    contracted, batched = eqn.params["dimension_numbers"]
    summed = set(axes_of(data.axis)) & set(contracted[1 - side])
    gone = data.axis.otherwise if isinstance(data.axis, Spread) else None  # what put them where they are summed over
    if (missing := _missing((gone or lost(eqn)) if summed else data.axis)) is not None:
        return f"dot_general with data whose examples axis is {missing}"
    slots = isinstance(data.axis, Spread) and not data.axis.ordered
    if not slots and set(axes_of(data.axis)) & set(batched[1 - side]):
        return "dot_general with another matrix for each example"
    if linear is None or not linear.once:
        return "dot_general of a function of it"
    # The result has the batched axes first, then the free axes of the left operand, then those of the right. The weight
    # first, w [2, 3] · aᵀ [3, 5] -> [2, 5]: w is seen as the matrix (3, 2) with strides (1, 3), outputs at 0, examples
    # at 1: rows of aᵀ [3, 5] -> [5, 1, 3], rows of the result [2, 5] -> [5, 1, 2].
    # Two layers, w [2, 6, 4] · h [5, 2, 6] with the 2 batched -> [2, 4, 5]: the matrix (2, 6, 4), rows [2, 5, 1, 6] and
    # [2, 5, 1, 4].
    free = [
        [a for a in range(v.array.ndim) if a not in contracted[k] and a not in batched[k]] for k, v in enumerate(values)
    ]
    places = [{a: place for place, a in enumerate(batched[k])} for k in (0, 1)]  # where the axes of each operand went
    first = len(batched[0])
    places[0] |= {a: first + place for place, a in enumerate(free[0])}
    places[1] |= {a: first + len(free[0]) + place for place, a in enumerate(free[1])}
    outer = _outer(linear.strided, contracted[side], free[side])
    layers = sorted([*batched[side], *outer], key=lambda a: -linear.strided.strides[a])
    features = [a for a in free[side] if a not in outer]
    matrix = linear.strided.transpose([*layers, *contracted[side], *features])
    inputs = math.prod(linear.strided.shape[a] for a in contracted[side])
    outputs = math.prod(linear.strided.shape[a] for a in features)
    seen = [batched[1 - side][batched[side].index(a)] if a in batched[side] else None for a in layers]
    theirs = [a for a in seen if a is not None]
    ours, ends = [places[side][a] for a in layers], [places[side][a] for a in features]
    axis = _moved(data.axis, places[1 - side])
    held = slots_of(data.axis, data.array.shape, theirs)
    shape = eqn.outvars[0].aval.shape
    positions = math.prod(shape[a] for a in range(len(shape)) if a not in (*axes_of(axis), *ours, *ends))
    there = dict(zip((*contracted[side], *batched[side]), (*contracted[1 - side], *batched[1 - side]), strict=True))
    read, made = (
        linear.window(list(there), list(there.values())),
        linear.window(list(places[side]), list(places[side].values())),
    )
    rows = RowReaders(
        functools.partial(rows_of, axis=data.axis, features=contracted[1 - side], n=n, layers=theirs, window=read),
        functools.partial(rows_of, axis=axis, features=ends, n=n, layers=ours, window=made),
        tuple(a not in batched[side] for a in layers),
        weigh(data.axis, seen, matrix.shape[: len(layers)], positions),
    )
    use = Use("dense", path, view.leaf, view.stack, "dot_general", matrix, inputs, outputs)
    turned = not layers and _inner(linear.strided, contracted[side]) < _inner(linear.strided, features)
    use = use._replace(layers=len(layers), part=view.part, turned=turned, slots=held)
    return Layer(use, rows, axis, [*ours, *ends], made)


def _inner(strided: Strided, axes: Sequence[int]) -> int:
    """The shortest stride of these axes."""
    return min((strided.strides[a] for a in axes if strided.shape[a] > 1), default=0)


def _missing(axis: Axis) -> str | None:
    """Why rows of data cannot be told apart by example."""
    if isinstance(axis, Lost):
        return f"lost: {axis.what}"
    if isinstance(axis, Spread) and axis.partial:
        return "lost: sums over microbatches have none"
    return "lost: none of it is one" if axis is SHARED or unpushed(axis) else None


def _moved(axis: Axis, places: dict[int, int]) -> Axis:
    """The axis of the result, where the axes of an operand went to these places."""
    if isinstance(axis, Spread):
        return axis._replace(axes=tuple(places[a] for a in axis.axes))
    return places[axis] if isinstance(axis, int) else axis


def conv(eqn: Any, values: list[Value], side: int, view: View, n: int, path: Path) -> Layer | str:
    """A convolution: a dense layer on patches, whose features are ordered (channels, *kernel); one for each group."""
    data, linear = values[0], view.linear
    numbers, options = eqn.params["dimension_numbers"], eqn.params
    groups, shape = options["feature_group_count"], values[1].array.shape
    if side == 0:
        return "conv_general_dilated whose images are parameters"
    if options["batch_group_count"] != 1:
        return "conv_general_dilated in groups of the batch"
    if axes_of(data.axis) != (numbers.lhs_spec[0],):
        return f"conv_general_dilated with data whose examples axis is {_missing(data.axis) or 'not that of its batch'}"
    outward, inward, *spatial = numbers.rhs_spec
    free = (outward, inward) if groups == 1 else ()  # channels that a leaf may make, or read, but some of
    if linear is None or not linear.once:
        return "conv_general_dilated of a function of it"
    if any(
        size != full for a, (size, full) in enumerate(zip(linear.strided.shape, shape, strict=True)) if a not in free
    ):
        return "conv_general_dilated of a function of it"
    # a [5, 8, 8, 2] with a kernel [3, 3, 2, 6], no padding: the matrix [18, 6] is (2, 3, 3, 6) with (6, 36, 12, 1)
    #   rows of a: patches [5, 18, 6, 6] -> [5, 36, 18],    rows of the result [5, 6, 6, 6] -> [5, 36, 6]
    # In two groups, a kernel [3, 3, 1, 6]: two matrices, (2, 1, 3, 3, 3) with (3, 6, 18, 6, 1), on one channel each:
    #   rows of a: [2, 5, 36, 9],    rows of the result [2, 5, 36, 3]
    each, layers = linear.strided.shape[outward] // groups, int(groups > 1)
    split = linear.strided.split(outward, groups)  # the groups at `outward`, the outputs of each behind them
    moved = [a + (a > outward) for a in (inward, *spatial)]
    matrix = split.transpose([outward, *moved, outward + 1])
    if not layers:
        matrix = matrix.drop(0)
    inputs = math.prod(linear.strided.shape[a] for a in (inward, *spatial))
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")

    def patches(array: Array) -> Array:
        start, size = linear.starts[inward], linear.strided.shape[inward] * groups
        windows = jax.lax.conv_general_dilated_patches(
            jax.lax.slice_in_dim(jnp.transpose(array, numbers.lhs_spec), start, start + size, axis=1),
            [linear.strided.shape[a] for a in spatial],
            **{name: options[name] for name in names},
            precision=jax.lax.Precision.HIGHEST,
        )
        return _rows_in_groups(windows, _moved(data.axis, {numbers.lhs_spec[0]: 0}), 1, groups, n)

    place, feature, *outs = numbers.out_spec
    axis = _moved(data.axis, {numbers.lhs_spec[0]: place})
    made = linear.window((outward,), (feature,)) if groups == 1 else {}
    outputs = functools.partial(_rows_in_groups, axis=axis, feature=feature, groups=groups, n=n, window=made)
    positions = math.prod(eqn.outvars[0].aval.shape[a] for a in outs)
    weights = weigh(data.axis, (None,) * layers, (groups,) * layers, positions)
    rows = RowReaders(patches, outputs, (False,) * layers, weights)
    use = Use("conv", path, view.leaf, view.stack, "conv_general_dilated", matrix, inputs, each)
    use = use._replace(layers=layers, part=view.part, slots=slots_of(data.axis, data.array.shape))
    return Layer(use, rows, axis, (feature,), made)


def _rows_in_groups(array: Array, axis: Axis, feature: int, groups: int, n: int, window: Window | None = None) -> Array:
    """Rows of an array whose features lie along one axis, [groups, N, ...] where there are several groups of them."""
    if groups == 1:
        return rows_of(array, axis, (feature,), n, window=window)
    split = array.reshape(*array.shape[:feature], groups, -1, *array.shape[feature + 1 :])
    places = {a: a + (a > feature) for a in range(array.ndim)}
    return rows_of(split, _moved(axis, places), (feature + 1,), n, (feature,))


def embedding(eqn: Any, values: list[Value], side: int, view: View, n: int, path: Path) -> Layer | str:
    """Rows of a table by index: a dense layer on one-hot rows, which are never formed."""
    linear, index = view.linear, values[1]
    numbers, shape = eqn.params["dimension_numbers"], values[0].array.shape
    clips = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
    bounded = clips or eqn.params["mode"] == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    starts = ((0,), (0, 1)) if bounded else ((0,),)  # a whole row can start at 0 alone
    by_row = numbers.collapsed_slice_dims in ((0,), ()) and numbers.start_index_map in starts
    by_row = by_row and len(shape) == 2 and tuple(eqn.params["slice_sizes"]) == (1, shape[1])
    if linear is not None and linear.scale is not None and len(values[0].views) > 1:
        return "gather of a function of it"
    if side == 1 or linear is None or linear.strided != Strided.whole(shape) or not by_row:
        return "gather of anything but rows of a table"
    axis = 0 if index.axis is SHARED else index.axis
    if (missing := _missing(axis)) is not None:
        return f"gather with indices whose examples axis is {missing}"
    place = _moved(axis, dict(enumerate(a for a in range(eqn.outvars[0].aval.ndim) if a not in numbers.offset_dims)))

    def ids(array: Array) -> Array:
        found = rows_of(array, axis, (array.ndim - 1,), n)
        return jnp.clip(found, 0, shape[0] - 1) if clips else found

    held = index.array.shape
    rows = RowReaders(
        ids,
        functools.partial(rows_of, axis=place, features=numbers.offset_dims, n=n),
        weights=weigh(axis, (), (), math.prod(size for a, size in enumerate(held[:-1]) if a not in axes_of(axis))),
    )
    sizes = (linear.strided, shape[0], shape[1])
    use = Use("embedding", path, view.leaf, view.stack, "gather", *sizes, by_row=True, part=view.part)
    return Layer(use._replace(slots=slots_of(axis, held)), rows, place)


RULES: dict[str, Rule] = {"dot_general": dense, "conv_general_dilated": conv, "gather": embedding}
