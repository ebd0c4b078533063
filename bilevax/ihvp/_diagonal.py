"""The identity, preconditioned like Adam."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.meshes import zeros_like
from bilevax.printing import as_called, by_shape
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, arrays, inner_gradient, norm, widen
from bilevax.sampling import Sample, full
from bilevax.typing import Array, Key, PyTree, Scalar


class DiagonalState(NamedTuple):
    """The running second moments of the inner gradient.

    Attributes:
      step: how many gradients were averaged.
      moments: pytree like y, in at least float32.

    Example:
        >>> import bilevax as bx
        >>> bx.ihvp.diagonal().init(0.0, {"w": 1.0})
        DiagonalState(
          step=0,
          moments={'w': 0},
        )
    """

    step: Array
    moments: PyTree

    def __repr__(self) -> str:
        return by_shape(self)


@as_called
def diagonal(*, scale: Scalar = 1.0, decay: Scalar = 0.999, eps: Scalar = 1e-8, sample: Sample = full) -> IHVP:
    """Takes the second moments of the inner gradient for a squared curvature, as Adam does.

        m ← decay m + (1 − decay) (∇_y g)²          v = scale · b / (√(m / (1 − decay^k)) + eps)

    The cheapest curvature there is, and the weakest: gradients measure how noisy or how far a parameter is, not how
    curved g is. It is here for comparison.

    Args:
      scale: a number > 0, the step size of Adam.
      decay: of the second moments, in [0, 1).
      eps: a number > 0 added to the root, so that v stays finite where the gradient is 0.
      sample: how the batch of the gradient is drawn from the inner data; it is asked with t = 0.

    Returns:
      An `IHVP` with state `DiagonalState`; `spd`. The residual is not measured.

    Raises:
      ValueError: if scale or eps is not positive, or decay is out of range.

    Cost: one gradient, which the compiler shares with `inner.implicit` on the same batch; one vector like y.

    Reference: Choe et al. (SAMA), arXiv 2310.05674: theirs reads the moments of the inner Adam, and takes the cross
    derivative by a finite difference; these are moments of their own, and the cross derivative is exact.

    Example:
        >>> import bilevax as bx
        >>> ihvp = bx.ihvp.diagonal()
        >>> apply, _ = ihvp.prepare(None, ihvp.init(0.0, 1.0), lambda x, y, batch: 2.0 * y**2, (0.0, 1.0, None))
        >>> round(float(apply(8.0)[0]), 3)
        2.0
    """
    checks.positive("scale", scale)
    checks.positive("eps", eps)
    if not isinstance(decay, jax.core.Tracer) and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1); got {decay!r}. Pass, say, decay=0.999.")
    checks.function("sample", sample, "key", "t", "data")

    def init(x: PyTree, y: PyTree, batch: PyTree = None, inner_loss: Loss | None = None) -> DiagonalState:
        """The moments, zeros like y in at least float32."""
        return DiagonalState(jnp.zeros((), jnp.int32), zeros_like(arrays(widen(y))))

    def prepare(key: Key | None, state: DiagonalState, inner_loss: Loss, point: Point) -> tuple[Apply, DiagonalState]:
        """Averages the squared gradient of one batch into the moments: (apply, state)."""
        x, y, data = point
        gradient = widen(inner_gradient(inner_loss, x, y, sample(key, 0, data)).gradient)
        step = state.step + 1
        moments = jax.tree.map(lambda m, g: (decay * m + (1 - decay) * g**2).astype(m.dtype), state.moments, gradient)
        correction = 1 - decay ** step.astype(jnp.float32)
        roots = jax.tree.map(lambda m: jnp.sqrt(m / correction.astype(m.dtype)) + eps, moments)

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """B divided by the roots of the moments; v0 is not used."""
            v = jax.tree.map(lambda leaf, root: scale * leaf / root, widen(b), roots)
            smallest = jnp.min(jnp.stack([jnp.min(root) for root in jax.tree.leaves(roots)])) / scale
            return optax.tree.cast_like(v, b), IHVPInfo(0, 0, 0, None, smallest, ~jnp.isfinite(norm(v)))

        return apply, DiagonalState(step, moments)

    return IHVP(init, prepare, spd=True)
