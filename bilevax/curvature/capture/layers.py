"""The uses of a leaf that have a Kronecker block: products with data, convolutions, and rows of a table by index."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bilevax.curvature.capture.batch_axis import LOST, SHARED
from bilevax.curvature.capture.uses import (
    Output,
    Path,
    RowReaders,
    Use,
    Value,
    Visitor,
    plain,
    rows_of,
    unsupported,
)
from bilevax.curvature.capture.view import Strided, contiguous
from bilevax.typing import Array


def _roles(shape: Sequence[int], features: Sequence[int], size: int) -> Strided:
    """An output whose features have the strides of a row of `size`, and whose rows have larger ones."""
    # [5, 3, 2, 4] with features (2, 3) in rows of 8: strides (24, 8, 4, 1); [2, 5] with the features first: (1, 2)
    rows = [a for a in range(len(shape)) if a not in features]
    strides = dict(zip(features, contiguous([shape[a] for a in features]), strict=True))
    strides |= {a: s * size for a, s in zip(rows, contiguous([shape[a] for a in rows]), strict=True)}
    return Strided(tuple(shape), tuple(strides[a] for a in range(len(shape))))


def _kronecker(
    eqn: Any, values: list[Value], visitor: Visitor, n: int, use: Use, rows: RowReaders, data: Array
) -> Array:
    """The result of a use, after the visitor has seen it."""
    (result,) = plain(eqn, values, n)
    positions = jax.eval_shape(rows.outputs, result.array).shape[-2]
    return visitor.kronecker(visitor.slots.get(use.leaf), use._replace(positions=positions), rows, result.array, data)


def _outer(strided: Strided, contracted: Sequence[int], free: Sequence[int]) -> list[int]:
    """Free axes that count layers: those before the contracted ones in the leaf, where outputs stand behind them."""
    # Experts [3, 4, 6] on a [5, 4]: the 3 counts layers [4, 6]. A kernel [4, 2, 3] with two axes of outputs has none
    # before its 4, and wᵀ [2, 3, 4] none behind it.
    inner = [strided.strides[a] for a in contracted if strided.shape[a] > 1]
    if not inner or all(strided.strides[a] >= min(inner) for a in free):
        return []
    return [a for a in free if strided.shape[a] > 1 and strided.strides[a] > max(inner)]


def dense(eqn: Any, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    """Data · weight, whichever axes are contracted and whichever operand comes first."""
    side = 0 if values[0].view is not None else 1
    view, data = values[side].view, values[1 - side]
    contracted, batched = eqn.params["dimension_numbers"]
    wrong = functools.partial(unsupported, eqn, values, visitor, n, path)
    if view is None or not view.plain:
        return wrong("dot_general of a function of it")
    if data.axis is SHARED or data.axis == LOST or data.axis in contracted[1 - side]:
        return wrong("dot_general with data whose examples axis is lost")
    if data.axis in batched[1 - side]:
        return wrong("dot_general with another matrix for each example")
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
    outer = _outer(view.strided, contracted[side], free[side])
    layers = sorted([*batched[side], *outer], key=lambda a: -view.strided.strides[a])
    features = [a for a in free[side] if a not in outer]
    matrix = view.strided.transpose([*layers, *contracted[side], *features])
    inputs = math.prod(view.strided.shape[a] for a in contracted[side])
    outputs = math.prod(view.strided.shape[a] for a in features)
    theirs = [batched[1 - side][batched[side].index(a)] for a in layers if a in batched[side]]
    ours, ends = [places[side][a] for a in layers], [places[side][a] for a in features]
    axis = places[1 - side][data.axis]
    rows = RowReaders(
        functools.partial(rows_of, axis=data.axis, features=contracted[1 - side], n=n, layers=theirs),
        functools.partial(rows_of, axis=axis, features=ends, n=n, layers=ours),
        tuple(a not in batched[side] for a in layers),
    )
    use = Use("dense", path, view.leaf, view.stack, "dot_general", matrix, inputs, outputs, layers=len(layers))
    array = _kronecker(eqn, values, visitor, n, use, rows, data.array)
    size = math.prod(matrix.shape[: len(layers)]) * outputs
    return [Value(array, axis, None, Output(path, size, _roles(array.shape, [*ours, *ends], size)))]


def conv(eqn: Any, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    """A convolution: a dense layer on patches, whose features are ordered (channels, *kernel); one for each group."""
    data, view = values[0], values[1].view
    numbers, options = eqn.params["dimension_numbers"], eqn.params
    groups = options["feature_group_count"]
    wrong = functools.partial(unsupported, eqn, values, visitor, n, path)
    if view is None or not view.plain:
        return wrong("conv_general_dilated of a function of it")
    if options["batch_group_count"] != 1:
        return wrong("conv_general_dilated in groups of the batch")
    if data.axis != numbers.lhs_spec[0]:
        return wrong("conv_general_dilated with data whose examples axis is lost")
    # a [5, 8, 8, 2] with a kernel [3, 3, 2, 6], no padding: the matrix [18, 6] is (2, 3, 3, 6) with (6, 36, 12, 1)
    #   rows of a: patches [5, 18, 6, 6] -> [5, 36, 18],    rows of the result [5, 6, 6, 6] -> [5, 36, 6]
    # In two groups, a kernel [3, 3, 1, 6]: two matrices, (2, 1, 3, 3, 3) with (3, 6, 18, 6, 1), on one channel each:
    #   rows of a: [2, 5, 36, 9],    rows of the result [2, 5, 36, 3]
    outward, inward, *spatial = numbers.rhs_spec
    each, layers = view.strided.shape[outward] // groups, int(groups > 1)
    split = view.strided.split(outward, groups)  # the groups at `outward`, the outputs of each behind them
    moved = [a + (a > outward) for a in (inward, *spatial)]
    matrix = split.transpose([outward, *moved, outward + 1])
    if not layers:
        matrix = matrix.drop(0)
    inputs = math.prod(view.strided.shape[a] for a in (inward, *spatial))
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")

    def patches(array: Array) -> Array:
        windows = jax.lax.conv_general_dilated_patches(
            jnp.transpose(array, numbers.lhs_spec),
            [view.strided.shape[a] for a in spatial],
            **{name: options[name] for name in names},
            precision=jax.lax.Precision.HIGHEST,
        )
        return _rows_in_groups(windows, 0, 1, groups, n)

    axis, feature, *_ = numbers.out_spec
    outputs = functools.partial(_rows_in_groups, axis=axis, feature=feature, groups=groups, n=n)
    rows = RowReaders(patches, outputs, (False,) * layers)
    use = Use("conv", path, view.leaf, view.stack, "conv_general_dilated", matrix, inputs, each, layers=layers)
    array = _kronecker(eqn, values, visitor, n, use, rows, data.array)
    size = groups * each
    return [Value(array, axis, None, Output(path, size, _roles(array.shape, (feature,), size)))]


def _rows_in_groups(array: Array, axis: int, feature: int, groups: int, n: int) -> Array:
    """Rows of an array whose features lie along one axis, [groups, N, ...] where there are several groups of them."""
    if groups == 1:
        return rows_of(array, axis, (feature,), n)
    split = array.reshape(*array.shape[:feature], groups, -1, *array.shape[feature + 1 :])
    return rows_of(split, axis + (axis > feature), (feature + 1,), n, (feature,))


def embedding(eqn: Any, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    """Rows of a table by index: a dense layer on one-hot rows, which are never formed."""
    view, index = values[0].view, values[1]
    numbers, shape = eqn.params["dimension_numbers"], values[0].array.shape
    wrong = functools.partial(unsupported, eqn, values, visitor, n, path)
    clips = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
    bounded = clips or eqn.params["mode"] == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    starts = ((0,), (0, 1)) if bounded else ((0,),)  # a whole row can start at 0 alone
    by_row = numbers.collapsed_slice_dims in ((0,), ()) and numbers.start_index_map in starts
    by_row = by_row and len(shape) == 2 and tuple(eqn.params["slice_sizes"]) == (1, shape[1])
    if view is None or view.base is not None or view.strided != Strided.whole(shape) or not by_row:
        return wrong("gather of anything but rows of a table")
    axis = 0 if index.axis is SHARED else index.axis
    if axis == LOST:
        return wrong("gather with indices whose examples axis is lost")
    place = [a for a in range(eqn.outvars[0].aval.ndim) if a not in numbers.offset_dims][axis]

    def ids(array: Array) -> Array:
        found = rows_of(array, axis, (array.ndim - 1,), n)
        return jnp.clip(found, 0, shape[0] - 1) if clips else found

    rows = RowReaders(
        ids,
        functools.partial(rows_of, axis=place, features=numbers.offset_dims, n=n),
    )
    use = Use("embedding", path, view.leaf, view.stack, "gather", view.strided, shape[0], shape[1], by_row=True)
    return [Value(_kronecker(eqn, values, visitor, n, use, rows, index.array), place)]


RULES = {"dot_general": dense, "conv_general_dilated": conv, "gather": embedding}
