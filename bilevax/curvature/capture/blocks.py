"""Automatic capture: which block of the Gauss–Newton matrix each leaf of y gets, read off the traced model.

The model is traced once and its program walked equation by equation. A leaf that is contracted with data is a dense
layer, whatever the framework called it; the kernel of a convolution is a dense layer on patches; rows of a table that
are picked by index are an embedding; what meets the examples element by element has a diagonal block. Reshapes,
transposes, casts and broadcasts are looked through; jit, remat, custom rules and scans are entered.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.curvature.capture._remedies import remedies
from bilevax.curvature.capture._walk import walk
from bilevax.curvature.capture.choices import Blocks, Choice, chosen
from bilevax.curvature.capture.inputs import Examples, where
from bilevax.curvature.capture.places import FLAT, SHARED, Axis, Lost, Spread, of_dtype
from bilevax.curvature.capture.programs import opened
from bilevax.curvature.capture.uses import Covered, Path, Use, Value, View, Visitor, forget
from bilevax.curvature.capture.view import UNUSED, WHOLE, Part, Strided
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
        f"convolution with the examples, rows of a table, or an element-wise scale or shift.{remedies(leaves)} Pass "
        f"unsupported=bx.curvature.capture.diagonal (or identity, or zero), or mark a layer with bx.curvature.observe."
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
      part: which elements of the leaf, where static slices of it have blocks of their own.
      bias_part: the same for the bias.
      shape: of the leaf or part, without the axes that scans take off.
      without: parts of the leaf that other blocks cover, where this is what no part of the model uses.
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
      diagonal: whether the matrix has the diagonal of its curvature for a block, and no factors.
      rank: of the sketches of its factors, where one is chosen for this block.
      turned: whether the outputs stand before the inputs in the leaf.
      twin: the block of the same leaf, used as the transpose; both are inverted together, as that which is not turned.
      by_column: whether the factor B is wanted as its diagonal, since the twin is a table.
      slots: how many slots hold examples for each layer; 0 where they lie in their order.

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
    part: Part = WHOLE
    bias_part: Part = WHOLE
    shape: tuple[int, ...] = ()
    without: tuple[Part, ...] = ()
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
    diagonal: bool = False
    rank: int | None = None
    turned: bool = False
    twin: str = ""
    by_column: bool = False
    slots: int = 0

    @property
    def factored(self) -> bool:
        """Whether its block is A ⊗ B."""
        return self.matrix is not None and not self.diagonal

    @property
    def second(self) -> bool:
        """Whether the block is inverted as a part of its twin."""
        return self.turned and self.twin != ""

    @property
    def rows(self) -> int:
        """Rows of the matrix, the bias included."""
        return self.inputs + (self.bias is not None)

    @property
    def covers(self) -> Covered:
        """The leaf and the part of it, by which uses find their block."""
        return Covered(self.leaf, UNUSED if self.without else self.part, self.turned)

    def take(self, leaf: Array) -> Array:
        """What the block covers of its leaf, [*stack, *shape]: the part, or what the other parts leave, 0 elsewhere."""
        if self.part == WHOLE and not self.without:
            return leaf
        if self.part != WHOLE:
            return self._scanned(self.part.of)(leaf)
        for part in self.without:
            leaf = leaf - _put(self._scanned(part.of), self._scanned(part.of)(leaf), leaf)
        return leaf

    def put(self, value: Array, leaf: Array) -> Array:
        """The leaf, shaped like this one, that is 0 but where the block covers it."""
        return value if self.part == WHOLE else _put(self.take, value, leaf)

    def _scanned(self, function: Callable[..., Array]) -> Callable[..., Array]:
        for _ in range(len(self.stack) - self.layers):
            function = jax.vmap(function)
        return function

    def pack(self, leaves: Mapping[int, Array]) -> Array:
        """The matrix [*stack, rows, outputs] of these leaves of y, by place."""
        # w [4, 2, 3] of einsum("ntd,dhe->nthe") and b [2, 3]: [4, 6] over [1, 6] -> [5, 6]. Six layers w [6, 4, 4] that
        # a scan slices have the stack (6,), over which this is mapped: [6, 4, 4]. Three experts w [3, 4, 6] with
        # b [3, 6] are layers of one matrix: [3, 5, 6]
        arrangement: Any = self.matrix

        def matrix(weight: Array, *bias: Array) -> Array:
            stack = self.stack[len(self.stack) - self.layers :]
            weight = weight if self.part == WHOLE else self.part.of(weight)
            rows = [arrangement.of(weight).reshape(*stack, self.inputs, self.outputs)]
            biases = [b if self.bias_part == WHOLE else self.bias_part.of(b) for b in bias]
            return jnp.concatenate([*rows, *(b.reshape(*stack, 1, self.outputs) for b in biases)], axis=-2)

        return self._scanned(matrix)(leaves[self.leaf], *(() if self.bias is None else (leaves[self.bias],)))

    def unpack(self, matrix: Array, leaves: Mapping[int, Array]) -> dict[int, Array]:
        """The leaves that a matrix [*stack, rows, outputs] belongs to; shapes of them are read off `leaves`."""
        places = list(dict.fromkeys(k for k in (self.leaf, self.bias) if k is not None))
        like = [jax.ShapeDtypeStruct(jnp.shape(leaves[k]), matrix.dtype) for k in places]

        def pack(parts: list[Array]) -> Array:
            return self.pack(dict(zip(places, parts, strict=True)))

        (parts,) = jax.linear_transpose(pack, like)(matrix)  # a rearrangement: its transpose is its inverse
        return dict(zip(places, parts, strict=True))


def _put(take: Callable[[Array], Array], value: Array, leaf: Array) -> Array:
    """The transpose of taking a part: zeros around it."""
    return jax.linear_transpose(take, jax.ShapeDtypeStruct(jnp.shape(leaf), value.dtype))(value)[0]


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

    uses, axis = _collected(follow, leaves)
    choices = chosen(blocks, names)
    try:
        found = _with_choices(names, [jnp.shape(leaf) for leaf in leaves], uses, choices, unsupported, n)
    except ValueError as refused:
        if not rows.doubt:
            raise
        raise ValueError(f"{refused} {rows.doubt}") from refused
    again = isinstance(axis, Spread) and axis.axes == (0,) and axis.moves > 1  # sorted, and back
    if axis not in (0, SHARED) and not again and any(block.treatment is None for block in found):
        what = axis.what if isinstance(axis, Lost) else "they are in another order or place"
        raise ValueError(
            f"model must return outputs [N, ..., C] whose row n belongs to example n of the inputs; got outputs in "
            f"which the examples cannot be followed to the first axis: {what}. Put them there, in their order. "
            f"{rows.doubt}".rstrip()
        )
    outputs = jax.ShapeDtypeStruct(shapes[0], program[0].outvars[0].aval.dtype)
    return Capture(found, lambda visitor, leaves: follow(visitor, leaves).array, n, outputs, rows.doubt)


def _collected(follow: Callable[[Visitor, Sequence[Array]], Value], leaves: Sequence[Any]) -> tuple[list[Use], Axis]:
    """All uses of leaves on the way to the outputs, and the axis of the examples there; nothing is computed."""
    uses: dict[tuple[Path, Covered], Use] = {}
    axes: set[Axis] = set()

    def note(slot: Any, use: Use, *rest: Any) -> Any:
        # Called as kronecker(slot, use, rows, outputs, inputs), elementwise(slot, use, leaf) and unsupported(use): the
        # first must return the outputs, the others None
        uses[use.path, use.covers] = use
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


def _with_choices(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    uses: Sequence[Use],
    choices: Mapping[int, Choice],
    unsupported: Unsupported,
    n: int,
) -> list[Block]:
    """The blocks, of which some leaves have others than the rules say."""
    made = {
        leaf: _answered(choice, {names[leaf]: "chosen by blocks"})[names[leaf]]
        for leaf, choice in choices.items()
        if not isinstance(choice, int)
    }
    by_name = {names[leaf]: treatment for leaf, treatment in made.items()}

    def answer(leaves: Mapping[str, str]) -> dict[str, Treatment]:
        rest = {name: what for name, what in leaves.items() if name not in by_name}
        return {**(_answered(unsupported, rest) if rest else {}), **by_name}

    # A leaf with a treatment is none that the rules see; nor is it the bias of a layer, or has one
    left = []
    for use in uses:
        bias = None if use.bias is None or use.bias.leaf in made else use.bias
        if use.leaf not in made:
            left.append(use._replace(bias=bias))
        elif made[use.leaf].probes:
            left.append(use._replace(bias=bias, joins=None))
    what = {leaf: " and ".join(dict.fromkeys(use.what for use in uses if use.leaf == leaf)) for leaf in choices}
    ranks = {leaf: choice for leaf, choice in choices.items() if isinstance(choice, int)}
    blocks = []
    for block in _blocks(names, shapes, left, answer, n, {k: made[k] for k in made if made[k].probes}):
        if block.treatment is not None and what.get(block.leaf):
            block = block._replace(what=what[block.leaf])
        blocks.append(block._replace(rank=ranks.get(block.leaf) if block.matrix is not None else None))
    return blocks


def _answered(unsupported: Unsupported, leaves: Mapping[str, str]) -> dict[str, Treatment]:
    """A treatment for each of these leaves."""
    treatments = unsupported(leaves)
    for name in leaves:
        treatment = treatments.get(name) if isinstance(treatments, Mapping) else None
        if not isinstance(treatment, Treatment):
            raise ValueError(
                f"unsupported must return a dict with a Treatment for each leaf that it is given; got {treatment!r} "
                f"for {name}. Return, say, bx.curvature.capture.identity(leaves)."
            )
    return {name: treatments[name] for name in leaves}


def _blocks(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    uses: Sequence[Use],
    unsupported: Unsupported,
    n: int,
    wanted: Mapping[int, Treatment],
) -> list[Block]:
    """The blocks of every leaf: one, for a weight with its bias, or one for each part; diagonals where wanted."""
    by_leaf: dict[int, list[Use]] = {leaf: [] for leaf in range(len(names))}
    for use in uses:
        by_leaf[use.leaf].append(use)
    taps = [use for use in uses if use.explicit]
    for leaf in {use.leaf for use in taps}:
        by_leaf[leaf] = _observed(by_leaf[leaf], shapes[leaf])
    apart = {leaf for leaf, found in by_leaf.items() if _apart(found, shapes[leaf])}
    once = {leaf for leaf in apart & {*wanted} if _once(by_leaf[leaf])}
    apart -= {*wanted} - once
    biases = _biases([use for leaf in sorted(apart) for use in by_leaf[leaf]], taps)
    blocks: dict[int, list[Block]] = {}
    missing: dict[int, str] = {}
    shared: list[int] = []
    for leaf, name in enumerate(names):
        found = by_leaf[leaf]
        wrong = [use.what for use in found if not use.covered]
        wrong += [use.alone for use in found if use.alone and leaf not in _owners(biases)]
        if not found or wrong:
            missing[leaf] = ", ".join(dict.fromkeys(wrong)) or "meets no examples in model"
        elif leaf in apart and (leaf in _owners(biases) or any(use.matrix is not None for use in found)):
            blocks[leaf] = _parts(name, shapes[leaf], found, biases)
        elif leaf not in wanted and (twins := _twins(name, shapes[leaf], found)):
            blocks[leaf] = twins
        elif all(use.matrix is None and not use.derived for use in found) and len({use.stack for use in found}) == 1:
            blocks[leaf] = [_block(name, shapes[leaf], [use._replace(part=WHOLE) for use in found])]
        elif not all(use.divides for use in found):
            what = " and ".join(dict.fromkeys(use.what for use in found))
            missing[leaf] = f"used in different ways, {what}, where examples have no leaf of their own"
        else:
            shared.append(leaf)
    blocks |= _diagonals(names, shapes, {leaf: by_leaf[leaf] for leaf in shared}, n, wanted)
    if missing:
        treatments = _answered(unsupported, {names[leaf]: what for leaf, what in missing.items()})
        for leaf, what in missing.items():
            treatment = treatments[names[leaf]]
            blocks[leaf] = [Block(names[leaf], treatment.rule, leaf, treatment=treatment, what=what)]
    for leaf in once:
        blocks[leaf] = [b if b.matrix is None else b._replace(rule="diagonal", diagonal=True) for b in blocks[leaf]]
    return [block for leaf in sorted(blocks) for block in blocks[leaf]]


def _span(part: Part, shape: Sequence[int]) -> Part:
    return Part.ordered(0, [(math.prod(shape), 1)]) if part == WHOLE else part


def _count(parts: Iterable[Part], size: int) -> np.ndarray:
    """How many of these parts of a leaf hold each of its elements."""
    count = np.zeros(size, np.uint8)
    for part in parts:
        np.lib.stride_tricks.as_strided(count[part.offset :], part.shape, part.strides)[...] += 1
    return count


def _observed(uses: Sequence[Use], shape: tuple[int, ...]) -> list[Use]:
    """The uses that count where the model marks some of them: these, and those of parts that it does not mark."""
    inner = shape[uses[0].stack :]
    marked = _count({_span(use.part, inner) for use in uses if use.explicit}, math.prod(inner)) > 0

    def free(use: Use) -> bool:
        return use.part != WHOLE and not marked[_count([use.part], len(marked)) > 0].any()

    return [use for use in uses if use.explicit or free(use)]


def _apart(uses: Sequence[Use], shape: tuple[int, ...]) -> bool:
    """Whether a leaf, or each part of it that the model uses, is used in one way, and no element in two parts."""
    ways = {(use.covers, use.stack, use.matrix, use.layers, use.inputs, use.outputs, use.by_row) for use in uses}
    parts = {use.part for use in uses}
    if len(ways) > len(parts) or len({use.stack for use in uses}) > 1 or not all(use.covered for use in uses):
        return False
    if any(use.derived for use in uses) or not parts:
        return False
    inner = shape[uses[0].stack :]
    return len(parts) == 1 or int(_count((_span(part, inner) for part in parts), math.prod(inner)).max()) < 2


def _once(uses: Sequence[Use]) -> bool:
    """Whether a leaf, or each part of it, is the weight of one layer, which is used once."""
    single = len({use.part for use in uses}) == len(uses)
    return single and all(use.matrix is not None and use.times == 1 for use in uses)


def _owners(biases: Mapping[Covered, Covered]) -> set[int]:
    return {covers.leaf for covers in biases.values()}


def _biases(uses: Sequence[Use], taps: Sequence[Use]) -> dict[Covered, Covered]:
    """Weight -> bias, where each use of the one is joined by the other and by nothing else."""
    # Leaves 0: b, 1: w of tanh(a w + b), whose product is equation 0: the use of w has the path (0,), that of b joins
    # (0,), so joined = {(0,): 0} and found = {1: 0}. In tanh(a w + b) w the second use of w is joined by none: {}
    by_part = defaultdict(list)
    for use in uses:
        by_part[use.covers].append(use)
    found = {use.covers: use.bias for use in taps if use.bias is not None}
    joined = {use.joins: use.covers for use in uses if use.joins is not None}
    for covers, here in by_part.items():
        paths = {(use.path, covers) for use in here}
        partners = {joined.get(path) for path in paths}
        bias = partners.pop() if len(partners) == 1 else None
        if bias is None or covers in found or (bias.part != WHOLE and covers.part == WHOLE):
            continue
        if all(use.joins in paths for use in by_part[bias]) and by_part[bias][0].stack == here[0].stack:
            found[covers] = bias
    return found


def _parts(name: str, shape: tuple[int, ...], uses: Sequence[Use], biases: Mapping[Covered, Covered]) -> list[Block]:
    """A block for each part of a leaf, and one for what the model does not use of it, whose curvature is 0."""
    by_part: dict[Part, list[Use]] = defaultdict(list)
    for use in uses:
        by_part[use.part].append(use)
    stack, leaf = uses[0].stack, uses[0].leaf
    inner = shape[stack:]
    blocks = []
    for part, here in by_part.items():
        if here[0].covers not in biases.values():
            text = "" if part == WHOLE else part.text(inner)
            blocks.append(_block(f"{name}{text}", shape, here, biases.get(here[0].covers)))
    if WHOLE not in by_part and not _count(by_part, math.prod(inner)).all():
        unused = Treatment("no curvature", lambda b, delta, scale: b / jnp.where(delta > 0, delta, scale))
        rest = Block(f"{name} (unused part)", unused.rule, leaf, stack=shape[:stack], shape=inner, treatment=unused)
        blocks.append(rest._replace(without=tuple(by_part), what="meets no examples in model"))
    return blocks


def _twins(name: str, shape: tuple[int, ...], uses: Sequence[Use]) -> list[Block]:
    """Two blocks of a leaf that is a matrix and its transpose, such as a table that is the output layer too."""
    blocks = []
    for covers in sorted({use.covers for use in uses}):
        here = [use for use in uses if use.covers == covers]
        if len({(use.stack, use.matrix, use.inputs, use.outputs, use.by_row) for use in here}) > 1 or here[0].layers:
            return []
        blocks.append(_block(name, shape, here))
    if len(blocks) != 2 or any(block.matrix is None or block.stack != blocks[0].stack for block in blocks):
        return []
    first, second = blocks
    straight: Any = first.matrix and first.matrix.reshape((first.inputs, first.outputs))
    turned: Any = second.matrix and second.matrix.reshape((second.inputs, second.outputs))
    if None in (straight, turned) or first.part != second.part or straight != turned.transpose((1, 0)):
        return []
    names = [f"{name}{'' if block.part == WHOLE else block.part.text(shape[len(block.stack) :])}" for block in blocks]
    one, other = names[0], f"{names[1]}.T"
    return [first._replace(name=one, twin=other), second._replace(name=other, twin=one, by_column=first.by_row)]


EXACT = 2**24
"""How many numbers (examples times elements) exact diagonals of leaves that are no layers may take together."""


def _diagonals(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    uses: Mapping[int, Sequence[Use]],
    n: int,
    wanted: Mapping[int, Treatment],
) -> dict[int, list[Block]]:
    """Diagonals of leaves that a layer is a function of, or that are used in several ways: exact for the small ones."""
    blocks, left = {}, EXACT
    for leaf in sorted(uses, key=lambda leaf: math.prod(shapes[leaf])):
        numbers = n * math.prod(shapes[leaf])
        stacks = {use.stack for use in uses[leaf]}
        exact = numbers <= left and len(stacks) == 1
        left -= numbers if exact else 0
        what = " and ".join(dict.fromkeys(use.what for use in uses[leaf]))
        estimated = wanted.get(leaf, diagonal({names[leaf]: what})[names[leaf]])
        treatment = None if exact else estimated
        depth = stacks.pop() if exact else 0
        block = Block(names[leaf], "diagonal", leaf, stack=shapes[leaf][:depth], shape=shapes[leaf][depth:])
        explicit = any(use.explicit for use in uses[leaf])
        block = block._replace(explicit=explicit, uses=len(uses[leaf]), treatment=treatment, what=what)
        blocks[leaf] = [block if treatment is None else block._replace(rule=treatment.rule)]
    return blocks


def _block(name: str, shape: tuple[int, ...], uses: Sequence[Use], bias: Covered | None = None) -> Block:
    """The block of a leaf, or of a part of it, with these uses."""
    use = uses[0]
    rule = " and ".join(dict.fromkeys(use.rule for use in uses))
    what = " and ".join(dict.fromkeys(use.what for use in uses))
    inner = shape[use.stack :] if use.part == WHOLE else use.part.shape
    stack = shape[: use.stack] + (() if use.matrix is None else use.matrix.shape[: use.layers])
    place = (use.leaf, None, stack, use.part, WHOLE, inner, ())
    kind = (use.matrix, use.inputs, use.outputs, use.positions, use.by_row, use.explicit)
    number = sum(use.times for use in uses)
    block = Block(name, rule, *place, *kind, uses=number, what=what, layers=use.layers)
    block = block._replace(turned=use.turned, slots=use.slots)
    return block if bias is None else block._replace(bias=bias.leaf, bias_part=bias.part)
