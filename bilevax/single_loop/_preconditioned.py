"""Steps along a direction that the agent's own curvature has rescaled."""

from typing import Any, NamedTuple

import jax

from bilevax import checks
from bilevax.problem import IHVP, BilevelProblem
from bilevax.sampling import fold
from bilevax.single_loop.correction.correction_type import Move
from bilevax.typing import PyTree, Scalar


class Preconditioned(NamedTuple):
    """A step size, and an inverse-Hessian-vector product in front of it; see `preconditioned`.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.preconditioned(0.5, bx.ihvp.identity(1.0)).step_size
        0.5
    """

    step_size: Any
    ihvp: IHVP


def preconditioned(step_size: Any, ihvp: IHVP) -> Preconditioned:
    """The step size of y or v, with the curvature of each agent's own inner loss divided out.

        s_i ← … − a P_i⁻¹ t_i            P_i ≈ ∇²_yy g_i at the agent's (x_i, y_i), on all its data

    t is the CORRECTED direction, say the tracker, so that the limit stays the same: at a fixed point all t_i are one
    vector t, and mean P_i⁻¹ t = 0 says t = 0 for positive definite P_i. (A direction that is rescaled before it is
    tracked would move the limit.) It pays where the inner problem is badly conditioned and the agents are alike enough
    for their own curvature to resemble the mean, or where their Kronecker factors are averaged. Do not use it where a
    single agent's Hessian says little of the mean, as with a few labels on each agent: damp it, or leave it out.

    Args:
      step_size: a, a number or a schedule k -> number; about 1 is Newton's step.
      ihvp: such as `bx.ihvp.kfac()`, `bx.ihvp.ekfac()` or `bx.ihvp.diagonal(...)`, one with `spd=True`. It is
        prepared at each iteration, under `jax.vmap` over the agents; in an inner loop (`ma_dsbo`, `c2dfb`) at each of
        its steps, at the point where it began.

    Returns:
      A value for `step_sizes.y` or `step_sizes.v` of a method with the correction `none` or gradient tracking.

    Raises:
      ValueError: if `ihvp` is none, or not linear and positive definite; in `bx.single_loop.single_loop`, for x; from
        `init`, with exact diffusion or EXTRA.

    Cost: for each agent and iteration what `ihvp` needs to prepare and apply itself, for y and for v apart, which
    `Info.calls` does not count. Nothing is sent.

    Example:
        >>> import bilevax as bx
        >>> newton = bx.single_loop.preconditioned(0.5, bx.ihvp.kfac(damping=1e-2))
        >>> steps = bx.Levels(x=0.01, y=newton, v=newton)
    """
    checks.instance("ihvp", ihvp, IHVP, "Pass, say, bx.ihvp.kfac().")
    if not ihvp.spd:
        raise ValueError(
            "ihvp must be linear, symmetric and positive definite (IHVP.spd is True) to precondition; got one that "
            "is not. Pass, say, bx.ihvp.kfac() or bx.ihvp.diagonal(...)."
        )
    if callable(step_size):
        checks.function("step_size", step_size, "k")
    else:
        checks.scalar("step_size", step_size)
        checks.nonnegative("step_size", step_size)
    return Preconditioned(step_size, ihvp)


class Place(NamedTuple):
    """Where the agents are when a level moves, for a step size that looks at it: leaves [n, ...].

    Attributes:
      problem: f_i and g_i.
      point: `Levels(x, y, v)`.
      batch: `Batch(outer, inner)`; None at `init` without one.
      key: what they draw with.
      agents: their global ids [n].

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.Place(None, bx.Levels(1.0, 2.0, 3.0), None).point.y
        2.0
    """

    problem: BilevelProblem
    point: Any
    batch: Any
    key: Any = None
    agents: Any = None


def preconditioned_move(step: Preconditioned, size: Scalar, place: Place) -> Move:
    """The move −size · P_i⁻¹ t_i of each agent at its point (x, y)."""
    inner_loss, (x, y, _), batch = place.problem.inner_loss, place.point, place.batch

    def init(s: PyTree) -> Any:
        inner = None if batch is None else batch.inner
        return jax.vmap(lambda x, y, data: step.ihvp.init(x, y, data, inner_loss))(x, y, inner)

    def one(t: Any, state: Any, agent: Any, x: Any, y: Any, data: Any) -> tuple[PyTree, Any]:
        apply, state = step.ihvp.prepare(fold(place.key, agent), state, inner_loss, (x, y, data))
        return jax.tree.map(lambda leaf, like: (-size * leaf).astype(like.dtype), apply(t)[0], t), state

    def apply(t: PyTree, state: Any, s: PyTree) -> tuple[PyTree, Any]:
        return jax.vmap(one)(t, state, place.agents, x, y, batch.inner)

    return Move(init, apply, linear=False)
