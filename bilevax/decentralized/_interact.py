"""INTERACT and SVR-INTERACT: a common x by gradient tracking, and a y of its own for every agent."""

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample
from bilevax.single_loop._levels import Levels, PerLevel
from bilevax.single_loop.correction._none import local
from bilevax.single_loop.correction._tracking import tracking_non_atc
from bilevax.single_loop.correction.correction_type import Correction
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import Estimator, full, spider
from bilevax.single_loop.local_directions import own_neumann
from bilevax.single_loop.step_sizes import StepSizes
from bilevax.typing import Scalar


@as_called
def interact(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    terms: int,
    inverse_step: Scalar,
    correction: Correction | None = None,
) -> Algorithm:
    """Gradient tracking of local hypergradients, exact derivatives, personalised lower level.

        p_i = hypergradient of agent i at (x_i, y_i), by J terms of the Neumann series of its Hessian
        t_i ← Σ_j w_ij t_j + p_i(new) − p_i(old),      x_i ← Σ_j w_ij x_j − a_x t_i,      y_i ← y_i − a_y ∇_y g_i

    It solves min_x mean_i f_i(x, y_i*(x)) with y_i*(x) = argmin_y g_i(x, y), every agent with a y of its own: another
    problem, with another solution x_p, than that of methods with one common y. Do not use it, or compare it, where the
    lower level is common.

    Args:
      problem: f_i and g_i, each strongly convex in y.
      gossip: a `Gossip`, or `Levels` of them; that of y does not count.
      step_sizes: `Levels(x, y)` of numbers, schedules or optax transformations.
      terms: J >= 0; the limit is wrong by (1 − c μ)^(J+1).
      inverse_step: c > 0, usually 1 / L for L-smooth g_i.
      correction: of x; None for `bx.single_loop.correction.tracking_non_atc()`.

    Returns:
      `Algorithm(init, step)`; deterministic; y is personal, `state.v` is ().

    Raises:
      ValueError: if `terms` < 0 or `inverse_step` <= 0; as `bx.single_loop.single_loop`.

    Cost: for each agent and iteration one ∇f, one ∇_y g, J Hessian products and one cross product on all its data;
    2 d_x numbers to each neighbour in one round.

    Reference: Liu et al., "INTERACT: achieving low sample and communication complexities in decentralized bilevel
    learning over networks", arXiv 2207.13283. Reconstructed: tracking of x with local lower levels is the paper's.
    Deviation: the Neumann series stands for its inverse.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> method = bx.decentralized.interact(problem, gossip, (0.1, 0.2), terms=3, inverse_step=0.25)
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> float(info.bytes[0]) / state.x.dtype.itemsize, int(info.rounds)
        (4.0, 1)
    """
    return personal(problem, gossip, step_sizes, full(), terms, inverse_step, correction)


@as_called
def interact_svr(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    terms: int,
    inverse_step: Scalar,
    every: int,
    sample: Sample,
    correction: Correction | None = None,
) -> Algorithm:
    """INTERACT with SPIDER estimates: exact directions in every q-th iteration, differences on samples in between.

        u_k = d(x_k, y_k)                                                  if k mod q = 0
        u_k = u_{k−1} + d(x_k, y_k; ξ_k) − d(x_{k−1}, y_{k−1}; ξ_k)        otherwise

    for both levels, in the place of the exact directions of `interact`. Its limit is that of `interact`, x_p: do not
    use it where the lower level is common, nor where a pass over all data of an agent is out of reach (take `diamond`).

    Args:
      problem: f_i and g_i, each strongly convex in y.
      gossip: a `Gossip`, or `Levels` of them; that of y does not count.
      step_sizes: `Levels(x, y)` of numbers, schedules or optax transformations.
      terms: J >= 0.
      inverse_step: c > 0, usually 1 / L for L-smooth g_i.
      every: q >= 1; the paper takes the square root of the number of examples, for q and for the sample.
      sample: `sample(key, t, data) -> batch` for the data of one agent.
      correction: of x; None for `bx.single_loop.correction.tracking_non_atc()`.

    Returns:
      `Algorithm(init, step)`; y is personal, `state.v` is ().

    Raises:
      ValueError: if `every` < 1; as `interact`; when it draws, if there is no key.

    Cost: as `interact` in every q-th iteration, otherwise twice that on a sample.

    Reference: arXiv 2207.13283 (SVR-INTERACT), see `interact`.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> options = {"terms": 3, "inverse_step": 0.25, "every": 5, "sample": bx.sampling.full}
        >>> method = bx.decentralized.interact_svr(problem, gossip, (0.1, 0.2), **options)
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> int(info.calls.hessian_products[0])
        3
    """
    return personal(problem, gossip, step_sizes, spider(every=every, sample=sample), terms, inverse_step, correction)


def personal(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    estimator: Estimator,
    terms: int,
    inverse_step: Scalar,
    correction: Correction | None,
) -> Algorithm:
    """A common x that is corrected, a y of each agent's own, and hypergradients by its own Neumann series."""
    correction = tracking_non_atc() if correction is None else correction
    checks.instance("correction", correction, Correction, "Pass, say, bx.single_loop.correction.tracking(), called.")
    corrections = Levels(correction, local(), local())
    rule = own_neumann(terms=terms, inverse_step=inverse_step)
    return single_loop(problem, gossip, step_sizes, estimator, corrections, local_directions=rule)
