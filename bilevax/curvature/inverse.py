"""Damped inverses of Kronecker products."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from bilevax.printing import by_text
from bilevax.typing import Array, Scalar

Damping = Scalar | Callable[[Array], Scalar]


class Eigen(NamedTuple):
    """A decomposition of A ⊗ B; leading axes are stacked layers.

    Attributes:
      qa: [..., d_in, d_in], eigenvectors of A; None where A is diagonal (an embedding).
      qb: [..., d_out, d_out], eigenvectors of B.
      eigenvalues: [..., d_in, d_out], of the product, or the diagonal of the curvature in this basis (EKFAC).

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> parts = bx.curvature.kronecker.spectral.decompose(2.0 * jnp.eye(1), 3.0 * jnp.eye(1), 0.0)
        >>> parts.qa.tolist(), parts.eigenvalues.tolist()
        ([[1.0]], [[6.0]])
    """

    qa: Array | None
    qb: Array
    eigenvalues: Array


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

    def __call__(self, a: Array, b: Array, delta: Scalar, /) -> Any: ...


class Solve(Protocol):
    """The inverse of A ⊗ B + delta I, applied to v."""

    def __call__(self, parts: Any, delta: Scalar, v: Array, /) -> Array: ...


class Inverse(NamedTuple):
    """A way to invert A ⊗ B + δ I.

    Attributes:
      decompose: `decompose(a, b, delta) -> parts`, with A [..., d_in, d_in] or its diagonal [..., d_in].
      solve: `solve(parts, delta, v) -> (A ⊗ B + delta I)⁻¹ v`, v [..., d_in, d_out].
      eigenvalues: `eigenvalues(parts)`, [..., d_in, d_out]; None where they are not known.
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
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


def _symmetric(matrix: Array) -> Array:
    return (matrix + jnp.swapaxes(matrix, -1, -2)) / 2


def _positive_eigh(matrix: Array) -> tuple[Array, Array]:
    eigenvalues, vectors = jnp.linalg.eigh(_symmetric(matrix))
    return jnp.maximum(eigenvalues, 0), vectors


def eigen(a: Array, b: Array, delta: Scalar = 0.0) -> Eigen:
    """A ⊗ B = (Q_A ⊗ Q_B) diag(d_A d_Bᵀ) (Q_A ⊗ Q_B)ᵀ, with negative eigenvalues (rounding) as 0."""
    db, qb = _positive_eigh(b)
    da, qa = (a, None) if a.ndim < b.ndim else _positive_eigh(a)
    return Eigen(qa, qb, da[..., :, None] * db[..., None, :])


def rotate(parts: Eigen, v: Array) -> Array:
    """Q_Aᵀ v Q_B."""
    inside = v @ parts.qb
    return inside if parts.qa is None else jnp.swapaxes(parts.qa, -1, -2) @ inside


def eigen_solve(parts: Eigen, delta: Scalar, v: Array) -> Array:
    """Q_A [(Q_Aᵀ v Q_B) / (eigenvalues + delta)] Q_Bᵀ."""
    inside = rotate(parts, v) / (parts.eigenvalues + delta)
    inside = inside @ jnp.swapaxes(parts.qb, -1, -2)
    return inside if parts.qa is None else parts.qa @ inside


def trace_mean(matrix: Array, diagonal: bool) -> Array:
    """The mean eigenvalue of a matrix, or of a diagonal one given by its diagonal."""
    return jnp.mean(matrix if diagonal else jnp.diagonal(matrix, axis1=-2, axis2=-1), axis=-1)


def _cholesky(a: Array, b: Array, delta: Scalar) -> Cholesky:
    diagonal = a.ndim < b.ndim
    mean_a, mean_b = trace_mean(a, diagonal), trace_mean(b, False)
    some = (mean_a > 0) & (mean_b > 0)
    pi = jnp.where(some, jnp.sqrt(jnp.where(some, mean_a, 1) / jnp.where(some, mean_b, 1)), 1)
    left, right = pi * jnp.sqrt(delta), jnp.sqrt(delta) / pi
    if diagonal:
        root = jnp.sqrt(a + left[..., None])
    else:
        root = jnp.linalg.cholesky(_symmetric(a) + left[..., None, None] * jnp.eye(a.shape[-1], dtype=a.dtype))
    damped = _symmetric(b) + right[..., None, None] * jnp.eye(b.shape[-1], dtype=b.dtype)
    return Cholesky(root, jnp.linalg.cholesky(damped))


def _cholesky_solve(parts: Cholesky, delta: Scalar, v: Array) -> Array:
    def solve(root: Array, right: Array) -> Array:
        half = jax.lax.linalg.triangular_solve(root, right, left_side=True, lower=True)
        return jax.lax.linalg.triangular_solve(root, half, left_side=True, lower=True, transpose_a=True)

    left = v / parts.a[..., :, None] ** 2 if parts.a.ndim < parts.b.ndim else solve(parts.a, v)
    return jnp.swapaxes(solve(parts.b, jnp.swapaxes(left, -1, -2)), -1, -2)


spectral = Inverse(eigen, eigen_solve, lambda parts: parts.eigenvalues, text="spectral")
"""(A ⊗ B + δ I)⁻¹ by eigenvectors: one decomposition serves every δ, weight decay that changes included."""
factored = Inverse(_cholesky, _cholesky_solve, text="factored")
"""(A + π√δ I)⁻¹ ⊗ (B + √δ/π I)⁻¹ by Cholesky factors, π² = mean eigenvalue of A / that of B: cheaper, and overdamped.
Reference: Martens and Grosse, arXiv 1503.05671, section 6.3."""
