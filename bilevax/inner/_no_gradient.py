"""Steps of the inner optimizer that no derivative passes through."""

from typing import NamedTuple

import jax.numpy as jnp

from bilevax import checks
from bilevax.carried import parameters
from bilevax.inner._optimizer_steps import (
    Begin,
    Initial,
    Optimizer,
    check_point,
    diverged,
    optimizer_steps,
    run_watched,
    step_keys,
)
from bilevax.meshes import zeros_like
from bilevax.printing import as_called
from bilevax.problem import Calls, InnerSolver, Iterate, Loss, SolverInfo
from bilevax.sampling import Sample, full
from bilevax.typing import Key, PyTree


class NoGradientResidual(NamedTuple):
    """What the report is made from."""

    step_key: Key | None
    x: PyTree
    begin: Begin
    end: Iterate
    batch: PyTree


@as_called
def no_gradient(
    inner_loss: Loss,
    optimizer: Optimizer,
    steps: int,
    *,
    initial: Initial | None = None,
    sample: Sample = full,
) -> InnerSolver:
    """Runs `steps` steps of the inner optimizer, and drops the derivative.

        z_t = Φ(z_{t−1}, x),  t = 1..T          x_bar = 0,   z0_bar = 0

    As the first link of a `chain` it makes a truncated unroll; alone it leaves ∇_x f, the direct part.

    Args:
      inner_loss: g, a function (x, y, batch) -> scalar.
      optimizer: any optax transformation, or a function x ↦ transformation.
      steps: T >= 0.
      initial: y_0 as a function of x; by default y_0 is the warm y.
      sample: how step t draws its batch from the data.

    Returns:
      An `InnerSolver` without state.

    Raises:
      ValueError: if steps is negative, the optimizer is none, or its updates do not look like y.

    Cost: T gradients, memory of one step. The report adds one gradient.

    Reference: Shaban et al., "Truncated back-propagation for bilevel optimization", arXiv 1810.10667.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> loss = lambda x, y, batch: 0.5 * (y - x) ** 2
        >>> first, last = bx.inner.no_gradient(loss, optax.sgd(0.5), 9), bx.inner.reverse(loss, optax.sgd(0.5), 1)
        >>> float(jax.jit(jax.grad(bx.differentiable(bx.inner.chain(first, last))))(1.0, 0.0, None))
        0.5
    """
    steps = checks.count("steps", steps)
    start, _, step, report = optimizer_steps(inner_loss, optimizer, initial, sample)

    def init(x: PyTree, y: PyTree, batch: PyTree = None) -> tuple[()]:
        """No memory; x and y are checked."""
        check_point(x, y)
        return ()

    def forward(
        key: Key | None, state: tuple[()], x: PyTree, z: Iterate, batch: PyTree
    ) -> tuple[Iterate, NoGradientResidual, tuple[()]]:
        """z_T, of the shapes of z, after all steps."""
        step_key = step_keys(key).steps
        z_T, begin = run_watched(step, step_key, batch, x, z, steps)
        return z_T, NoGradientResidual(step_key, x, begin, z_T, batch), state

    def backward(
        residual: NoGradientResidual, state: tuple[()], z_bar: Iterate
    ) -> tuple[tuple[PyTree, Iterate], tuple[()], SolverInfo]:
        """Zeros like x and like y, whatever the cotangent is."""
        step_key, x, begin, z_T, batch = residual
        value, norm = report(step_key, batch, x, z_T)
        breakdown = ~jnp.isfinite(value + norm) | diverged(begin, value, norm)
        info = SolverInfo(value, norm, breakdown, Calls(inner_gradients=steps + 1), ())
        return (zeros_like(x), Iterate(zeros_like(parameters(z_T.y)))), state, info

    return InnerSolver(init, start, forward, backward, fresh=initial is not None)
