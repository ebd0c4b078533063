"""What an equation of a model does with a parameter: dense layer, convolution, embedding, or scale and shift."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core

from bilevax.curvature.capture.batch_axis import result_places, selection
from bilevax.curvature.capture.places import SHARED, SMOOTH, Axis, Lost, Place, Spread, axes_of
from bilevax.curvature.capture.programs import opened
from bilevax.curvature.capture.rows import RowReaders, in_order, slots_of, unpushed
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

    def sliced(self, array: Array, leaf: Array) -> "View":
        """The view inside of a scan that slices it, where this array and this leaf stand: a layer of the stack."""
        here = View.whole(self.leaf, self.stack + 1, leaf)
        if self.base is None or self.linear is None:
            return here
        scale, start = self.linear.scale, self.linear.start

        def base(other: Array, made: Any) -> Array:
            change = (other - leaf) * (1 if scale is None else scale)
            return array + change.astype(array.dtype)

        linear = Linear(here.strided, scale, None if start is None else start[1:])
        return here._replace(base=base, linear=linear)

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
    """An array on the way: the axis of its examples, what it comes from (leaves, or a layer), if it depends on y."""

    array: Array
    axis: Axis = SHARED
    views: tuple[View, ...] = ()
    output: Output | None = None
    kind: int = SMOOTH
    summed: Lost | None = None
    counts: tuple[int | None, ...] = ()

    @classmethod
    def at(cls, array: Array, place: Place) -> "Value":
        """An array that is no view of leaves."""
        return cls(array, place.axis, kind=place.kind, summed=place.summed, counts=place.counts)

    @property
    def place(self) -> Place:
        """What is followed of it."""
        return Place(self.axis, self.kind, self.summed, self.counts)


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
      slots: how many slots hold examples for each layer; 0 where they lie in their order.
      alone: what is wrong with it, unless it joins a layer as its bias.
      divides: whether each example could have a leaf of its own here.
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
    slots: int = 0
    alone: str = ""
    divides: bool = True

    @property
    def covers(self) -> Covered:
        """What it is a use of."""
        return Covered(self.leaf, self.part, self.turned)


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
    places = result_places(eqn, [value.place for value in values], n)
    results = [Value.at(array, place) for array, place in zip(arrays, places, strict=True)]
    if len(results) == 1 and unpushed(results[0].axis):
        results[0] = results[0]._replace(axis=_pushed(eqn, values, results[0], n))
    return results


def _pushed(eqn: Any, values: Sequence[Value], result: Value, n: int) -> Spread:
    """The slots of a result, with what goes there: the weights take the way of the examples."""
    # einsum("sec,sd->ecd", send, a): weights [6] stand in the place of a [6, 4], and the first column [3, 2] of the
    # result is what the slots weigh; a slot that holds no example weighs nothing
    spread: Any = result.axis
    chosen = selection(eqn, [value.place for value in values])
    moving = range(len(values)) if eqn.primitive.name == "concatenate" else [0 if chosen is None else chosen[0]]
    exact = eqn.primitive.name in ("dot_general", "scatter", "scatter-add")  # all operands have one type

    def push(q: Array, mask: Array | None) -> Array:
        arrays = [value.array for value in values]
        for k in moving:
            full = _weights_like(values[k], q, mask)
            arrays[k] = full.astype(values[k].array.dtype) if exact else full
        (moved,) = bind(eqn, arrays)
        others = [a for a in range(moved.ndim) if a not in spread.axes]
        return jnp.transpose(moved, [*spread.axes, *others]).reshape(*(moved.shape[a] for a in spread.axes), -1)[..., 0]

    return spread._replace(push=push)


def _weights_like(data: Value, q: Array, mask: Array | None) -> Array:
    """The weights of the examples in the shape of an array that holds them."""
    axes, shape = axes_of(data.axis), jnp.shape(data.array)
    given = data.axis.push if isinstance(data.axis, Spread) else None
    weights = in_order(q, mask, [shape[a] for a in axes]) if given is None else given(q, mask)
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    thin = [size if a in axes else 1 for a, size in enumerate(shape)]
    return jnp.broadcast_to(jnp.transpose(weights, order).reshape(thin), shape)


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
    axis = result_places(eqn, [value.place for value in values], n)[0].axis
    axes = axes_of(axis)
    name, shape, values = eqn.primitive.name, eqn.outvars[0].aval.shape, list(values)
    for k, value in enumerate(values):
        own = None
        for view in value.views:
            strided, linear = view.strided, view.linear
            if name != "concatenate":
                order = range(len(strided.shape))
                strided = strided.broadcast(shape, order)
                linear = linear and linear.broadcast(value.array.shape, shape, order)
            what = _why_not(axis, strided, shape, n)
            slots = what is not None and slots_of(axis, shape) > 0  # where a bias may join, but has no diagonal
            if what is not None and not slots:
                visitor.unsupported(uncovered(path, view, f"{name}: {what}"))
                continue
            moved = view.base is None or len(value.views) > 1
            joins = _joined(linear, values[1 - k].output) if name == "add" and linear and moved else None
            use = Use("elementwise", path, view.leaf, view.stack, name, joins=joins, part=view.part)
            if slots:
                visitor.unsupported(use._replace(alone=f"{name}: {what}"))
                continue
            one = functools.reduce(Strided.drop, sorted(axes, reverse=True), strided)
            own = changed(value, own, view, one, visitor.own(use, view))
        if own is not None:
            values[k] = value._replace(array=_spread_out(own, axes, shape, n))
    return plain(eqn, values, n)


def entering(value: Value, place: Place, visitor: Visitor, n: int, path: Path) -> Value:
    """A function of leaves that becomes an array of the examples, as a learnt first state does in a loop over time."""
    # h0 [4], seen as [5, 4] with strides (0, 1), is a carry whose axis inside the loop is 0
    own, shape = None, value.array.shape
    for view in value.views:
        what = _why_not(place.axis, view.strided, shape, n)
        if what is not None or not isinstance(place.axis, int):
            visitor.unsupported(uncovered(path, view, f"scan over a function of it: {what}"))
            continue
        use = Use("elementwise", path, view.leaf, view.stack, "scan", part=view.part)
        own = changed(value, own, view, view.strided.drop(place.axis), visitor.own(use, view))
    array = value.array if own is None else _spread_out(own, axes_of(place.axis), shape, n)
    return Value.at(array, value.place._replace(axis=SHARED, counts=()))


def _why_not(axis: Axis, strided: Strided, shape: Sequence[int], n: int) -> str | None:
    """Why a view cannot have a leaf for each example."""
    if isinstance(axis, Lost):
        return f"examples axis is lost: {axis.what}"
    if axis is SHARED:
        return "examples axis is lost: summed over"
    if isinstance(axis, Spread) and axis.partial:
        return "examples axis is lost: sums over microbatches have none"
    if slots_of(axis, shape) not in (0, n):  # n of them are the examples in another order
        return "examples lie in slots, scale and shift them where they are in their order"
    same = all(strided.shape[a] == shape[a] and (shape[a] == 1 or not strided.strides[a]) for a in axes_of(axis))
    return None if same else "other values for other examples"


def _spread_out(own: Array, axes: Sequence[int], shape: Sequence[int], n: int) -> Array:
    """What each example has of its own, [N, ...], along the axes that count them."""
    own = own.reshape(*(shape[a] for a in axes), *own.shape[1:]) if len(axes) > 1 else own
    own = jnp.moveaxis(own, range(len(axes)), axes)
    return jnp.repeat(own, shape[axes[0]] // n, axes[0]) if len(axes) == 1 else own


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
