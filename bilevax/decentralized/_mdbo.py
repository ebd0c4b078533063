"""MDBO: tracked momentum at both levels, with each agent's own inverse Hessian."""

from bilevax.agents._gossip import Gossip
from bilevax.decentralized._dsvrbgd import averaging_weights
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample
from bilevax.single_loop._levels import PerLevel, Rate
from bilevax.single_loop.correction._tracking import tracking_non_atc
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import momentum as moving_average
from bilevax.single_loop.local_directions import own_neumann
from bilevax.single_loop.step_sizes import StepSizes
from bilevax.typing import Scalar


@as_called
def mdbo(
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
    """Momentum-based decentralized bilevel optimization.

    With d^y = ∇_y g_i, d^x = the hypergradient of agent i by J terms of the Neumann series of its own Hessian, and
    a = min(1, α η²), for s = x, y:

        u^s ← (1 − a_s) u^s + a_s d^s(x, y; ξ)
        p^s_i ← Σ_j w_ij p^s_j + u^s_i(new) − u^s_i(old)
        s_i ← s_i + η (Σ_j w_ij s_j − β_s p^s_i − s_i)

    There is no v: nothing of the size of a Hessian product is sent. Do not use it where the agents differ: y goes to
    the common y*(x), but x to the point where the mean of d^x vanishes, each with its OWN inverse Hessian, which is not
    x*. For agents that are alike it goes to x*, but for (1 − c μ)^(J+1).

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them.
      step_sizes: β, `Levels(x, y)` of numbers, schedules or optax transformations.
      sample: `sample(key, t, data) -> batch` for the data of one agent; one draw serves all J products.
      momentum: α >= 0, a number, a schedule or `Levels`.
      rate: η in (0, 1].
      terms: J >= 0, Hessian products of the Neumann series.
      inverse_step: c > 0, usually 1 / L for an L-smooth g.

    Returns:
      `Algorithm(init, step)`; `state.v` is ().

    Raises:
      ValueError: if a concrete `momentum` is negative, `rate` is not in (0, 1], `terms` < 0 or `inverse_step` <= 0; as
        `bx.single_loop.single_loop`; when it draws, if there is no key.

    Cost: for each agent and iteration one ∇f, one ∇_y g, J Hessian products and one cross product on a sample;
    2 (d_x + d_y) numbers to each neighbour in one round.

    Reference: Gao, Gu and Thai, "On the convergence of distributed stochastic bilevel optimization algorithms over a
    network", arXiv 2206.15025. Reconstructed: that it tracks momentum estimates of local hypergradients is the paper's.
    Deviation: all factors of the series are on one sample, and the series is not cut at random.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> options = {"momentum": 0.4, "rate": 0.5, "terms": 3, "inverse_step": 0.25}
        >>> method = bx.decentralized.mdbo(problem, gossip, (0.1, 0.2), sample=bx.sampling.full, **options)
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> int(info.calls.hessian_products[0]), float(info.bytes[0]) / state.x.dtype.itemsize
        (3, 8.0)
    """
    return single_loop(
        problem,
        gossip,
        step_sizes,
        moving_average(averaging_weights(momentum, rate), sample=sample),
        tracking_non_atc(rate=rate),
        local_directions=own_neumann(terms=terms, inverse_step=inverse_step),
    )
