"""Another inverse, set to the length that one product says it should have."""

from typing import Any

import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.curvature.model_loss import gauss_newton
from bilevax.curvature.products import Curvature, damped
from bilevax.ihvp._checked import check_ihvp, prepared
from bilevax.meshes import dot
from bilevax.printing import as_called
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, added
from bilevax.sampling import Sample, full, split
from bilevax.typing import Key, PyTree, Scalar


@as_called
def rescaled(ihvp: IHVP, *, damping: Scalar = 1e-3, curvature: Curvature = gauss_newton, sample: Sample = full) -> IHVP:
    """Multiplies the v of another IHVP by the number that minimises the error along it, at the price of one product.

        v ← v (vᵀb) / (vᵀ(G + damping I) v)

    One step of conjugate gradients with that IHVP as preconditioner. The direction stays; the length matters to plain
    gradient steps on x, and not to Adam.

    Args:
      ihvp: any IHVP, say `kfac()`.
      damping: a number >= 0 added to the curvature, that of the IHVP as a rule.
      curvature: a function (inner_loss, x, y, batch) -> product, positive definite once damped.
      sample: how the batch of the curvature is drawn from the inner data; it is asked with t = 0.

    Returns:
      An `IHVP` with the state of the other; not `spd`. `info.curvature` is that along v; `info.residual` is measured.

    Raises:
      ValueError: if ihvp is no `IHVP`, or damping is negative.

    Cost: that of the other, and one product.

    Example:
        >>> import bilevax as bx
        >>> ihvp = bx.ihvp.rescaled(bx.ihvp.identity(), damping=0.0, curvature=bx.curvature.hessian)
        >>> apply, _ = ihvp.prepare(None, (), lambda x, y, batch: 2.0 * y**2, (0.0, 1.0, None))
        >>> float(apply(8.0)[0])
        2.0
    """
    check_ihvp("ihvp", ihvp, "Pass, say, bx.ihvp.kfac(), called.")
    checks.nonnegative("damping", damping)
    checks.function("curvature", curvature, "inner_loss", "x", "y", "batch")
    checks.function("sample", sample, "key", "t", "data")

    def prepare(key: Key | None, state: Any, inner_loss: Loss, point: Point) -> tuple[Apply, Any]:
        """Draws the batch of the product and prepares the other: (apply, state), the state that of the other."""
        x, y, data = point
        batch_key, key = split(key, 2)
        product = damped(curvature(inner_loss, x, y, sample(batch_key, 0, data)), damping)
        inner, state = prepared("ihvp", ihvp.prepare(key, state, inner_loss, point), state)

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """V of the other IHVP, times the number that one product gives."""
            v, info = inner(b, v0)
            hv = product(v)
            along, vhv, bb = dot(v, b), dot(v, hv), dot(b, b)
            gain = jnp.where(vhv > 0, along / jnp.where(vhv > 0, vhv, 1), 1.0)
            rest = optax.tree.norm(optax.tree.add_scale(b, -gain, hv)) / jnp.where(bb > 0, jnp.sqrt(bb), 1)
            vv = dot(v, v)
            broken = info.breakdown | ~jnp.isfinite(vhv) | ((vhv <= 0) & (vv > 0))
            scaled = optax.tree.cast_like(optax.tree.scale(gain, v), b)
            return scaled, info._replace(
                products=added(info.products, 1),
                residual=rest,
                curvature=vhv / jnp.where(vv > 0, vv, 1),
                breakdown=broken,
            )

        return apply, state

    return IHVP(ihvp.init, prepare)
