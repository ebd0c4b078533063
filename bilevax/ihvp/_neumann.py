"""The truncated Neumann series."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.curvature.products import Curvature, damped, hessian
from bilevax.ihvp._start import lower, seen, smallest, start, stateless
from bilevax.meshes import dot
from bilevax.printing import as_called
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, norm
from bilevax.sampling import Sample, full
from bilevax.typing import Array, Key, PyTree, Scalar


class _Carry(NamedTuple):
    v: PyTree
    r: PyTree
    norm: Array  # ‖r‖
    curvature: Array
    grew: Array  # whether ‖r‖ ever did


@as_called
def neumann(
    *,
    terms: int,
    step_size: Scalar,
    damping: Scalar = 0.0,
    curvature: Curvature = hessian,
    sample: Sample = full,
) -> IHVP:
    """Sums `terms` + 1 terms of the Neumann series, i.e. takes that many gradient steps on ½vᵀHv − bᵀv.

        v = step_size · Σ_{k=0}^{terms} (I − step_size · (H + damping I))ᵏ b

    From a warm start v0 the same series is applied to b − (H + damping I) v0 and added to v0, so that the error
    (I − step_size · H)^{terms+1} (v0 − H⁻¹b) shrinks from one outer step to the next (a v0 that is no better
    than zero is replaced by zero). The series converges where step_size < 2 / λ_max(H) and H is positive definite;
    `info.breakdown` tells when the residual grew in any step instead. It is the series all the same, a linear function
    of b; `inner.implicit` drops a v whose residual is far above one.

    Args:
      terms: number of Hessian products, >= 0; 0 leaves v = step_size · b.
      step_size: a number > 0, in units of one over an eigenvalue of H.
      damping: a number >= 0 added to the curvature.
      curvature: a function (inner_loss, x, y, batch) -> product.
      sample: how the batch of H is drawn from the inner data; it is asked with t = 0.

    Returns:
      An `IHVP` without state; `spd`. `info.residual` belongs to the sum without its last term: a figure for the
      whole sum would cost one product more.

    Raises:
      ValueError: if terms or damping is negative, or step_size is not positive.

    Cost: `terms` products, and one more for a warm start.

    Reference: Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation",
    arXiv 1911.02590, algorithm 3.

    Example:
        >>> import bilevax as bx
        >>> loss, ihvp = lambda x, y, batch: 0.5 * y**2, bx.ihvp.neumann(terms=2, step_size=0.5)
        >>> apply, _ = ihvp.prepare(None, (), loss, (0.0, 1.0, None))
        >>> float(apply(8.0)[0])  # 8 · (1/2 + 1/4 + 1/8)
        7.0
    """
    terms = checks.count("terms", terms)
    checks.positive("step_size", step_size)
    checks.nonnegative("damping", damping)
    checks.function("curvature", curvature, "inner_loss", "x", "y", "batch")
    checks.function("sample", sample, "key", "t", "data")

    def prepare(key: Key | None, state: tuple[()], inner_loss: Loss, point: Point) -> tuple[Apply, tuple[()]]:
        """Draws the batch of H: (apply, state), the state as it was."""
        x, y, data = point
        product = damped(curvature(inner_loss, x, y, sample(key, 0, data)), damping)

        def term(carry: _Carry, _: None) -> tuple[_Carry, None]:
            hr = product(carry.r)
            least = lower(carry.curvature, dot(carry.r, hr), carry.norm**2)
            v = optax.tree.cast_like(optax.tree.add_scale(carry.v, step_size, carry.r), carry.v)
            r = optax.tree.cast_like(optax.tree.add_scale(carry.r, -step_size, hr), carry.r)
            size = norm(r)
            grew = carry.grew | ~(size <= carry.norm * (1 + 16 * jnp.finfo(size.dtype).eps))
            return _Carry(v, r, size, least, grew), None

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """V by the terms of the series from v0, or from zero where that is better."""
            begin = start(product, b, v0)
            size = norm(begin.r)
            carry = _Carry(begin.v, begin.r, size, smallest(size), ~jnp.isfinite(size))
            carry, _ = jax.lax.scan(term, carry, length=terms)
            v = optax.tree.scale(begin.scale, optax.tree.add_scale(carry.v, step_size, carry.r))
            breakdown = carry.grew | (carry.curvature < 0)
            info = IHVPInfo(terms, terms + begin.products, 0, carry.norm, seen(carry.curvature), breakdown)
            return optax.tree.cast_like(v, b), info

        return apply, state

    return IHVP(stateless, prepare, spd=True)
