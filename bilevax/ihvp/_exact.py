"""The dense inverse: small problems, and the oracle of every test."""

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.ihvp._start import stateless
from bilevax.meshes import ravel
from bilevax.printing import as_called
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, norm, widen
from bilevax.sampling import Sample, full
from bilevax.typing import Key, PyTree, Scalar


@as_called
def exact(*, damping: Scalar = 0.0, sample: Sample = full) -> IHVP:
    """Forms the dense Hessian, decomposes it once per solve, and divides by its eigenvalues.

        H = Q diag(λ) Qᵀ          v = Q (Qᵀ b / (λ + damping))

    An indefinite H is inverted all the same and reported as `breakdown`: at such a point y is not a minimum.

    Args:
      damping: a number >= 0 added to every eigenvalue.
      sample: how the batch of H is drawn from the inner data; it is asked with t = 0.

    Returns:
      An `IHVP` without state; `spd`. `info.curvature` is the smallest eigenvalue of H + damping I.

    Raises:
      ValueError: if damping is negative.

    Cost: M Hessian products, M² memory and about 10 M³ operations for M = dim y, once per solve; use it up to a few
    thousand unknowns.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = lambda x, y, batch: jnp.sum(jnp.array([1.0, 4.0]) * y**2)
        >>> apply, _ = bx.ihvp.exact().prepare(None, (), loss, (0.0, jnp.ones(2), None))
        >>> apply(jnp.array([2.0, 8.0]))[0].round(4).tolist()
        [1.0, 1.0]
    """
    checks.nonnegative("damping", damping)
    checks.function("sample", sample, "key", "t", "data")

    def prepare(key: Key | None, state: tuple[()], inner_loss: Loss, point: Point) -> tuple[Apply, tuple[()]]:
        """Writes out the Hessian and factors it: (apply, state), the state as it was."""
        x, y, data = point
        loss = checks.scalar_loss("inner_loss", inner_loss)
        batch = sample(key, 0, data)
        flat, unravel = ravel(y)
        hessian = jax.hessian(lambda wide: loss(x, unravel(wide.astype(flat.dtype)), batch))(widen(flat))
        eigenvalues, vectors = jnp.linalg.eigh(hessian + damping * jnp.eye(flat.size, dtype=hessian.dtype))

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """V by the factors of H; v0 is not used."""
            wide = ravel(b)[0].astype(hessian.dtype)
            size = norm(wide)
            scale = jnp.where(size > 0, size, 1)
            unit = wide / scale
            parts = vectors.T @ unit
            v = vectors @ jnp.where(parts == 0, 0, parts / jnp.where(parts == 0, 1, eigenvalues))
            residual = jnp.linalg.norm(unit - hessian @ v - damping * v)
            breakdown = ~((eigenvalues[0] > 0) & jnp.isfinite(residual))
            info = IHVPInfo(1, 0, flat.size, residual, eigenvalues[0], breakdown)
            return unravel((scale * v).astype(flat.dtype)), info

        return apply, state

    return IHVP(stateless, prepare, spd=True)
