"""The scaled identity in place of the inverse Hessian."""

import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.ihvp._start import stateless
from bilevax.printing import as_called
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, norm
from bilevax.typing import Key, PyTree, Scalar


@as_called
def identity(scale: Scalar = 1.0) -> IHVP:
    """Replaces the inverse Hessian by a multiple of the identity.

        v = scale · b

    With scale = the inner step size this is one unrolled step (DARTS, T1–T2); with scale = 0 the indirect part of the
    hypergradient is dropped. The residual is not measured, since that would cost the product that is saved here.

    Args:
      scale: a number >= 0, in units of an inner step size.

    Returns:
      An `IHVP` without state; `spd`.

    Raises:
      ValueError: if scale is negative.

    Cost: nothing.

    Reference: Luketina et al., arXiv 1511.06727 (T1–T2); Liu et al., DARTS, arXiv 1806.09055.

    Example:
        >>> import bilevax as bx
        >>> apply, _ = bx.ihvp.identity(0.1).prepare(None, (), lambda x, y, batch: y**2, (0.0, 1.0, None))
        >>> f"{apply(20.0)[0]:.1f}"
        '2.0'
    """
    checks.nonnegative("scale", scale)

    def prepare(key: Key | None, state: tuple[()], inner_loss: Loss, point: Point) -> tuple[Apply, tuple[()]]:
        """Measures nothing: (apply, state), the state as it was."""

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """B times the scale; v0 is not used."""
            v = optax.tree.cast_like(optax.tree.scale(scale, b), b)
            return v, IHVPInfo(0, 0, 0, None, None, ~jnp.isfinite(norm(v)))

        return apply, state

    return IHVP(stateless, prepare, spd=True)
