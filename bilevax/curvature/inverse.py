"""Damped inverses of Kronecker products."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.curvature.bases import eigenbasis, mean_outside, symmetric, transposed
from bilevax.curvature.forms import (
    ChooseForm,
    Factor,
    Form,
    Kronecker,
    Rows,
    Sketch,
    dense,
    mean_eigenvalue,
    sketch,
    sketched,
)
from bilevax.curvature.forms import rows as kept_as_rows
from bilevax.printing import as_called, by_text
from bilevax.typing import Array, Scalar

WIDE = 1024  # a factor up to this size is decomposed whole by `by_shape`
RANK = 256  # of the sketch of a wider one
STEEP = 1e-3  # largest eigenvalue / damping, times machine precision, above which bases are made orthonormal anew
Damping = Scalar | Callable[[Array], Scalar]


class Eigen(NamedTuple):
    """A decomposition of A ⊗ B; leading axes are stacked layers.

    Attributes:
      qa: [..., d_in, r_in], eigenvectors of A; None where A is diagonal (an embedding). There may be fewer than d_in.
      qb: [..., d_out, r_out], eigenvectors of B, likewise.
      eigenvalues: [..., r_in, r_out], of the product, or the diagonal of the curvature in this basis (EKFAC).
      tail: those of the product of an eigenvector of A and what is outside of Q_B, [..., r_in, 1]; the other way round,
        [..., 1, r_out]; and outside of both, [..., 1, 1]. None without a sketch: they are 0, where there are any.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> parts = bx.curvature.kronecker.spectral.decompose(2.0 * jnp.eye(1), 3.0 * jnp.eye(1), 0.0)
        >>> parts.qa.tolist(), parts.eigenvalues.tolist()
        ([[1.0]], [[6.0]])
    """

    qa: Array | None
    qb: Array | None
    eigenvalues: Array
    tail: tuple[Array, Array, Array] | None = None

    @property
    def rows(self) -> int:
        """Of the block, d_in."""
        return int(self.eigenvalues.shape[-2] if self.qa is None else self.qa.shape[-2])

    @property
    def columns(self) -> int:
        """Of the block, d_out."""
        return int(self.eigenvalues.shape[-1] if self.qb is None else self.qb.shape[-2])


class Cholesky(NamedTuple):
    """Cholesky factors of A + π√δ I and B + √δ/π I; for a diagonal A, the roots of its elements.

    Attributes:
      a: [..., d_in, d_in], or [..., d_in].
      b: [..., d_out, d_out].

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.curvature.kronecker.factored.decompose(jnp.eye(1), jnp.eye(1), 9.0).a.tolist()
        [[2.0]]
    """

    a: Array
    b: Array


class Decompose(Protocol):
    """What is worth keeping of A and B, for `Solve` to read."""

    def __call__(self, a: Any, b: Any, delta: Scalar, /) -> Any: ...


class Solve(Protocol):
    """The inverse of A ⊗ B + delta I, applied to v."""

    def __call__(self, parts: Any, delta: Scalar, v: Array, /) -> Array: ...


class Inverse(NamedTuple):
    """A way to invert A ⊗ B + δ I.

    Attributes:
      decompose: `decompose(a, b, delta) -> parts`, A [..., d_in, d_in] or its diagonal [..., d_in], B likewise, but not
        both diagonals; or in the form that was asked for.
      solve: `solve(parts, delta, v) -> (A ⊗ B + delta I)⁻¹ v`, v [..., d_in, d_out].
      eigenvalues: `eigenvalues(parts)`, [..., d_in, d_out]; None where they are not known.
      form: `form(d, R)`, in which form a factor [d, d] of R rows is wanted; R is None where others are added to it.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> spectral = bx.curvature.kronecker.spectral
        >>> parts = spectral.decompose(jnp.array([[2.0]]), jnp.array([[3.0]]), 0.0)
        >>> spectral.solve(parts, 2.0, jnp.array([[8.0]])).tolist()
        [[1.0]]
    """

    decompose: Decompose
    solve: Solve
    eigenvalues: Callable[[Any], Array] | None = None
    form: ChooseForm = lambda size, rows: dense
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


def _are_diagonal(a: Factor, b: Factor) -> tuple[bool, bool]:
    """Whether A, and B, are given by their diagonals; not both of them are."""
    depth = max(jax.tree.leaves(factor)[0].ndim for factor in (a, b)) - 2
    kept = [not isinstance(factor, Rows | Sketch) and factor.ndim == depth + 1 for factor in (a, b)]
    return kept[0], kept[1]


def eigen(a: Factor, b: Factor, delta: Scalar = 0.0) -> Eigen:
    """A ⊗ B = (Q_A ⊗ Q_B) diag(d_A d_Bᵀ) (Q_A ⊗ Q_B)ᵀ, with negative eigenvalues (rounding) as 0."""
    first, second = _are_diagonal(a, b)
    db, qb = eigenbasis(b, second)
    da, qa = eigenbasis(a, first)
    eigenvalues = da[..., :, None] * db[..., None, :]
    if any(isinstance(factor, Rows | Sketch) for factor in (a, b)):
        # Q = Xᵀ U S^(-1/2) is orthonormal up to rounding times λ_max / λ, and what it misses counts for 1 / delta
        qa, qb = jax.lax.cond(_steep(eigenvalues, delta), _orthonormal, lambda bases: bases, (qa, qb))
    return Eigen(qa, qb, eigenvalues, tail(a, b, da, db))


def tail(a: Factor, b: Factor, da: Array, db: Array) -> tuple[Array, Array, Array] | None:
    """λ ρ_B, ρ_A μ and ρ_A ρ_B: a sketch counts as the mean ρ of the eigenvalues that it does not show, outside."""
    if not isinstance(a, Sketch) and not isinstance(b, Sketch):
        return None
    left, right = mean_outside(a, da)[..., None, None], mean_outside(b, db)[..., None, None]
    return da[..., :, None] * right, left * db[..., None, :], left * right


def _orthonormal(bases: tuple[Array | None, Array | None]) -> tuple[Array | None, Array | None]:
    def one(q: Array) -> Array:  # the first columns, of the least eigenvalues, give way; they may be 0
        return jnp.linalg.qr(q[..., ::-1])[0][..., ::-1] if q.shape[-1] < q.shape[-2] else q

    return jax.tree.map(one, bases)


def _steep(eigenvalues: Array, delta: Scalar) -> Array:
    """Whether rounding counts: the product of the condition number and the machine precision is not small."""
    return jnp.any(jnp.finfo(eigenvalues.dtype).eps * eigenvalues > STEEP * delta)


def joint(straight: Kronecker, turned: Kronecker) -> Eigen:
    """A ⊗ B of a matrix and B' ⊗ A' of its transpose, used as a layer of its own, diagonal in one basis, nearly.

        Q_A of A mean(B) + B' mean(A'),   Q_B of B mean(A) + A' mean(B'),   mean: eigenvalue
        eigenvalues = diag(Q_Aᵀ A Q_A) diag(Q_Bᵀ B Q_B)ᵀ + diag(Q_Aᵀ B' Q_A) diag(Q_Bᵀ A' Q_B)ᵀ

    Of a table that is the output layer as well, A and B' are diagonals over its rows, and there is no Q_A.
    """
    factors: Any = [(straight.A, straight.B), (turned.B, turned.A)]
    kept = straight.diagonals
    means = [[mean_eigenvalue(pair[side], kept[side]) for side in (0, 1)] for pair in factors]
    bases: list[Array | None] = []
    values: list[Sequence[Array]] = []
    for side in (0, 1):
        one, other = factors[0][side], factors[1][side]
        if kept[side]:
            bases.append(None)
            values.append((one, other))
            continue
        weights = [mean[1 - side][..., None, None] for mean in means]
        _, q = eigenbasis(one * weights[0] + other * weights[1], False)
        bases.append(q)
        values.append([jnp.maximum(jnp.sum(q * (matrix @ q), axis=-2), 0) for matrix in (one, other)])
    (qa, qb), (left, right) = bases, values
    one, other = (a[..., :, None] * b[..., None, :] for a, b in zip(left, right, strict=True))
    return Eigen(qa, qb, one + other)


def rotate(parts: Eigen, v: Array) -> Array:
    """Q_Aᵀ v Q_B."""
    (d_in, d_out), (r_in, r_out) = v.shape[-2:], parts.eigenvalues.shape[-2:]
    if d_out * r_in * (d_in + r_out) < d_in * r_out * (d_out + r_in):  # multiplications, when A comes first
        return _right(_left(parts.qa, v, True), parts.qb, False)
    return _left(parts.qa, _right(v, parts.qb, False), True)


def _rotate_back(parts: Eigen, inside: Array) -> Array:
    """Q_A inside Q_Bᵀ."""
    (r_in, r_out), d_in = inside.shape[-2:], parts.rows
    d_out = parts.columns
    if d_in * r_out * (r_in + d_out) < d_out * r_in * (r_out + d_in):
        return _right(_left(parts.qa, inside, False), parts.qb, True)
    return _left(parts.qa, _right(inside, parts.qb, True), False)


def _left(q: Array | None, v: Array, transposed: bool) -> Array:
    return v if q is None else (jnp.swapaxes(q, -1, -2) if transposed else q) @ v


def _right(v: Array, q: Array | None, transposed: bool) -> Array:
    return v if q is None else v @ (jnp.swapaxes(q, -1, -2) if transposed else q)


def eigen_solve(parts: Eigen, delta: Scalar, v: Array) -> Array:
    """Q_A [(Q_Aᵀ v Q_B) / (eigenvalues + delta)] Q_Bᵀ, and v / (tail + delta) outside of what Q_A and Q_B span."""
    if parts.tail is not None:
        return _solve_with_tail(parts, parts.tail, delta, v)
    inside, damped = rotate(parts, v), parts.eigenvalues + delta
    if inside.shape == v.shape:
        return _rotate_back(parts, inside / damped)

    def once() -> Array:
        return (v - _rotate_back(parts, inside * (parts.eigenvalues / damped))) / delta

    def twice() -> Array:
        # What is outside is projected once more: a difference of large numbers would make the inverse indefinite
        outside = v - _rotate_back(parts, inside)
        return outside / delta + _rotate_back(parts, inside / damped - rotate(parts, outside) / delta)

    return jax.lax.cond(_steep(parts.eigenvalues, delta), twice, once)


def _solve_with_tail(parts: Eigen, tail: tuple[Array, Array, Array], delta: Scalar, v: Array) -> Array:
    """The same in four parts: inside of Q_A and Q_B, of one of them, and of neither."""
    seen, left, right, neither = (1 / (part + delta) for part in (parts.eigenvalues, *tail))

    def once() -> Array:
        inside = _left(parts.qa, v, True)
        both = _right(inside, parts.qb, False)
        if parts.eigenvalues.shape[-2] == v.shape[-2]:
            return _left(parts.qa, inside * left + _right(both * (seen - left), parts.qb, True), False)
        found = inside * (left - neither) + _right(both * (seen - left - right + neither), parts.qb, True)
        beside = _right(v, parts.qb, False) * (right - neither)
        return v * neither + _left(parts.qa, found, False) + _right(beside, parts.qb, True)

    def columns(inside: Array, outside: Array) -> Callable[[Array], Array]:
        first, second = transposed(inside), transposed(outside)
        return lambda v: transposed(_apart(parts.qb, transposed(v), lambda w: first * w, lambda w: second * w))

    def twice() -> Array:
        return _apart(parts.qa, v, columns(seen, left), columns(right, neither))

    return jax.lax.cond(_steep(parts.eigenvalues, delta), twice, once)


def _apart(q: Array | None, v: Array, inside: Callable[[Array], Array], outside: Callable[[Array], Array]) -> Array:
    """Q inside(Qᵀ v) + P outside(P v), P = I - Q Qᵀ: positive and symmetric as they are, however Q is rounded."""
    seen = _left(q, v, True)
    if q is None or q.shape[-1] == q.shape[-2]:
        return _left(q, inside(seen), False)
    rest = outside(v - q @ seen)
    return rest + q @ (inside(seen) - transposed(q) @ rest)


def whole_eigenvalues(parts: Eigen) -> Array:
    """All d_in d_out of them, with the tail, or zeros, for what Q_A and Q_B do not span."""
    *stack, r_in, r_out = parts.eigenvalues.shape
    below, beside = parts.rows - r_in, parts.columns - r_out
    if parts.tail is None:
        return jnp.pad(parts.eigenvalues, [(0, 0)] * len(stack) + [(0, below), (0, beside)])
    shapes = (r_in, beside), (below, r_out), (below, beside)
    right, left, rest = (jnp.broadcast_to(part, (*stack, *s)) for part, s in zip(parts.tail, shapes, strict=True))
    above = jnp.concatenate([parts.eigenvalues, right], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([left, rest], axis=-1)], axis=-2)


def _cholesky(a: Array, b: Array, delta: Scalar) -> Cholesky:
    first, second = _are_diagonal(a, b)
    mean_a, mean_b = mean_eigenvalue(a, first), mean_eigenvalue(b, second)
    some = (mean_a > 0) & (mean_b > 0)
    pi = jnp.where(some, jnp.sqrt(jnp.where(some, mean_a, 1) / jnp.where(some, mean_b, 1)), 1)

    def root(factor: Array, is_diagonal: bool, damping: Array) -> Array:
        if is_diagonal:
            return jnp.sqrt(factor + damping[..., None])
        damped = symmetric(factor) + damping[..., None, None] * jnp.eye(factor.shape[-1], dtype=factor.dtype)
        return jnp.linalg.cholesky(damped)

    return Cholesky(root(a, first, pi * jnp.sqrt(delta)), root(b, second, jnp.sqrt(delta) / pi))


def _cholesky_solve(parts: Cholesky, delta: Scalar, v: Array) -> Array:
    def solve(root: Array, right: Array, is_diagonal: bool) -> Array:
        if is_diagonal:
            return right / root[..., :, None] ** 2
        half = jax.lax.linalg.triangular_solve(root, right, left_side=True, lower=True)
        return jax.lax.linalg.triangular_solve(root, half, left_side=True, lower=True, transpose_a=True)

    first, second = _are_diagonal(*parts)
    left = solve(parts.a, v, first)
    return jnp.swapaxes(solve(parts.b, jnp.swapaxes(left, -1, -2), second), -1, -2)


def _by_shape(size: int, rows: int | None) -> Form:
    if rows is not None and 2 * rows <= size:
        return kept_as_rows
    return sketch(RANK) if size > WIDE else dense


spectral = Inverse(eigen, eigen_solve, whole_eigenvalues, text="spectral")
"""(A ⊗ B + δ I)⁻¹ by eigenvectors: one decomposition serves every δ, weight decay that changes included."""
factored = Inverse(_cholesky, _cholesky_solve, text="factored")
"""(A + π√δ I)⁻¹ ⊗ (B + √δ/π I)⁻¹ by Cholesky factors, π² = mean eigenvalue of A / that of B: cheaper, and overdamped.
Reference: Martens and Grosse, arXiv 1503.05671, section 6.3."""
by_shape = Inverse(eigen, eigen_solve, whole_eigenvalues, _by_shape, text="by_shape")
"""`spectral` from the rows themselves, where a factor has at most half as many as its size: the same, at less cost.
Where it has more, `spectral` up to a size of 1024, and `low_rank(256)` above."""


@as_called
def low_rank(rank: int) -> Inverse:
    """Keeps the factors that are larger than twice the rank by a sketch, and inverts what that shows of them.

        A ≈ Q Λ Qᵀ + ρ (I - Q Qᵀ),   Q Λ Qᵀ = Y (ΩᵀY)⁻¹ Yᵀ,   Y = A Ω,   Ω a fixed random matrix [d, rank]
        ρ = (tr A - tr Λ) / (d - rank), the mean of the eigenvalues that it does not show

    Sketches add up as factors do, over batches, averages and agents.

    Args:
      rank: columns of Ω, >= 1: how many eigenvalues of a factor are told apart; the others count as their mean.

    Returns:
      An `Inverse`; a factor of at most twice as many rows or columns is kept whole, one of fewer rows by these.

    Raises:
      ValueError: if rank < 1.

    Cost: 4 R d rank operations for a factor of R rows, about 5 d rank² for its decomposition; an application
    takes four products of d_in d_out rank multiplications where both are sketches.

    Reference: Tropp et al., arXiv 1706.05736.

    Example:
        >>> import bilevax as bx
        >>> bx.curvature.kronecker.low_rank(64)
        low_rank(64)
    """
    rank = checks.count("rank", rank, minimum=1)

    return Inverse(eigen, eigen_solve, whole_eigenvalues, sketched(rank))
