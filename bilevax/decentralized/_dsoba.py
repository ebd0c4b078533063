"""D-SOBA: decentralized SOBA without a correction."""

from bilevax.agents._gossip import Gossip
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample, full
from bilevax.single_loop._levels import PerLevel, Rate
from bilevax.single_loop.correction._none import none
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import Estimator, momentum
from bilevax.single_loop.estimator.estimator_type import rates_of
from bilevax.single_loop.step_sizes import StepSizes


@as_called
def dsoba(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    sample: Sample = full,
    momentum: Rate = 1.0,
) -> Algorithm:
    """Decentralized single-loop bilevel descent, second-order form.

        h ← (1 − θ) h + θ d^x,      x_i ← Σ_j w_ij (x_j − a_x h_j)
        y_i ← Σ_j w_ij (y_j − a_y d^y_j),      v_i ← Σ_j w_ij (v_j − a_v d^v_j)

    With constant steps and different agents the limit is biased by O(step); it is exact where the agents are alike or
    W = 11ᵀ/n, or with steps that decrease to 0.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them.
      step_sizes: `Levels(x, y, v)` of numbers, schedules or optax transformations.
      sample: `sample(key, t, data) -> batch` for the data of one agent; all data by default.
      momentum: θ in (0, 1], weight of the new outer direction in its moving average: a number or a schedule.

    Returns:
      `Algorithm(init, step)`.

    Raises:
      ValueError: if a concrete `momentum` is not in (0, 1]; as `bx.single_loop.single_loop`.

    Cost: for each agent and iteration one ∇f, one ∇_y g, one Hessian and one cross product; d_x + 2 d_y numbers to each
    neighbour in one round.

    Reference: Kong, Zhu, Lu, Huang and Yuan, "Decentralized bilevel optimization: a perspective from transient
    iteration complexity", arXiv 2402.03167 (D-SOBA-SO). The update is as known, not verified. Deviation: x moves along
    the new average, which starts as the first direction.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> method = bx.decentralized.dsoba(problem, bx.gossip(bx.topology.ring(4)), (0.1, 0.2, 0.2))
        >>> state = method.init(jnp.zeros(4), jnp.zeros(4))
        >>> state, info = jax.jit(method.step)(None, state, bx.Batch(jnp.arange(4.0), jnp.zeros(4)))
        >>> float(info.bytes[0]) / state.x.dtype.itemsize
        6.0
    """
    return single_loop(problem, gossip, step_sizes, averaged_outer(momentum, sample), none())


def averaged_outer(weight: Rate, sample: Sample) -> Estimator:
    """Plain directions of y and v, and a moving average of that of x, with weight θ in (0, 1] of the new one."""
    return momentum(rates_of("momentum", weight)._replace(y=1.0, v=1.0), sample=sample)
