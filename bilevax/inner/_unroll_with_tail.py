"""A truncated unroll whose forgotten past is made up for by an implicit tail."""

from typing import Protocol

import jax
import numpy as np
import optax

from bilevax import checks
from bilevax.ihvp._kfac import kfac
from bilevax.inner._chain import chain
from bilevax.inner._implicit import implicit
from bilevax.inner._optimizer_steps import Initial
from bilevax.inner._reverse import reverse
from bilevax.printing import as_called
from bilevax.problem import IHVP, InnerSolver, Loss
from bilevax.sampling import Sample, full
from bilevax.typing import Scalar


class TailIHVP(Protocol):
    """`ihvp(damping=...)`: a constructor of `bx.ihvp`, or a function of yours."""

    def __call__(self, *, damping: Scalar) -> IHVP: ...


@as_called
def unroll_with_tail(
    inner_loss: Loss,
    step_size: Scalar,
    steps: int,
    unrolled: int,
    *,
    ihvp: TailIHVP = kfac,
    initial: Initial | None = None,
    sample: Sample = full,
    cross_sample: Sample = full,
) -> InnerSolver:
    """Plain gradient steps, of which the last are differentiated exactly and the others implicitly.

        y_m = steps − unrolled steps from y_0,   y_T = the others from y_m          K = unrolled
        x_bar = (derivative through the last K steps) − ∇²_xy g(x, y_m) v,   v ≈ [∇²_yy g(x, y_m)]⁻¹ p,
        p = (∂y_T/∂y_m)ᵀ y_bar,   damping of v: 1 / (step_size K)

    p holds the flat directions, along which y_m is not stationary: that is why the tail is damped by about
    1 / (step_size K), the curvature that K steps can see, and not by a small number. With a constant Hessian and its
    true inverse every K is exact. In a network nearly all of the curvature lies below that damping, and `kfac` then
    does what the identity does: a tenth of it, `ihvp=lambda damping: bx.ihvp.kfac(damping=0.1 * damping)`, is better at
    every K that `docs/curvature.md` compares. A momentum or Adam would leave moments behind that the tail cannot see:
    build other optimizers with `chain`, which refuses those.

    Args:
      inner_loss: g, a function (x, y, batch) -> scalar; a `ModelLoss` for `kfac`.
      step_size: of all inner steps, a number > 0.
      steps: inner steps altogether, T.
      unrolled: K, those at the end that are differentiated exactly; 1 <= K <= T.
      ihvp: `ihvp(damping=...)`, the IHVP of the tail; `kfac` by default.
      initial: y_0 as a function of x; by default y_0 is the warm y.
      sample: how inner step t draws its batch from the data.
      cross_sample: how the batch of the tail's cross term is drawn.

    Returns:
      An `InnerSolver`: `chain(implicit(steps - unrolled, ihvp(damping=1 / (step_size K))), reverse(unrolled))`.

    Raises:
      ValueError: if step_size is no positive number (an optimizer, say), or unrolled is not in 1 ... steps.

    Cost: `steps` gradients, K products, and the tail; memory for K states y.

    Reference: Shaban et al., arXiv 1810.10667, for the truncated unroll; the tail follows from implicit differentiation
    of y_m. Grosse et al., arXiv 2308.03296, section 2, on why networks ask for a damped response.

    Example:
        >>> import bilevax as bx, jax
        >>> loss = lambda x, y, batch: 0.5 * (y - x) ** 2
        >>> tail = lambda damping: bx.ihvp.identity()
        >>> solve = bx.differentiable(bx.inner.unroll_with_tail(loss, 0.5, steps=4, unrolled=2, ihvp=tail))
        >>> float(jax.grad(solve)(1.0, 0.0, None))
        1.0
    """
    if not isinstance(step_size, int | float | np.ndarray | np.floating | jax.Array):
        raise ValueError(
            f"step_size must be a number, since the tail's rule holds for plain gradient steps alone; got "
            f"{type(step_size).__name__}. Pass step_size=0.1, and use inner.reverse for momentum and Adam."
        )
    checks.scalar("step_size", step_size)
    checks.positive("step_size", step_size)
    unrolled = checks.count("unrolled", unrolled, minimum=1)
    steps = checks.count("steps", steps, minimum=1)
    if unrolled > steps:
        raise ValueError(f"unrolled must be at most steps = {steps}; got {unrolled}. Pass unrolled={steps} or fewer.")
    checks.function("ihvp", ihvp, keywords=("damping",))
    optimizer = optax.sgd(step_size)
    first = implicit(
        inner_loss,
        optimizer,
        steps - unrolled,
        ihvp=ihvp(damping=1 / (step_size * unrolled)),
        initial=initial,
        sample=sample,
        cross_sample=cross_sample,
    )
    return chain(first, reverse(inner_loss, optimizer, unrolled, sample=sample))
