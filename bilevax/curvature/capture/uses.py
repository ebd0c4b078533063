"""What an equation of a model does with a parameter: dense layer, convolution, embedding, or scale and shift."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core

from bilevax.curvature.capture.batch_axis import LOST, SHARED, Axis, opened, result_axes
from bilevax.curvature.capture.view import WHOLE, Linear, Part, Strided, contiguous
from bilevax.typing import Array

# What follows the examples element by element, or puts arrays side by side.
ELEMENTWISE = ("add", "sub", "mul", "div", "max", "min", "pow", "select_n", "concatenate", "clamp")

MARK = "bilevax_observe"  # the name of a call that does nothing else


Path = tuple[int, ...]
"""Where an equation is: its number in the program, then in the program that it calls, ..."""


class Covered(NamedTuple):
    """What a use is of, by which it finds its block.

    Attributes:
      leaf: which leaf.
      part: which elements of it.
      turned: whether it is used as the transpose of the matrix that it is, outputs before inputs.
    """

    leaf: int
    part: Part = WHOLE
    turned: bool = False


class View(NamedTuple):
    """How an array depends on one leaf, or on one part of a leaf.

    Attributes:
      leaf: which leaf.
      stack: how many leading axes of the leaf were taken off by scans.
      array: the leaf, without these axes.
      base: leaf or part -> array, all else held; None for the leaf or part itself.
      strided: how the elements of `base(leaf)` are arranged.
      linear: the derivative, where elements were but moved, scaled and placed; None where they were not.
      part: which elements of the leaf; `WHOLE` for all.
    """

    leaf: int
    stack: int
    array: Array
    base: Callable[[Array, dict[Path, list[Any]]], Array] | None
    strided: Strided
    linear: Linear | None
    part: Part = WHOLE

    @classmethod
    def whole(cls, leaf: int, stack: int, array: Array) -> "View":
        """A leaf as it is."""
        strided = Strided.whole(array.shape)
        return cls(leaf, stack, array, None, strided, Linear(strided))

    def of(self, leaf: Array, strided: Strided, made: dict[Path, list[Any]] | None = None) -> Array:
        """What stands here for another value of the leaf or part, in an arrangement of its own."""
        return strided.of(leaf if self.base is None else self.base(leaf, {} if made is None else made))

    @property
    def covers(self) -> Covered:
        """What it is a view of."""
        return Covered(self.leaf, self.part)

    @property
    def root(self) -> Array:
        """The leaf, or the part of it."""
        return self.array if self.part == WHOLE else self.part.of(self.array)


class Output(NamedTuple):
    """What a Kronecker use returned, seen through views: features have strides below `size`, rows above.

    Attributes:
      path: of the use.
      size: of a row of features.
      strided: of the array.
      pieces: which leaf or part made which features.
    """

    path: Path
    size: int
    strided: Strided
    pieces: Mapping[Covered, Part]


class Value(NamedTuple):
    """An array on the way, the axis of its examples, and what it comes from: leaves, or a layer."""

    array: Array
    axis: Axis = SHARED
    views: tuple[View, ...] = ()
    output: Output | None = None


class Use(NamedTuple):
    """One use of a leaf.

    Attributes:
      rule: its name, for reports alone.
      path: where it is.
      leaf: of which leaf.
      stack: how many leading axes scans took off the leaf.
      what: the primitive, or what is wrong.
      matrix: arrangement of the leaf as a matrix [*layers, inputs, outputs].
      inputs: length of the rows of activations.
      outputs: length of the rows of outputs.
      positions: rows for each example.
      joins: the path of the use to whose output this one is added as a bias, and what it is a use of.
      bias: the leaf in the last row of the matrix, where the use names one, and its part.
      by_row: whether the matrix is a table of which examples pick rows, by ids: its factor A is a diagonal over them.
      explicit: whether the model says so by `observe`: other uses of the leaf do not count then.
      times: how often a loop repeats it with the same leaf.
      covered: whether a rule covers it.
      layers: how many leading axes of the matrix count layers, each with rows and a block of its own.
      derived: whether a layer has another function of the leaf for its kernel.
      part: of which part of the leaf.
      turned: whether the outputs stand before the inputs there.
    """

    rule: str
    path: Path
    leaf: int
    stack: int
    what: str
    matrix: Strided | None = None
    inputs: int = 0
    outputs: int = 0
    positions: int = 0
    joins: tuple[Path, Covered] | None = None
    bias: Covered | None = None
    by_row: bool = False
    explicit: bool = False
    times: int = 1
    covered: bool = True
    layers: int = 0
    derived: bool = False
    part: Part = WHOLE
    turned: bool = False

    @property
    def covers(self) -> Covered:
        """What it is a use of."""
        return Covered(self.leaf, self.part, self.turned)


class RowReaders(NamedTuple):
    """How rows of features lie in the arrays around a Kronecker use: functions to [*layers, N, positions, features]."""

    # einsum("ntd,dhe->nthe") of a [5, 7, 4] and w [4, 2, 3], a matrix [4, 6]: inputs [5, 7, 4] -> [5, 7, 4], outputs
    # [5, 7, 2, 3] -> [5, 7, 6]; on positions merged before, [35, 4] -> [5, 7, 4]; ids of rows of a table -> [5, 7, 1].
    # Three experts w [3, 4, 6] on one a [5, 4]: outputs [5, 3, 6] -> [3, 5, 1, 6], inputs [5, 1, 4], `same` = (True,)
    inputs: Callable[[Array], Array]
    outputs: Callable[[Array], Array]
    same: tuple[bool, ...] = ()  # for each axis of layers, whether all of them read the same inputs, without that axis


class KroneckerUse(Protocol):
    """The outputs of a layer, or something in their place."""

    def __call__(self, slot: Any, use: Use, rows: RowReaders, outputs: Array, inputs: Array, /) -> Array: ...


class ElementwiseUse(Protocol):
    """A leaf (or part) for each example, [N, ...], or None for the leaf itself."""

    def __call__(self, slot: Any, use: Use, leaf: Array, /) -> Array | None: ...


class Visitor(NamedTuple):
    """Who is called at each use.

    Attributes:
      slots: what the visitor keeps for each leaf, or part of one, leading axes like those that scans take off the leaf.
      kronecker: `kronecker(slot, use, rows, outputs, inputs) -> outputs`.
      elementwise: `elementwise(slot, use, leaf) -> a leaf for each example [N, ...] or None`.
      unsupported: `unsupported(use)`.
    """

    slots: Mapping[Covered, Any]
    kronecker: KroneckerUse
    elementwise: ElementwiseUse
    unsupported: Callable[[Use], None]

    def own(self, use: Use, view: View) -> Array | None:
        """A leaf (or part) for each example, or None: that of a part where the visitor keeps it, else of the leaf."""
        whole, part = Covered(use.leaf), Covered(use.leaf, use.part)
        if use.part == WHOLE or part in self.slots or whole not in self.slots:
            return self.elementwise(self.slots.get(part), use, view.root)
        leaves = self.elementwise(self.slots[whole], use, view.array)
        return None if leaves is None else jax.vmap(use.part.of)(leaves)


def bind(eqn: Any, arrays: Sequence[Any]) -> list[Any]:
    """The results of one equation, by JAX's own evaluator of programs: how a primitive is bound differs by version."""
    given = {var: a for var, a in zip(eqn.invars, arrays, strict=True) if not isinstance(var, core.Literal)}
    alone = _empty().replace(invars=list(given), outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*given.values())


@functools.cache
def _empty() -> Any:
    return opened(jax.make_jaxpr(lambda: ())())[0]


def plain(eqn: Any, values: Sequence[Value], n: int) -> list[Value]:
    """The results of an equation that uses no leaf, or whose use is not told apart."""
    arrays = bind(eqn, [value.array for value in values])
    axes = result_axes(eqn, [value.axis for value in values], n)
    return [Value(array, axis) for array, axis in zip(arrays, axes, strict=True)]


def unsupported(eqn: Any, values: list[Value], visitor: Visitor, n: int, path: Path, what: str) -> list[Value]:
    """Tells the visitor that no rule fits the leaves in this equation."""
    forget(values, visitor, path, what)
    return plain(eqn, values, n)


def forget(values: Sequence[Value], visitor: Visitor, path: Path, what: str) -> None:
    """Tells the visitor of leaves whose further way cannot be followed."""
    for value in values:
        for view in value.views:
            visitor.unsupported(uncovered(path, view, what))


def uncovered(path: Path, view: View, what: str) -> Use:
    """A use that no rule covers."""
    return Use("unsupported", path, view.leaf, view.stack, what, covered=False, part=view.part)


Window = Mapping[int, tuple[int, int]]
"""Axes of an array of which but a part is read: where it starts, and its size."""


def rows_of(
    array: Array, axis: int, features: Sequence[int], n: int, layers: Sequence[int] = (), window: Window | None = None
) -> Array:
    """Rows [*layers, N, positions, features] of (a window of) an array whose examples lie along `axis`."""
    # n = 5: [3, 5, 2, 4] with axis 1 and features (2, 3) -> transposed [5, 3, 2, 4] -> [5, 3, 8]; merged [15, 4] with
    # axis 0 -> [5, 3, 4]; with layers (2,) and features (3,) -> [2, 5, 3, 4]
    for place, (start, size) in (window or {}).items():
        array = jax.lax.slice_in_dim(array, start, start + size, axis=place)
    others = [a for a in range(array.ndim) if a != axis and a not in features and a not in layers]
    size = math.prod(array.shape[a] for a in features)
    rows = jnp.transpose(array, [*layers, axis, *others, *features])
    return rows.reshape(*rows.shape[: len(layers)], n, -1, size)


def changed(value: Value, own: Array | None, view: View, strided: Strided, leaves: Array | None) -> Array | None:
    """What stands in the place of a value for each example, [N, ...], where this view of it has leaves of their own."""
    if leaves is None:
        return own
    there = jax.vmap(lambda leaf: view.of(leaf, strided))(leaves).astype(value.array.dtype)
    return there if own is None else own + (there - view.of(view.root, strided)[None].astype(there.dtype))


def elementwise(eqn: Any, values: list[Value], visitor: Visitor, n: int, path: Path) -> list[Value]:
    """A leaf that meets the examples element by element: the visitor may give each example a leaf of its own."""
    # γ [4] on a [15, 4], which are 5 examples in 3 rows each: seen as (15, 4) with strides (0, 1), the same for all.
    # The visitor answers with γ_n [5, 4], or None; each fills the rows of its example, [5, 4] -> [15, 4].
    axes = {value.axis for value in values if value.axis is not SHARED}
    axis = axes.pop() if len(axes) == 1 else LOST
    name, shape, values = eqn.primitive.name, eqn.outvars[0].aval.shape, list(values)
    for k, value in enumerate(values):
        own = None
        for view in value.views:
            strided, linear = view.strided, view.linear
            if name != "concatenate":
                order = range(len(strided.shape))
                strided = strided.broadcast(shape, order)
                linear = linear and linear.broadcast(value.array.shape, shape, order)
            if axis == LOST or strided.shape[axis] != shape[axis] or (shape[axis] > 1 and strided.strides[axis]):
                what = "examples axis is lost" if axis == LOST else "other values for other examples"
                visitor.unsupported(uncovered(path, view, f"{name}: {what}"))
                continue
            moved = view.base is None or len(value.views) > 1
            joins = _joined(linear, values[1 - k].output) if name == "add" and linear and moved else None
            use = Use("elementwise", path, view.leaf, view.stack, name, joins=joins, part=view.part)
            own = changed(value, own, view, strided.drop(axis), visitor.own(use, view))
        if own is not None:
            own = jnp.repeat(jnp.moveaxis(own, 0, axis), shape[axis] // n, axis)
            values[k] = value._replace(array=own)
    return plain(eqn, values, n)


def _joined(linear: Linear, output: Output | None) -> tuple[Path, Covered] | None:
    """The use that a view is the bias of: constant over its rows, one number for each feature that it makes."""
    # a w [5, 3, 6] in rows of 6 has strides (18, 6, 1), and b [6], seen as (5, 3, 6), has (0, 0, 1): the same along
    # features, 0 along rows. Two axes of features, [5, 7, 2, 3] with (42, 6, 3, 1), take b [2, 3] with (0, 0, 3, 1).
    # Of [w1 w2], joined, w2 makes the features 3 to 6, and of [b1 b2] it is b2 that stands there
    if output is None or linear.scale is not None or len(output.strided.shape) != len(linear.strided.shape):
        return None
    sizes, roles = linear.strided.shape, output.strided.strides
    features = [a for a, role in enumerate(roles) if role < output.size]
    features.sort(key=lambda a: -roles[a])
    wanted = dict(zip(features, contiguous([sizes[a] for a in features]), strict=True))
    for a, (size, stride, full) in enumerate(zip(*linear.strided, output.strided.shape, strict=True)):
        if (size > 1 and stride != (wanted.get(a, 0) if roles[a] else 0)) or (a not in wanted and size != full):
            return None
    made = Part.ordered(sum(linear.starts[a] * roles[a] for a in features), [(sizes[a], roles[a]) for a in features])
    return next(((output.path, covers) for covers, part in output.pieces.items() if part == made), None)


# Explicit taps


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
    if count is None or not splits or outputs.axis in (LOST, SHARED) or inputs.axis in (LOST, SHARED):
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
    of = Use("observed", path, view.leaf, view.stack, "observe", linear.strided, width, size, positions, part=view.part)
    use = of._replace(bias=bias, explicit=True)
    array = visitor.kronecker(visitor.slots.get(use.covers), use, rows, outputs.array, inputs.array)
    return [Value(array, outputs.axis)]
