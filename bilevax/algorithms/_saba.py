"""SABA: SOBA with a table of past directions, which takes the noise away."""

from bilevax.algorithms._one_agent import one_agent
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.single_loop.correction._none import none
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import saga
from bilevax.single_loop.step_sizes import StepSizes


@as_called
def saba(problem: BilevelProblem, step_sizes: StepSizes, *, blocks: int) -> Algorithm:
    """SOBA with SAGA estimates of the directions over fixed blocks of the data.

        u = d(x, y, v; b) − T_b + mean_b' T_b',      T_b ← d(x, y, v; b),      s ← s − a_s u_s  for s = x, y, v

    It converges to (x*, y*, v*) with constant steps.

    Args:
      problem: f and g, means over their examples.
      step_sizes: `Levels(x, y, v)` of numbers, schedules k -> number, or optax transformations.
      blocks: number of blocks of the outer and of the inner data, a divisor of both numbers of examples.

    Returns:
      `Algorithm(init, step)` on x and y without an agents' axis.

    Raises:
      ValueError: if `blocks` < 1 or no divisor; as `bx.single_loop.single_loop`; if there is no key.

    Cost: one ∇f, one ∇_y g and one pull-back of v, on a block; memory `blocks` (d_x + 2 d_y).

    Reference: Dagréou et al., arXiv 2201.13409. Deviation: block b of the outer data goes with block b of the inner
    data in one table, where the paper draws them apart; T starts at 0.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> loss = lambda x, y, c: ((y - x * c) ** 2).mean()
        >>> problem = bx.BilevelProblem(loss, loss)
        >>> method, data = bx.algorithms.saba(problem, (0.1, 0.5, 0.5), blocks=4), jnp.arange(8.0)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(data, data))
    """
    return one_agent(lambda gossip: single_loop(problem, gossip, step_sizes, saga(blocks), none()))
