"""Stochastic gradient descent on the quadratic whose minimum is the inverse-Hessian-vector product."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.curvature.products import Curvature, Product, damped, hessian
from bilevax.ihvp._start import lower, seen, smallest, start, stateless
from bilevax.meshes import dot
from bilevax.printing import as_called
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, norm
from bilevax.sampling import Sample, fold, split
from bilevax.typing import Array, Key, PyTree, Scalar


class _Carry(NamedTuple):
    v: PyTree
    norm: Array  # ‖b − H_t v‖ before the last step
    curvature: Array


@as_called
def sgd(
    *,
    steps: int,
    step_size: Scalar,
    damping: Scalar = 0.0,
    curvature: Curvature = hessian,
    sample: Sample,
) -> IHVP:
    """Takes stochastic gradient steps on ½vᵀHv − bᵀv, with a batch of its own for the curvature of each step.

        v_{t+1} = v_t − step_size · ((H_t + damping I) v_t − b),   t = 0..steps − 1,   H_t on sample(key_t, t, data)

    The cheapest solver per step on large data: memory and time of one batch, and a warm start that averages over outer
    steps. Its noise stays proportional to the step size; it converges in the mean where step_size < 2 / λ_max(H_t).
    With `sample=sampling.full` it is `neumann(terms=steps − 1, step_size=step_size)`.

    Args:
      steps: number of steps, >= 1.
      step_size: a number > 0, in units of one over an eigenvalue of H.
      damping: a number >= 0 added to the curvature.
      curvature: a function (inner_loss, x, y, batch) -> product.
      sample: how the batch of step t is drawn from the inner data, say `sampling.minibatch(256)`.

    Returns:
      An `IHVP` without state; not symmetric in b, so that it is no preconditioner. `info.residual` is
      ‖b − H_t v_t‖ / ‖b‖ of the last batch, before its step; `info.breakdown` says that v is then no better than zero,
      that a batch had negative curvature along v, or that numbers are not finite.

    Raises:
      ValueError: if steps < 1, step_size is not positive, or damping is negative.

    Cost: `steps` products, each with its own linearization of ∇_y g (about one gradient of a batch), and one more of
    both for a warm start.

    Reference: Dagréou et al. (SOBA), arXiv 2201.13409; Arbel and Mairal (AmIGO), arXiv 2111.14580, algorithm 3.

    Example:
        >>> import bilevax as bx
        >>> ihvp = bx.ihvp.sgd(steps=3, step_size=0.5, sample=bx.sampling.full)
        >>> apply, _ = ihvp.prepare(None, (), lambda x, y, batch: 0.5 * y**2, (0.0, 1.0, None))
        >>> float(apply(8.0)[0])  # 8 · (1/2 + 1/4 + 1/8)
        7.0
    """
    steps = checks.count("steps", steps, minimum=1)
    checks.positive("step_size", step_size)
    checks.nonnegative("damping", damping)
    checks.function("curvature", curvature, "inner_loss", "x", "y", "batch")
    checks.function("sample", sample, "key", "t", "data")

    def prepare(key: Key | None, state: tuple[()], inner_loss: Loss, point: Point) -> tuple[Apply, tuple[()]]:
        """Measures nothing yet, as each step draws its own batch: (apply, state), the state as it was."""
        x, y, data = point
        (step_key,) = split(key, 1)

        def product_at(t: Scalar) -> Product:
            batch = sample(fold(step_key, t), t, data)
            return damped(curvature(inner_loss, x, y, batch), damping)

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """V by gradient steps from v0, or from zero where that is better."""
            begin = start(product_at(0), b, v0)
            unit = begin.unit

            def step(carry: _Carry, t: Array) -> tuple[_Carry, None]:
                hv = product_at(t)(carry.v)
                least = lower(carry.curvature, dot(carry.v, hv), dot(carry.v, carry.v))
                r = optax.tree.sub(unit, hv)
                v = optax.tree.cast_like(optax.tree.add_scale(carry.v, step_size, r), carry.v)
                return _Carry(v, norm(r), least), None

            size = norm(unit)
            carry, _ = jax.lax.scan(step, _Carry(begin.v, size, smallest(size)), jnp.arange(steps))
            worse = ~(carry.norm <= 1 + 16 * jnp.finfo(size.dtype).eps)
            finite = jnp.isfinite(norm(carry.v))
            v = optax.tree.scale(begin.scale, carry.v)
            breakdown = worse | (carry.curvature < 0) | ~finite
            info = IHVPInfo(steps, steps + begin.products, 0, carry.norm, seen(carry.curvature), breakdown)
            return optax.tree.cast_like(v, b), info

        return apply, state

    return IHVP(stateless, prepare)
