"""What is kept of the curvature of a block: two Kronecker factors, each in a form of its own, or a diagonal.

A factor is Σ_r weight_r row_r row_rᵀ over rows [R, d]. It is kept as

    dense      [d, d], the sum itself
    diagonal   [d], for a table, and for an axis that is too long for more
    rows       √weight_r row_r, [R, d], where that is less: exact, but it adds up with nothing
    sketch     its product with a fixed random matrix [d, r], which adds up as the sum itself does
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bilevax.curvature import capture
from bilevax.printing import by_text
from bilevax.typing import Array


class Rows(NamedTuple):
    """A factor XᵀX by the rows of X; leading axes are stacked layers.

    Attributes:
      rows: X, [..., R, d].

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.curvature.kronecker.Rows(jnp.array([[1.0, 2.0]])).trace.item()
        5.0
    """

    rows: Array

    @property
    def size(self) -> int:
        """The size of the factor."""
        return int(self.rows.shape[-1])

    @property
    def trace(self) -> Array:
        """Of the factor."""
        return jnp.sum(self.rows**2, axis=(-2, -1))


class Sketch(NamedTuple):
    """A factor A by its product with a fixed random matrix Ω [d, r]; leading axes are stacked layers.

    Attributes:
      image: A Ω, [..., d, r].
      trace: of A.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.curvature.kronecker.Sketch(jnp.ones((3, 2)), jnp.array(1.0)).size
        3
    """

    image: Array
    trace: Array

    @property
    def size(self) -> int:
        """The size of the factor."""
        return int(self.image.shape[-2])


Factor: TypeAlias = Array | Rows | Sketch


def random_matrix(size: int, rank: int, dtype: jnp.dtype) -> Array:
    """Ω [size, rank] of a sketch, the same wherever it is asked for: signs, its columns of length 1."""
    return jax.random.rademacher(jax.random.key(size), (size, rank), dtype) / math.sqrt(size)


class Form(NamedTuple):
    """How one factor is kept.

    Attributes:
      sum: `sum(rows [R, d], weights [R] or None) -> factor`, weights being 1 where there are none.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.curvature.forms.diagonal.sum(jnp.array([[1.0, 2.0], [3.0, 4.0]]), None).tolist()
        [10.0, 20.0]
    """

    sum: Callable[[Array, Array | None], Factor]
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)

    def empty(self, rows: int, size: int, dtype: jnp.dtype) -> Factor:
        """The shapes of a factor of so many rows of this size."""
        shapes = (jax.ShapeDtypeStruct((rows, size), dtype), jax.ShapeDtypeStruct((rows,), dtype))
        found: Factor = jax.eval_shape(self.sum, *shapes)
        return found

    def shown(self, rows: int, size: int) -> str:
        """What a report says of it: [64, 64], [64] or rows [10, 64]."""
        kept = self.empty(rows, size, jnp.dtype(jnp.float32))
        name = f"{type(kept).__name__.lower()} " if isinstance(kept, Rows | Sketch) else ""
        return f"{name}{list(jax.tree.leaves(kept)[0].shape)}"

    def numbers(self, rows: int, size: int) -> int:
        """How many numbers are kept."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.empty(rows, size, jnp.dtype(jnp.float32))))


def _times(rows: Array, weights: Array | None) -> Array:
    return rows if weights is None else rows * weights[:, None]


dense = Form(lambda rows, weights: rows.T @ _times(rows, weights), text="dense")
"""The factor itself, [d, d]."""
diagonal = Form(lambda rows, weights: jnp.sum(_times(rows**2, weights), axis=0), text="diagonal")
"""Its diagonal, [d]."""
rows = Form(lambda rows, weights: Rows(_times(rows, None if weights is None else jnp.sqrt(weights))), text="rows")
"""What it is made of, `Rows`."""


@functools.cache
def sketch(rank: int) -> Form:
    """Its product with a fixed random matrix of so many columns, `Sketch`."""

    def total(rows: Array, weights: Array | None) -> Sketch:
        image = _times(rows, weights).T @ (rows @ random_matrix(rows.shape[-1], rank, rows.dtype))
        return Sketch(image, jnp.sum(_times(rows**2, weights)))

    return Form(total, text=f"sketch({rank})")


ChooseForm: TypeAlias = Callable[[int, int | None], Form]
"""(d, R) -> the form of a factor [d, d] of R rows; R is None where factors of several sources are added up."""


def sketched(rank: int) -> ChooseForm:
    """Factors larger than twice the rank by a sketch, those of fewer rows than that by these, and others whole."""

    def form(size: int, count: int | None) -> Form:
        if count is not None and count <= 2 * rank and 2 * count <= size:
            return rows
        return sketch(rank) if 2 * rank < size else dense

    return form


Forms: TypeAlias = tuple[Form, Form]  # of A and of B


class Kept(NamedTuple):
    """What decides in which form the factors of a block are kept.

    Attributes:
      form: `form(d, R) -> Form`.
      largest: a factor above it is kept as its diagonal.
      fresh: whether factors are used as they are measured, and added to no others.
    """

    form: ChooseForm
    largest: int
    fresh: bool

    def of(self, block: capture.Block, first: int, second: int) -> Forms:
        """The forms of A and B of a block whose factors are made of so many rows in one measurement."""

        def one(size: int, rows: int) -> Form:
            if size > self.largest:
                return diagonal
            if block.twin:  # what is added up before it is inverted
                return dense
            form = self.form if block.rank is None else sketched(block.rank)
            return form(size, rows if self.fresh and block.uses == 1 else None)

        a = diagonal if block.by_row else one(block.rows, first)
        return a, diagonal if block.by_column else one(block.outputs, second)


def _scaled(factor: Factor, scale: Array) -> Factor:
    """The factor times a number for each layer."""

    def times(array: Array, scale: Array) -> Array:
        return array * scale.reshape(scale.shape + (1,) * (array.ndim - scale.ndim))

    if isinstance(factor, Rows):
        return Rows(times(factor.rows, jnp.sqrt(scale)))
    return jax.tree.map(lambda array: times(array, scale), factor)


def mean_eigenvalue(factor: Factor, is_diagonal: bool) -> Array:
    """The mean eigenvalue of a factor, for each layer."""
    if isinstance(factor, Rows | Sketch):
        return factor.trace / factor.size
    return jnp.mean(factor if is_diagonal else jnp.diagonal(factor, axis1=-2, axis2=-1), axis=-1)


class Kronecker(NamedTuple):
    """The factors of one block as means over the data, which add up over batches and agents; leading axes: layers.

    Attributes:
      a: 1/N Σ_n w_n Σ_t m_nt ā ā_ᵀ, [d_in, d_in] with the bias last; the diagonal [d_in] of a table or of a long axis;
        or `Rows`, or a `Sketch`.
      mass: 1/N Σ_n w_n Σ_t m_nt, that of a.
      b: B, [d_out, d_out], or in another form likewise.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.curvature.kronecker.Kronecker(jnp.array([[6.0]]), jnp.array(2.0), jnp.eye(1)).A.tolist()
        [[3.0]]
    """

    a: Factor
    mass: Array
    b: Factor

    @property
    def A(self) -> Factor:  # noqa: N802
        """The normalised factor A = a / mass; 0 where every weight is 0."""
        return _scaled(self.a, 1 / jnp.where(self.mass > 0, self.mass, 1))

    @property
    def B(self) -> Factor:  # noqa: N802
        """The factor B."""
        return self.b

    @property
    def diagonals(self) -> tuple[bool, bool]:
        """Whether a, and b, are kept as their diagonals."""
        depth = jnp.ndim(self.mass) + 1
        kept = [not isinstance(factor, Rows | Sketch) and factor.ndim == depth for factor in (self.a, self.b)]
        return kept[0], kept[1]

    @property
    def mean_eigenvalue(self) -> Array:
        """Of A ⊗ B, for each layer."""
        first, second = self.diagonals
        return mean_eigenvalue(self.A, first) * mean_eigenvalue(self.B, second)


class Diagonal(NamedTuple):
    """The diagonal of one block.

    Attributes:
      diagonal: shaped like the leaf; like the matrix [..., d_in, d_out] of a layer that has no factors.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.kronecker.Diagonal(1.0).diagonal
        1.0
    """

    diagonal: Array


Factors = dict[str, Kronecker | Diagonal]  # by the name of the weight
