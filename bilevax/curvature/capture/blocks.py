"""Automatic capture: which block of the Gauss–Newton matrix each leaf of y gets, read off the traced model.

The model is traced once and its program walked equation by equation. A leaf that is contracted with data is a dense
layer, whatever the framework called it; the kernel of a convolution is a dense layer on patches; rows of a table that
are picked by index are an embedding; what meets the examples element by element has a diagonal block. Reshapes,
transposes, casts and broadcasts are looked through; jit, remat, custom rules and scans are entered.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.curvature.capture._walk import walk
from bilevax.curvature.capture.batch_axis import SHARED, Axis, opened
from bilevax.curvature.capture.uses import Path, Use, Value, View, Visitor, forget
from bilevax.curvature.capture.view import Strided
from bilevax.typing import Array, PyTree, Scalar


class Model(Protocol):
    """`model(y, inputs) -> outputs [N, ..., C]`, a function of yours."""

    def __call__(self, y: PyTree, inputs: PyTree, /) -> Array: ...


class SolveLeaf(Protocol):
    """v of one leaf, for b, weight decay and damping together (delta), and the mean eigenvalue of the other blocks."""

    def __call__(self, b: Array, delta: Scalar, scale: Scalar, /) -> Array: ...


class Treatment(NamedTuple):
    """What happens to a leaf that no rule covers.

    Attributes:
      rule: its name in reports.
      solve: `solve(b, delta, scale) -> v` for each leaf; scale is the mean eigenvalue of the other blocks.
      probes: random signs with which its diagonal is estimated; with 0, it is not, and `solve` is asked.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.capture.zero({"w": "unused"})["w"].rule
        'zero'
    """

    rule: str
    solve: SolveLeaf | None = None
    probes: int = 0


Unsupported = Callable[[Mapping[str, str]], Mapping[str, Treatment]]


def error(leaves: Mapping[str, str]) -> NoReturn:
    """Refuses leaves that no rule covers; the default.

    Args:
      leaves: name of the leaf -> what the model does with it.

    Raises:
      ValueError: always; it names every leaf and the primitive that uses it.

    Cost: none.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.capture.error({"w": "exp"})
        Traceback (most recent call last):
        ...
        ValueError: model must use each leaf of y in a way that has a curvature block; got w (exp)...
    """
    found = ", ".join(f"{name} ({what})" for name, what in leaves.items())
    raise ValueError(
        f"model must use each leaf of y in a way that has a curvature block; got {found}. Expected a matrix product or "
        f"convolution with the examples, rows of a table, or an element-wise scale or shift. Pass unsupported="
        f"bx.curvature.capture.diagonal (or identity, or zero), or mark the layer with bx.curvature.observe."
    )


def diagonal(leaves: Mapping[str, str], probes: int = 32) -> dict[str, Treatment]:
    """Estimates the diagonal of the Gauss–Newton matrix for leaves that no rule covers.

        diag(G) ≈ 1/R Σ_r (Σ_n ±1 √(w_n/N) J_nᵀ u_n)²

    Args:
      leaves: name of the leaf -> what the model does with it.
      probes: R, vectors of random signs; the error falls like 1/√R. To choose it, `functools.partial(diagonal,
        probes=100)`.

    Returns:
      A `Treatment` for each leaf.

    Cost: `probes` backward passes whenever factors are computed.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.capture.diagonal({"w": "exp"})["w"].probes
        32
    """
    return {name: Treatment("diagonal, estimated", None, probes) for name in leaves}


def identity(leaves: Mapping[str, str]) -> dict[str, Treatment]:
    """Scales leaves that no rule covers like the mean of the other blocks: v = b / (delta + mean eigenvalue).

    Args:
      leaves: name of the leaf -> what the model does with it.

    Returns:
      A `Treatment` for each leaf.

    Cost: none.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.capture.identity({"w": "exp"})["w"].rule
        'identity'
    """
    return {name: Treatment("identity", lambda b, delta, scale: b / (delta + scale)) for name in leaves}


def zero(leaves: Mapping[str, str]) -> dict[str, Treatment]:
    """Drops leaves that no rule covers: v = 0 there, so that the inverse is only positive semidefinite.

    Args:
      leaves: name of the leaf -> what the model does with it.

    Returns:
      A `Treatment` for each leaf.

    Cost: none.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.capture.zero({"w": "exp"})["w"].rule
        'zero'
    """
    return {name: Treatment("zero", lambda b, delta, scale: jnp.zeros_like(b)) for name in leaves}


class Block(NamedTuple):
    """The block of the Gauss–Newton matrix that one leaf, or a weight with its bias, gets.

    Attributes:
      name: path of the leaf.
      rule: its name in reports: dense, conv, embedding, observed, elementwise, or that of a treatment.
      leaf: its place among the leaves of y.
      bias: that of the bias in the last row of the matrix, or None.
      stack: a block for each of its elements: leading axes of the leaf, then axes that count layers.
      matrix: how the rest of the leaf lies in a matrix [*layers, inputs, outputs]; None for a diagonal block.
      inputs: rows of that matrix.
      outputs: columns of it.
      positions: rows for each example.
      by_row: whether the matrix is a table of which examples pick rows.
      explicit: whether the model marked it by `observe`; uses that it did not mark are none of the block's.
      uses: how often the model uses it, each iteration of a loop counted.
      treatment: of a leaf that no rule covers.
      what: the primitives.
      layers: how many of the axes of `stack` are axes of the matrix.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> y = {"b": jnp.zeros(2), "w": jnp.ones((3, 2))}
        >>> captured = bx.curvature.capture.trace(lambda y, a: a @ y["w"] + y["b"][None], y, jnp.ones((5, 3)))
        >>> captured.blocks[0].pack({0: y["b"], 1: y["w"]}).tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    """

    name: str
    rule: str
    leaf: int
    bias: int | None = None
    stack: tuple[int, ...] = ()
    matrix: Strided | None = None
    inputs: int = 0
    outputs: int = 0
    positions: int = 0
    by_row: bool = False
    explicit: bool = False
    uses: int = 0
    treatment: Treatment | None = None
    what: str = ""
    layers: int = 0

    @property
    def rows(self) -> int:
        """Rows of the matrix, the bias included."""
        return self.inputs + (self.bias is not None)

    def pack(self, leaves: Mapping[int, Array]) -> Array:
        """The matrix [*stack, rows, outputs] of these leaves of y, by place."""
        # w [4, 2, 3] of einsum("ntd,dhe->nthe") and b [2, 3]: [4, 6] over [1, 6] -> [5, 6]. Six layers w [6, 4, 4] that
        # a scan slices have the stack (6,), over which this is mapped: [6, 4, 4]. Three experts w [3, 4, 6] with
        # b [3, 6] are layers of one matrix: [3, 5, 6]
        arrangement: Any = self.matrix
        scanned = len(self.stack) - self.layers

        def matrix(weight: Array, *bias: Array) -> Array:
            stack = self.stack[scanned:]
            rows = [arrangement.of(weight).reshape(*stack, self.inputs, self.outputs)]
            return jnp.concatenate([*rows, *(b.reshape(*stack, 1, self.outputs) for b in bias)], axis=-2)

        for _ in range(scanned):
            matrix = jax.vmap(matrix)
        return matrix(leaves[self.leaf], *(() if self.bias is None else (leaves[self.bias],)))

    def unpack(self, matrix: Array, leaves: Mapping[int, Array]) -> dict[int, Array]:
        """The leaves that a matrix [*stack, rows, outputs] belongs to; shapes of them are read off `leaves`."""
        places = [self.leaf] if self.bias is None else [self.leaf, self.bias]
        like = [jax.ShapeDtypeStruct(jnp.shape(leaves[k]), matrix.dtype) for k in places]

        def pack(parts: list[Array]) -> Array:
            return self.pack(dict(zip(places, parts, strict=True)))

        (parts,) = jax.linear_transpose(pack, like)(matrix)  # a rearrangement: its transpose is its inverse
        return dict(zip(places, parts, strict=True))


class Capture(NamedTuple):
    """A traced model, and the blocks of its leaves.

    Attributes:
      blocks: in the order of the leaves of y; each leaf belongs to one.
      run: `run(visitor, leaves) -> outputs`, the model with a visitor at each use.
      examples: N.
      outputs: what the model returns, its shape and dtype.

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


def trace(model: Model, y: PyTree, inputs: PyTree, *, unsupported: Unsupported = error) -> Capture:
    """Traces a model and finds the block of each leaf of y.

    Args:
      model: `model(y, inputs) -> outputs [N, ..., C]`.
      y: inner variable; its values are not read.
      inputs: any pytree; arrays of it with N as their first axis hold the examples.
      unsupported: what to do with leaves that no rule covers: `error`, `diagonal`, `identity`, `zero`, or a function
        of your own, leaf -> reason to leaf -> `Treatment`.

    Returns:
      A `Capture`.

    Raises:
      ValueError: if a leaf is covered by no rule and `unsupported` is `error`.

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
    if all(jnp.shape(array)[:1] != (n,) for array in jax.tree.leaves(inputs)):
        raise ValueError(
            f"inputs must hold the examples of the outputs [N, ..., C] along the first axis of an array; got outputs "
            f"{shapes[0]} and no array with {n} rows. Return outputs with one row for each example."
        )

    def follow(visitor: Visitor, leaves: Sequence[Array]) -> Value:
        held = [Value(leaf, view=View(k, 0, leaf, None, Strided.whole(leaf.shape))) for k, leaf in enumerate(leaves)]
        data = [jnp.asarray(array) for array in jax.tree.leaves(inputs)]
        examples = [Value(array, 0 if array.shape[:1] == (n,) else SHARED) for array in data]
        (value,) = walk(program, [*held, *examples], visitor, n)
        forget([value], visitor, (), "is the output")
        return value

    uses, axis = _collected(follow, leaves)
    blocks = _blocks(names, [jnp.shape(leaf) for leaf in leaves], uses, unsupported)
    if axis not in (0, SHARED) and any(block.treatment is None for block in blocks):
        raise ValueError(
            "model must return outputs [N, ..., C] whose row n belongs to example n of the inputs; got outputs in "
            "which the examples cannot be followed to the first axis. Put them there, in their order."
        )
    outputs = jax.ShapeDtypeStruct(shapes[0], program[0].outvars[0].aval.dtype)
    return Capture(blocks, lambda visitor, leaves: follow(visitor, leaves).array, n, outputs)


def _collected(follow: Callable[[Visitor, Sequence[Array]], Value], leaves: Sequence[Any]) -> tuple[list[Use], Axis]:
    """All uses of leaves on the way to the outputs, and the axis of the examples there; nothing is computed."""
    uses: dict[tuple[Path, int], Use] = {}
    axes: set[Axis] = set()

    def note(slot: Any, use: Use, *rest: Any) -> Any:
        # Called as kronecker(slot, use, rows, outputs, inputs), elementwise(slot, use, leaf) and unsupported(use): the
        # first must return the outputs, the others None
        uses[use.path, use.leaf] = use
        return rest[1] if len(rest) == 3 else None

    def once(leaves: Sequence[Array]) -> Array:
        value = follow(Visitor({}, note, note, functools.partial(note, None)), leaves)
        axes.add(value.axis)
        return value.array

    # Uses and axes are no arrays, so that a trace cannot return them. Writing them down is sound: `once` is new, hence
    # traced here and never again, and a body that JAX traces twice writes the same use under the same path
    jax.eval_shape(once, [jnp.asarray(leaf) for leaf in leaves])
    (axis,) = axes
    return list(uses.values()), axis


def _blocks(
    names: Sequence[str], shapes: Sequence[tuple[int, ...]], uses: Sequence[Use], unsupported: Unsupported
) -> list[Block]:
    """One block for each leaf, or for a weight and its bias."""
    by_leaf = defaultdict(list)
    for use in uses:
        by_leaf[use.leaf].append(use)
    taps = [use for use in uses if use.explicit]
    for use in taps:
        by_leaf[use.leaf] = [other for other in by_leaf[use.leaf] if other.explicit]
    biases = _biases(by_leaf, taps)
    blocks, missing = {}, {}
    for leaf, name in enumerate(names):
        if leaf in biases.values():
            continue
        block = _block(name, leaf, shapes[leaf], by_leaf[leaf], biases.get(leaf))
        if isinstance(block, str):
            missing[leaf] = block
        else:
            blocks[leaf] = block
    if missing:
        treatments = unsupported({names[leaf]: what for leaf, what in missing.items()})
        for leaf, what in missing.items():
            treatment = treatments.get(names[leaf]) if isinstance(treatments, Mapping) else None
            if not isinstance(treatment, Treatment):
                raise ValueError(
                    f"unsupported must return a dict with a Treatment for each leaf that it is given; got "
                    f"{treatment!r} for {names[leaf]}. Return, say, bx.curvature.capture.identity(leaves)."
                )
            blocks[leaf] = Block(names[leaf], treatment.rule, leaf, treatment=treatment, what=what)
    return [blocks[leaf] for leaf in sorted(blocks)]


def _biases(by_leaf: Mapping[int, Sequence[Use]], taps: Sequence[Use]) -> dict[int, int]:
    """Weight -> bias, where each use of the one is joined by the other and by nothing else."""
    # Leaves 0: b, 1: w of tanh(a w + b), whose product is equation 0: the use of w has the path (0,), that of b joins
    # (0,), so joined = {(0,): 0} and found = {1: 0}. In tanh(a w + b) w the second use of w is joined by none: {}
    found = {use.leaf: use.bias for use in taps if use.bias is not None}
    joined = {use.joins: use.leaf for uses in by_leaf.values() for use in uses if use.joins is not None}
    for leaf, uses in by_leaf.items():
        paths = {use.path for use in uses}
        partners = {joined.get(path, -1) for path in paths}
        bias = partners.pop() if len(partners) == 1 else -1
        if bias < 0 or leaf in found:
            continue
        if all(use.joins in paths for use in by_leaf[bias]) and by_leaf[bias][0].stack == uses[0].stack:
            found[leaf] = bias
    return found


def _block(name: str, leaf: int, shape: tuple[int, ...], uses: Sequence[Use], bias: int | None) -> Block | str:
    """The block of a leaf with these uses; what is wrong, where they have none."""
    if not uses:
        return "meets no examples in model"
    wrong = [use.what for use in uses if not use.covered]
    layouts = {(use.stack, use.matrix, use.layers, use.inputs, use.outputs, use.by_row) for use in uses}
    if wrong:
        return ", ".join(dict.fromkeys(wrong))
    what = " and ".join(dict.fromkeys(use.what for use in uses))
    if len(layouts) > 1:
        return f"used in different ways: {what}"
    use = uses[0]
    rule = " and ".join(dict.fromkeys(use.rule for use in uses))
    kind = (use.matrix, use.inputs, use.outputs, use.positions, use.by_row, use.explicit)
    stack = shape[: use.stack] + (() if use.matrix is None else use.matrix.shape[: use.layers])
    number = sum(use.times for use in uses)
    return Block(name, rule, leaf, bias, stack, *kind, uses=number, what=what, layers=use.layers)
