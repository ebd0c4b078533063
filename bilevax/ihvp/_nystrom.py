"""The inverse of a randomized low-rank approximation of the Hessian."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.curvature.products import Curvature, Product, hessian
from bilevax.ihvp._start import stateless
from bilevax.meshes import ravel
from bilevax.printing import as_called
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, norm, widen
from bilevax.sampling import Sample, full, split
from bilevax.typing import Array, Key, PyTree, Scalar


def _sketch(product: Product, key: Key, example: Array, rank: int) -> tuple[Array, Array, Array]:
    """Eigenvectors [M, rank] and eigenvalues [rank] of the Nyström approximation, and the smallest ωᵀHω seen."""
    normal = jax.random.normal(key, (example.size, rank), example.dtype)
    test, _ = jnp.linalg.qr(normal)
    image = jax.lax.map(product, test.T).T  # H Ω
    core = test.T @ image
    curvatures, rotation = jnp.linalg.eigh((core + core.T) / 2)
    threshold = rank * jnp.finfo(example.dtype).eps * jnp.abs(curvatures).max()
    seen = curvatures > threshold
    half = image @ rotation * jnp.where(seen, jnp.where(seen, curvatures, 1) ** -0.5, 0)[None, :]
    basis, triangle = jnp.linalg.qr(half)
    vectors, singular, _ = jnp.linalg.svd(triangle)
    smallest = jnp.where(curvatures[0] < -threshold, curvatures[0], jnp.maximum(curvatures[0], 0))
    return basis @ vectors, singular**2, smallest


@as_called
def nystrom(
    *,
    rank: int,
    damping: Scalar = 0.0,
    curvature: Curvature = hessian,
    sample: Sample = full,
    tail: Callable[[Array], Scalar] = jnp.min,
) -> IHVP:
    """Inverts a randomized low-rank approximation of H; the preconditioner for a spectrum that decays.

        H ≈ HΩ (ΩᵀHΩ)⁻¹ (HΩ)ᵀ = U Λ Uᵀ          Ω = orthonormal, random [M, rank]
        v = U (Λ + damping)⁻¹ Uᵀ b  +  (tail(Λ) + damping)⁻¹ (b − U Uᵀ b)

    The sketch is drawn once, in `prepare`, so that `apply` is one linear function for a whole solve: a preconditioner
    that is drawn anew in each iteration makes conjugate gradients diverge. `tail` is the curvature that is assumed
    outside the sketch. The smallest of the sketch (the default) never overshoots; `tail=lambda eigenvalues: 0.0` is the
    inverse of the damped approximation itself. Both need damping > 0 where H may have eigenvalues of zero: without it,
    v is not finite there, and `info.breakdown` says so.

    Args:
      rank: number of random directions, >= 1; more than dim y count as dim y.
      damping: a number >= 0 added to the eigenvalues.
      curvature: a function (inner_loss, x, y, batch) -> product; `gauss_newton` where the Hessian is indefinite.
      sample: how the batch of H is drawn from the inner data; it is asked with t = 0.
      tail: eigenvalues [rank] -> the curvature of all directions outside the sketch.

    Returns:
      An `IHVP` without state; `spd`. The residual is not measured, since that would cost a product; `info.breakdown`
      says that H has negative curvature in the sketch (which is left out of the approximation).

    Raises:
      ValueError: if rank < 1, damping is negative, or, when it is prepared, if there is no key.

    Cost: `rank` products, one after the other, and O(M rank²) operations for M = dim y, once per solve; O(M rank)
    operations for each application, and as much memory.

    Reference: Hataya and Yamada, "Nyström method for accurate and scalable implicit differentiation", arXiv
    2302.09726, equation 6; as a preconditioner: Frangella, Tropp, Udell, arXiv 2110.02820, section 5 (theirs is
    (λ_rank + damping) times the default).

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> loss = lambda x, y, batch: jnp.sum(jnp.array([1.0, 4.0]) * y**2)
        >>> ihvp = bx.ihvp.nystrom(rank=2)
        >>> apply, _ = ihvp.prepare(jax.random.key(0), (), loss, (0.0, jnp.ones(2), None))
        >>> apply(jnp.array([2.0, 8.0]))[0].round(4).tolist()
        [1.0, 1.0]
    """
    rank = checks.count("rank", rank, minimum=1)
    checks.nonnegative("damping", damping)
    checks.function("curvature", curvature, "inner_loss", "x", "y", "batch")
    checks.function("sample", sample, "key", "t", "data")
    checks.function("tail", tail, "eigenvalues")

    def prepare(key: Key | None, state: tuple[()], inner_loss: Loss, point: Point) -> tuple[Apply, tuple[()]]:
        """Multiplies H by random directions, which the key draws: (apply, state), the state as it was."""
        if key is None:
            raise ValueError(
                "key must be a jax.random.key for ihvp.nystrom, whose directions are random; got None. Pass "
                "key=jax.random.key(0)."
            )
        x, y, data = point
        sketch_key, batch_key = split(key, 2)
        product = curvature(inner_loss, x, y, sample(batch_key, 0, data))
        example, unravel = ravel(widen(y))
        size = min(rank, example.size)
        vectors, eigenvalues, smallest = _sketch(
            lambda column: ravel(product(unravel(column)))[0], sketch_key, example, size
        )
        outside = tail(eigenvalues) + damping
        if jnp.shape(outside) != ():
            raise ValueError(
                f"tail must return one number; got shape {jnp.shape(outside)}. Pass, say, tail=jnp.min, or "
                f"lambda eigenvalues: 0.0."
            )

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """V by the approximation of low rank; v0 is not used."""
            wide = ravel(widen(b))[0].astype(example.dtype)
            scale = norm(wide)
            unit = wide / jnp.where(scale > 0, scale, 1)
            inside = vectors.T @ unit
            v = vectors @ (inside / (eigenvalues + damping))
            if size < example.size:
                v = v + (unit - vectors @ inside) / outside
            breakdown = (smallest < 0) | ~jnp.isfinite(norm(v))
            info = IHVPInfo(0, 0, size, None, smallest + damping, breakdown)
            return optax.tree.cast_like(unravel((scale * v).astype(example.dtype)), b), info

        return apply, state

    return IHVP(stateless, prepare, spd=True)
