"""LoPA: loopless personalised bilevel optimization; x is common, y and v are each agent's own."""

from bilevax.agents._gossip import Gossip
from bilevax.decentralized._dsoba import averaged_outer
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample, full
from bilevax.single_loop._levels import Levels, PerLevel, Rate
from bilevax.single_loop.correction._none import local, none
from bilevax.single_loop.correction._tracking import tracking
from bilevax.single_loop.correction.correction_type import Correction
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.step_sizes import StepSizes


@as_called
def lopa_local(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    sample: Sample = full,
    momentum: Rate = 1.0,
) -> Algorithm:
    """LoPA-LG: one step on each agent's own y and v, and decentralized descent of x along local gradients.

        y_i ← y_i − a_y d^y_i,      v_i ← v_i − a_v d^v_i
        h_i ← (1 − θ) h_i + θ d^x_i,      x_i ← Σ_j w_ij (x_j − a_x h_j)

    It solves min_x mean_i f_i(x, y_i*(x)), every agent with a lower level of its own. With constant steps its limit is
    x_p but for O(a_x), as x is not corrected for the agents' difference: take `lopa_tracking` where that matters. Do
    not use either where the lower level is common.

    Args:
      problem: f_i and g_i, each strongly convex in y.
      gossip: a `Gossip`, or `Levels` of them; those of y and v do not count.
      step_sizes: `Levels(x, y, v)` of numbers, schedules or optax transformations.
      sample: `sample(key, t, data) -> batch` for the data of one agent; all data by default.
      momentum: θ in (0, 1], weight of the new outer direction in its moving average: a number or a schedule.

    Returns:
      `Algorithm(init, step)`; y and v are personal.

    Raises:
      ValueError: if a concrete `momentum` is not in (0, 1]; as `bx.single_loop.single_loop`.

    Cost: for each agent and iteration one ∇f, one ∇_y g, one Hessian and one cross product; d_x numbers to each
    neighbour in one round.

    Reference: LoPA, arXiv 2312.14690. Reconstructed: that inner solution and Hessian-inverse-vector product are
    tracked recursively, with local gradients or gradient tracking, is the paper's. Deviation: x adapts, then combines;
    h starts as the first direction.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> method = bx.decentralized.lopa_local(problem, gossip, (0.1, 0.2, 0.2))
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> float(info.bytes[0]) / state.x.dtype.itemsize
        2.0
    """
    return _lopa(problem, gossip, step_sizes, sample, momentum, none())


@as_called
def lopa_tracking(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    sample: Sample = full,
    momentum: Rate = 1.0,
) -> Algorithm:
    """LoPA-GT: as `lopa_local`, with gradient tracking of x, and so without its bias.

        y_i ← y_i − a_y d^y_i,      v_i ← v_i − a_v d^v_i,      h_i ← (1 − θ) h_i + θ d^x_i
        t_i ← Σ_j w_ij t_j + h_i(new) − h_i(old),      x_i ← Σ_j w_ij (x_j − a_x t_j)

    Do not use it where the lower level is common, nor where a second message of d_x costs more than a bias of O(a_x).

    Args:
      problem: f_i and g_i, each strongly convex in y.
      gossip: a `Gossip`, or `Levels` of them; those of y and v do not count.
      step_sizes: `Levels(x, y, v)` of numbers, schedules or optax transformations.
      sample: `sample(key, t, data) -> batch` for the data of one agent; all data by default.
      momentum: θ in (0, 1], weight of the new outer direction in its moving average: a number or a schedule.

    Returns:
      `Algorithm(init, step)`; y and v are personal. With all data it converges to x_p.

    Raises:
      ValueError: as `lopa_local`.

    Cost: the derivatives of `lopa_local`; 2 d_x numbers to each neighbour in one round.

    Reference: arXiv 2312.14690, see `lopa_local`. Deviation: semi-ATC tracking.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> method = bx.decentralized.lopa_tracking(problem, gossip, (0.1, 0.2, 0.2))
        >>> state, info = jax.jit(method.step)(None, method.init(jnp.zeros(4), jnp.zeros(4)), batch)
        >>> float(info.bytes[0]) / state.x.dtype.itemsize
        4.0
    """
    return _lopa(problem, gossip, step_sizes, sample, momentum, tracking())


def _lopa(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    sample: Sample,
    momentum: Rate,
    correction: Correction,
) -> Algorithm:
    averaged = averaged_outer(momentum, sample)
    return single_loop(problem, gossip, step_sizes, averaged, Levels(correction, local(), local()))
