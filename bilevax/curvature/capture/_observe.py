"""The way out for layers that the capture cannot see: the model says what they are."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bilevax.curvature.capture.places import Axis, axes_of
from bilevax.curvature.capture.rows import RowReaders, rows_of, slots_of, unpushed, weigh
from bilevax.curvature.capture.uses import MARK, Path, Use, Value, Visitor
from bilevax.curvature.capture.view import Linear
from bilevax.typing import Array


def observe(outputs: Array, inputs: Array, weight: Array, bias: Array | None = None) -> Array:
    """Says inside a model that outputs = inputs · weight + bias, up to shapes; the identity on outputs.

    Curvatures then take weight and bias for a dense layer, and do not look at what else happens to them: the way out
    for layers that the automatic capture cannot see. The model stays an ordinary function, for every transformation.

    Args:
      outputs: [N, ..., *outputs], the trailing axes together as long as a row of the weight.
      inputs: [N, ..., d_in], what is multiplied with the weight, on the same positions.
      weight: a leaf of y, or a view of one, that is [d_in, d_out] up to its shape.
      bias: a leaf of y with d_out elements, or None.

    Returns:
      `outputs`.

    Raises:
      ValueError: if the sizes do not fit each other.

    Cost: none.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> y, inputs = jnp.ones((3, 2)), jnp.ones((5, 3))
        >>> bx.curvature.observe(inputs @ y, inputs, y).shape
        (5, 2)
    """
    size = jnp.size(weight) // jnp.shape(inputs)[-1]
    fits = jnp.size(weight) == jnp.shape(inputs)[-1] * size and _width(jnp.shape(outputs), size) is not None
    if not fits or (bias is not None and jnp.size(bias) != size):
        raise ValueError(
            f"outputs, inputs, weight and bias must be those of a dense layer, inputs [N, ..., d_in] and weight [d_in, "
            f"d_out]; got {jnp.shape(outputs)}, {jnp.shape(inputs)}, {jnp.shape(weight)} and a bias of "
            f"{None if bias is None else jnp.shape(bias)}. Pass what the layer multiplies, its features last."
        )
    return jax.jit(_mark)(outputs, inputs, weight, *(() if bias is None else (bias,)))


def _mark(outputs: Array, *layer: Array) -> Array:
    return outputs * jnp.ones((), outputs.dtype)


_mark.__name__ = MARK


def _followed(axis: Axis) -> bool:
    return bool(axes_of(axis)) and not unpushed(axis)


def _width(shape: Sequence[int], size: int) -> int | None:
    """How many trailing axes have `size` elements together."""
    return next((k for k in range(1, len(shape) + 1) if math.prod(shape[-k:]) == size), None)


def _plain(linear: Linear | None) -> bool:
    return linear is not None and linear.scale is None and linear.start is None


def tap(values: Sequence[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    """The rule of `observe`."""
    outputs, inputs, weight, *rest = values
    linears = [view.linear for value in (weight, *rest) for view in value.views if len(value.views) == 1]
    linear = linears[0] if len(linears) == 1 + len(rest) else None
    if linear is None or not linear.once or not all(map(_plain, linears)):
        raise ValueError(
            "weight (and bias) of observe must be leaves of y, or reshapes of them; got another function. Pass the "
            "leaves themselves."
        )
    view, bias = weight.views[0], rest[0].views[0].covers if rest else None
    width, shape = inputs.array.shape[-1], linear.strided.shape
    size = math.prod(shape) // width
    splits = any(math.prod(shape[:k]) == width for k in range(len(shape) + 1))
    count = _width(outputs.array.shape, size)
    if count is None or not splits or not (_followed(outputs.axis) and _followed(inputs.axis)):
        raise ValueError(
            "outputs and inputs of observe must hold the examples along an axis, and its weight be [d_in, d_out] up to "
            "its shape; got others. Transpose the weight, or observe a layer that sees the examples."
        )
    features = range(outputs.array.ndim - count, outputs.array.ndim)
    rows = RowReaders(
        functools.partial(rows_of, axis=inputs.axis, features=(inputs.array.ndim - 1,), n=n),
        functools.partial(rows_of, axis=outputs.axis, features=features, n=n),
    )
    positions = jax.eval_shape(rows.outputs, outputs.array).shape[1]
    if (found := jax.eval_shape(rows.inputs, inputs.array).shape[1]) != positions:
        raise ValueError(
            f"inputs of observe must have the positions of its outputs, {positions} for each example; got {found}. "
            f"Pass the activations that made these outputs."
        )
    rows = rows._replace(weights=weigh(outputs.axis, (), (), positions))
    of = Use("observed", path, view.leaf, view.stack, "observe", linear.strided, width, size, positions, part=view.part)
    held = slots_of(outputs.axis, outputs.array.shape)
    use = of._replace(bias=bias, explicit=True, slots=held, divides=not held)
    array = visitor.kronecker(visitor.slots.get(use.covers), use, rows, outputs.array, inputs.array)
    return [Value(array, outputs.axis)]
