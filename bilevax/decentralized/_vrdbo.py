"""VRDBO: tracked recursive momentum at both levels, with each agent's own inverse Hessian."""

from bilevax.agents._gossip import Gossip
from bilevax.decentralized._dsvrbgd import averaging_weights
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample
from bilevax.single_loop._levels import PerLevel, Rate
from bilevax.single_loop.correction._tracking import tracking_non_atc
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import storm
from bilevax.single_loop.local_directions import own_neumann
from bilevax.single_loop.step_sizes import StepSizes
from bilevax.typing import Scalar


@as_called
def vrdbo(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    sample: Sample,
    momentum: PerLevel[Rate],
    rate: Scalar,
    terms: int,
    inverse_step: Scalar,
) -> Algorithm:
    """Variance-reduced decentralized bilevel optimization: `mdbo` with recursive momentum (STORM) in place of momentum.

        u^s ← (1 − a_s) (u^s − d^s(previous point; ξ)) + d^s(point; ξ),      a = min(1, α η²),   s = x, y
        p^s_i ← Σ_j w_ij p^s_j + u^s_i(new) − u^s_i(old)
        s_i ← s_i + η (Σ_j w_ij s_j − β_s p^s_i − s_i)

    Do not use it where the agents differ: as `mdbo`, it goes to x_l, where each agent inverts its own Hessian.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them.
      step_sizes: β, `Levels(x, y)` of numbers, schedules or optax transformations.
      sample: `sample(key, t, data) -> batch` for the data of one agent; one draw serves both points and all products.
      momentum: α >= 0, a number, a schedule or `Levels`.
      rate: η in (0, 1].
      terms: J >= 0, Hessian products of the Neumann series.
      inverse_step: c > 0, usually 1 / L for an L-smooth g.

    Returns:
      `Algorithm(init, step)`; `state.v` is ().

    Raises:
      ValueError: as `mdbo`.

    Cost: twice the derivatives of `mdbo`, at two points; 2 (d_x + d_y) numbers to each neighbour in one round.

    Reference: Gao, Gu and Thai, arXiv 2206.15025. Reconstructed, see `mdbo`.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> options = {"momentum": 0.4, "rate": 0.5, "terms": 3, "inverse_step": 0.25}
        >>> method = bx.decentralized.vrdbo(problem, gossip, (0.1, 0.2), sample=bx.sampling.full, **options)
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> int(info.calls.hessian_products[0]), float(info.bytes[0]) / state.x.dtype.itemsize
        (6, 8.0)
    """
    return single_loop(
        problem,
        gossip,
        step_sizes,
        storm(averaging_weights(momentum, rate), sample=sample),
        tracking_non_atc(rate=rate),
        local_directions=own_neumann(terms=terms, inverse_step=inverse_step),
    )
