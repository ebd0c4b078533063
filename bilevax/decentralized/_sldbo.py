"""SLDBO: gradient tracking on all three levels, and a projection."""

from bilevax.agents._gossip import Gossip
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.single_loop._levels import Levels, PerLevel
from bilevax.single_loop.correction._tracking import tracking
from bilevax.single_loop.correction.correction_type import Correction
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import full
from bilevax.single_loop.method import of_kind
from bilevax.single_loop.step_sizes import StepSizes
from bilevax.typing import PyTree, Scalar


@as_called
def sldbo(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    radius: Scalar | None = None,
    correction: PerLevel[Correction] | None = None,
) -> Algorithm:
    """Single-loop decentralized bilevel optimization with exact local directions.

    For s = x, y, v at once, from t_0 = d(x_0, y_0, v_0):

        s_i ← Σ_j w_ij (s_j − a_s t^s_j)            v_i ← its projection on the ball of this radius
        t^s_i ← Σ_j w_ij t^s_j + d^s_i(new point) − d^s_i(old point)

    It converges to (x*, y*, v*) of min_x mean_i f_i(x, y*(x)), y*(x) = argmin_y mean_i g_i(x, y), where only the MEAN
    of the inner losses needs to be strongly convex.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them.
      step_sizes: `Levels(x, y, v)` of numbers, schedules or optax transformations.
      radius: ρ of the ball of v, at least sup ‖v*‖ (for example a bound of ‖∇_y f‖ over the strong convexity of g): a
        smaller one changes the limit. None for no projection.
      correction: the form of gradient tracking, or `Levels` of corrections; None for the semi-ATC one,
        `bx.single_loop.correction.tracking()`. With `local()` for y and v, every agent has a
        lower level of its own.

    Returns:
      `Algorithm(init, step)`; deterministic, the key may be None.

    Raises:
      ValueError: as `bx.single_loop.single_loop`.

    Cost: for each agent and iteration one ∇f, one ∇_y g, one Hessian and one cross product; 2 (d_x + 2 d_y) numbers to
    each neighbour in one round.

    Reference: Dong, Ma, Yang and Yin, "A single-loop algorithm for decentralized bilevel optimization", arXiv
    2311.08945.
    Reconstructed: that it is single-loop with tracking, projection and two products per iteration is the paper's; where
    W stands (here: around the step) is not verified.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> method = bx.decentralized.sldbo(problem, bx.gossip(bx.topology.ring(4)), (0.1, 0.2, 0.2))
        >>> state = method.init(jnp.zeros(4), jnp.zeros(4))
        >>> state, info = jax.jit(method.step)(None, state, bx.Batch(jnp.arange(4.0), jnp.zeros(4)))
        >>> int(info.calls.hessian_products[0]), float(info.bytes[0]) / state.x.dtype.itemsize, int(info.rounds)
        (1, 12.0, 1)
    """
    return single_loop(problem, gossip, step_sizes, full(), tracked("correction", correction), radius=radius)


def tracked(name: str, correction: PerLevel[Correction] | None, rate: Scalar = 1.0) -> Levels[PyTree]:
    """One correction for each level, semi-ATC tracking where there is none; raises ValueError for anything else."""
    chosen = tracking(rate) if correction is None else correction
    return of_kind(name, chosen, Correction, "Pass, say, bx.single_loop.correction.tracking(), called.")
