"""Eigenvalues and eigenvectors of one Kronecker factor, in whatever form it is kept."""

import jax
import jax.numpy as jnp

from bilevax.curvature.forms import Factor, Rows, Sketch, random_matrix
from bilevax.typing import Array


def transposed(matrix: Array) -> Array:
    """Of each matrix of a stack."""
    return jnp.swapaxes(matrix, -1, -2)


def symmetric(matrix: Array) -> Array:
    """Without the rounding in which the two halves differ."""
    return (matrix + jnp.swapaxes(matrix, -1, -2)) / 2


def eigenbasis(factor: Factor, is_diagonal: bool) -> tuple[Array, Array | None]:
    """Eigenvalues [..., r] >= 0, and eigenvectors [..., d, r]; None, where the factor is diagonal.

    There may be fewer of them than d: on what they do not span, `mean_outside` says what the factor is.
    """
    if isinstance(factor, Rows):
        return _of_rows(factor.rows)
    if isinstance(factor, Sketch):
        return _of_sketch(factor)
    if is_diagonal:
        return factor, None
    eigenvalues, vectors = jnp.linalg.eigh(symmetric(factor))
    return jnp.maximum(eigenvalues, 0), vectors


def mean_outside(factor: Factor, eigenvalues: Array) -> Array:
    """The mean of the eigenvalues that a sketch does not show, which its trace gives; 0 in all other forms."""
    if not isinstance(factor, Sketch):
        return jnp.zeros_like(eigenvalues[..., 0])
    missing = max(factor.size - eigenvalues.shape[-1], 1)
    return jnp.maximum(factor.trace - jnp.sum(eigenvalues, axis=-1), 0) / missing


def turned(factor: Factor, q: Array | None) -> tuple[Array, Array | None]:
    """One step of orthogonal iteration from a basis that was right before: the orthogonal factor of A Q, diag(Qᵀ A Q).

    Vectors of larger eigenvalues come first in it, since the later ones are made orthogonal to the earlier. A sketch
    shows its basis at once; of rows there is none to keep.

    Reference: Golub and Van Loan, "Matrix Computations", section 8.2.4; Vyas et al., arXiv 2409.11321, algorithm 4.
    """
    if q is None or isinstance(factor, Rows | Sketch):
        return eigenbasis(factor, q is None)
    image = symmetric(factor) @ q
    order = jnp.argsort(-jnp.sum(q * image, axis=-2), axis=-1)
    q = jnp.linalg.qr(jnp.take_along_axis(image, order[..., None, :], axis=-1))[0]
    return jnp.sum(q * (symmetric(factor) @ q), axis=-2), q


def _of_rows(rows: Array) -> tuple[Array, Array]:
    """X Xᵀ = U S Uᵀ gives XᵀX = Q S Qᵀ with Q = Xᵀ U S^(-1/2)."""
    # X [200, 3072]: an eigh of [200, 200], and Q [3072, 200]. What is 0 but for rounding is left out: its q is 0
    eigenvalues, u = jnp.linalg.eigh(symmetric(rows @ transposed(rows)))
    floor = jnp.finfo(rows.dtype).eps * eigenvalues[..., -1:]
    some = eigenvalues > floor
    inverse = jnp.where(some, 1 / jnp.sqrt(jnp.where(some, eigenvalues, 1)), 0)
    return jnp.where(some, eigenvalues, 0), transposed(rows) @ (u * inverse[..., None, :])


def _of_sketch(sketch: Sketch) -> tuple[Array, Array]:
    """Nyström: A ≈ Y (ΩᵀY)⁻¹ Yᵀ for Y = A Ω, of A + shift, which is taken off the eigenvalues again.

    Reference: Tropp et al., "Fixed-rank approximation of a positive-semidefinite matrix from streaming data", 2017,
    arXiv 1706.05736, algorithm 3.
    """
    size, rank = sketch.image.shape[-2:]
    omega = jnp.broadcast_to(random_matrix(size, rank, sketch.image.dtype), sketch.image.shape)
    norm = jnp.sqrt(jnp.sum(sketch.image**2, axis=(-2, -1)))
    some = norm > 0
    shift = jnp.where(some, jnp.finfo(norm.dtype).eps * jnp.sqrt(1.0 * size) * norm, 1)[..., None, None]
    image = sketch.image + shift * omega
    root = jnp.linalg.cholesky(symmetric(transposed(omega) @ image))
    half = jax.lax.linalg.triangular_solve(root, image, left_side=False, lower=True, transpose_a=True)
    eigenvalues, u = jnp.linalg.eigh(symmetric(transposed(half) @ half))
    floor = jnp.finfo(norm.dtype).eps * eigenvalues[..., -1:]
    u = u / jnp.sqrt(jnp.maximum(eigenvalues, floor))[..., None, :]
    eigenvalues = jnp.where(some[..., None], jnp.maximum(eigenvalues - shift[..., 0], 0), 0)
    return eigenvalues, half @ u
