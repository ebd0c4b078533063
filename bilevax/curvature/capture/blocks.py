"""Automatic capture: which block of the Gauss–Newton matrix each leaf of y gets, read off the traced model.

The model is traced once and its program walked equation by equation. A leaf that is contracted with data is a dense
layer, whatever the framework called it; the kernel of a convolution is a dense layer on patches; rows of a table that
are picked by index are an embedding; what meets the examples element by element has a diagonal block. Reshapes,
transposes, casts and broadcasts are looked through; jit, remat, custom rules and scans are entered.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.curvature.capture._remedies import CG, row_of_each
from bilevax.curvature.capture._walk import walk
from bilevax.curvature.capture.assignment import assigned
from bilevax.curvature.capture.block import Block
from bilevax.curvature.capture.choices import Blocks, chosen
from bilevax.curvature.capture.inputs import Examples, where
from bilevax.curvature.capture.places import FLAT, SHARED, Axis, Lost, Place, Spread, of_dtype
from bilevax.curvature.capture.programs import opened
from bilevax.curvature.capture.treatments import Unsupported, error
from bilevax.curvature.capture.uses import Covered, Path, Use, Value, View, Visitor, forget
from bilevax.typing import Array, PyTree


class Model(Protocol):
    """`model(y, inputs) -> outputs [N, ..., C]`, a function of yours."""

    def __call__(self, y: PyTree, inputs: PyTree, /) -> Array: ...


class Capture(NamedTuple):
    """A traced model, and the blocks of its leaves.

    Attributes:
      blocks: in the order of the leaves of y; each leaf belongs to one.
      run: `run(visitor, leaves) -> outputs`, the model with a visitor at each use.
      examples: N.
      outputs: what the model returns, its shape and dtype.
      doubt: which inputs were taken for examples, where N is the length of other axes too.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> captured = bx.curvature.capture.trace(lambda y, a: y[None] * a, jnp.ones(3), jnp.ones((5, 3)))
        >>> captured.examples, [(block.name, block.rule) for block in captured.blocks]
        (5, [('y', 'elementwise')])
    """

    blocks: Sequence[Block]
    run: Callable[[Visitor, Sequence[Array]], Array]
    examples: int
    outputs: jax.ShapeDtypeStruct
    doubt: str = ""


def named(y: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a pytree with their names, such as dense/kernel; y where there is but one."""

    def name(path: tuple[Any, ...]) -> str:
        wrapped = len(path) > 1 and str(path[-1]) == ".value"  # as flax.nnx wraps every parameter
        return jax.tree_util.keystr(path[:-1] if wrapped else path, simple=True, separator="/") or "y"

    leaves = jax.tree_util.tree_leaves_with_path(y)
    names = [name(path) for path, _ in leaves]
    if len(set(names)) < len(names):  # as with keys that contain a slash
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return [(name, leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]


def trace(
    model: Model,
    y: PyTree,
    inputs: PyTree,
    *,
    blocks: Blocks | None = None,
    unsupported: Unsupported = error,
    examples: Examples | None = None,
) -> Capture:
    """Traces a model and finds the block of each leaf of y.

    Args:
      model: `model(y, inputs) -> outputs [N, ..., C]`.
      y: inner variable; its values are not read.
      inputs: any pytree.
      blocks: what certain leaves get, path, pattern or function of the path -> `diagonal`, `identity`, `zero`, another
        such function, or the rank of a sketch; by default what the rules say.
      unsupported: what to do with leaves that no rule covers: `error`, `diagonal`, `identity`, `zero`, or a function
        of your own, leaf -> reason to leaf -> `Treatment`.
      examples: inputs -> the axis of each array that counts the examples, None where all share it, as `in_axes` of
        `jax.vmap`; by default the first axis wherever it has N rows.

    Returns:
      A `Capture`.

    Raises:
      ValueError: if a leaf is covered by no rule and `unsupported` is `error`, `blocks` names no leaf, or examples do
        not fit the inputs.

    Cost: tracing the model twice; nothing at run time.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> y = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
        >>> captured = bx.curvature.capture.trace(lambda y, a: a @ y["w"] + y["b"][None], y, jnp.ones((5, 3)))
        >>> [(block.name, block.rule, block.rows, block.outputs) for block in captured.blocks]
        [('w', 'dense', 4, 2)]
    """
    checks.floating("y", y)
    names, leaves = zip(*named(y), strict=True)
    program = opened(jax.make_jaxpr(model)(y, inputs))
    shapes = [var.aval.shape for var in program[0].outvars]
    if len(shapes) != 1 or len(shapes[0]) < 2:
        raise ValueError(
            f"model must return one array of outputs [N, ..., C]; got shapes {shapes}. Return the outputs alone, with "
            f"outputs[:, None] where each example has one number."
        )
    n = shapes[0][0]
    rows = where(inputs, n, examples)

    def follow(visitor: Visitor, leaves: Sequence[Array]) -> Value:
        held = [Value(leaf, views=(View.whole(k, 0, leaf),)) for k, leaf in enumerate(leaves)]
        data = [jnp.asarray(array) for array in jax.tree.leaves(inputs)]
        given = [Value(a, axis, kind=of_dtype(a.dtype, FLAT)) for a, axis in zip(data, rows.axes, strict=True)]
        (value,) = walk(program, [*held, *given], visitor, n)
        forget([value], visitor, (), "is the output")
        return value

    uses, axis, summed = _collected(follow, leaves)
    wrong = _no_rows(axis, summed if n > 1 else None, rows.doubt)
    choices = chosen(blocks, names)
    try:
        found = assigned(names, [jnp.shape(leaf) for leaf in leaves], uses, choices, unsupported, n)
    except ValueError as refused:
        if wrong and axis is SHARED:
            raise ValueError(wrong) from refused
        also = (
            f"Nor can the examples be followed to the outputs, where unsupported= does not help: take {CG}."
            if wrong
            else ""
        )
        raise ValueError(" ".join(filter(None, (str(refused), also, rows.doubt)))) from refused
    if wrong and any(block.treatment is None for block in found):
        raise ValueError(wrong)
    outputs = jax.ShapeDtypeStruct(shapes[0], program[0].outvars[0].aval.dtype)
    return Capture(found, lambda visitor, leaves: follow(visitor, leaves).array, n, outputs, rows.doubt)


def _no_rows(axis: Axis, summed: Lost | None, doubt: str) -> str:
    """Why outputs with this axis have no row for each example; "" where they do, or depend on none."""
    again = isinstance(axis, Spread) and axis.axes == (0,) and axis.moves > 1  # sorted, and back
    if axis == 0 or again or (axis is SHARED and summed is None):
        return ""
    if summed is not None:
        return row_of_each(f"they are summed over by {summed.where}", doubt, summed=True)
    return row_of_each(axis.what if isinstance(axis, Lost) else "they are in another order or place", doubt)


def _collected(
    follow: Callable[[Visitor, Sequence[Array]], Value], leaves: Sequence[Any]
) -> tuple[list[Use], Axis, Lost | None]:
    """All uses of leaves on the way to the outputs, the axis of the examples there, and what summed over it."""
    uses: dict[tuple[Path, Covered], Use] = {}
    places: list[Place] = []

    def note(slot: Any, use: Use, *rest: Any) -> Any:
        # Called as kronecker(slot, use, rows, outputs, inputs), elementwise(slot, use, leaf) and unsupported(use): the
        # first must return the outputs, the others None
        uses[use.path, use.covers] = use
        return rest[1] if len(rest) == 3 else None

    def once(leaves: Sequence[Array]) -> Array:
        value = follow(Visitor({}, note, note, functools.partial(note, None)), leaves)
        places.append(value.place)
        return value.array

    # Uses and places are no arrays, so that a trace cannot return them. Writing them down is sound: `once` is new,
    # hence traced here and never again, and a body that JAX traces twice writes the same use under the same path
    jax.eval_shape(once, [jnp.asarray(leaf) for leaf in leaves])
    (place,) = places
    return list(uses.values()), place.axis, place.summed
