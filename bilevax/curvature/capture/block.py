"""The block of the curvature that one leaf, or a part of it, gets, and where its elements lie."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax.curvature.capture.treatments import Treatment
from bilevax.curvature.capture.uses import Covered
from bilevax.curvature.capture.view import UNUSED, WHOLE, Part, Strided
from bilevax.typing import Array


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
