"""DIAMOND: recursive momentum on x and y, a common x by gradient tracking, and a y of its own for every agent."""

from bilevax.agents._gossip import Gossip
from bilevax.decentralized._interact import personal
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample
from bilevax.single_loop._levels import PerLevel, Rate
from bilevax.single_loop.correction.correction_type import Correction
from bilevax.single_loop.estimator import storm
from bilevax.single_loop.step_sizes import StepSizes
from bilevax.typing import Scalar


@as_called
def diamond(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    sample: Sample,
    momentum: PerLevel[Rate],
    terms: int,
    inverse_step: Scalar,
    correction: Correction | None = None,
) -> Algorithm:
    """Single-loop stochastic INTERACT: momentum and tracking without ever a full gradient.

        u^s ← (1 − a_s) (u^s − d^s(previous point; ξ)) + d^s(point; ξ),      s = x, y
        t_i ← Σ_j w_ij t_j + u^x_i(new) − u^x_i(old),      x_i ← Σ_j w_ij x_j − a_x t_i,      y_i ← y_i − a_y u^y_i

    with d^x the agent's hypergradient by J terms of the Neumann series of its own Hessian. Personalised lower level, as
    `interact`: it goes to x_p, and should not be used where y is common.

    Args:
      problem: f_i and g_i, each strongly convex in y.
      gossip: a `Gossip`, or `Levels` of them; that of y does not count.
      step_sizes: `Levels(x, y)` of numbers, schedules or optax transformations.
      sample: `sample(key, t, data) -> batch` for the data of one agent; one draw serves both points and all products.
      momentum: a in [0, 1]: a number, a schedule, or `Levels` of them.
      terms: J >= 0.
      inverse_step: c > 0, usually 1 / L for L-smooth g_i.
      correction: of x; None for `bx.single_loop.correction.tracking_non_atc()`.

    Returns:
      `Algorithm(init, step)`; y is personal, `state.v` is ().

    Raises:
      ValueError: if a concrete `momentum` is not in [0, 1]; as `interact`; when it draws, if there is no key.

    Cost: for each agent and iteration two ∇f, two ∇_y g, 2 J Hessian products and two cross products on a sample;
    2 d_x numbers to each neighbour in one round.

    Reference: Qiu et al., "DIAMOND: taming sample and communication complexities in decentralized bilevel
    optimization", arXiv 2212.02376. Reconstructed: single loop, momentum with tracking and no full gradients are the
    paper's. Deviation: all factors of the series are on one sample.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> options = {"sample": bx.sampling.full, "momentum": 0.1, "terms": 3, "inverse_step": 0.25}
        >>> method = bx.decentralized.diamond(problem, gossip, (0.1, 0.2), **options)
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> int(info.calls.hessian_products[0]), float(info.bytes[0]) / state.x.dtype.itemsize
        (6, 4.0)
    """
    return personal(problem, gossip, step_sizes, storm(momentum, sample=sample), terms, inverse_step, correction)
