"""SUSTAIN: recursive momentum at both levels on one machine."""

from bilevax.algorithms._one_agent import one_agent
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample
from bilevax.single_loop._levels import PerLevel, Rate
from bilevax.single_loop.correction._none import none
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import storm
from bilevax.single_loop.step_sizes import StepSizes


@as_called
def sustain(
    problem: BilevelProblem, step_sizes: StepSizes, *, sample: Sample, momentum: PerLevel[Rate] = 0.1
) -> Algorithm:
    """Single-loop bilevel descent along STORM estimates of the directions.

        u_s ← (1 − a_s) (u_s − d_s(previous point; ξ)) + d_s(point; ξ),      s ← s − step_s u_s  for s = x, y, v

    Args:
      problem: f and g.
      step_sizes: `Levels(x, y, v)` of numbers, schedules k -> number, or optax transformations.
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`.
      momentum: a in [0, 1]: a number, a schedule, or `Levels` of them.

    Returns:
      `Algorithm(init, step)` on x and y without an agents' axis.

    Raises:
      ValueError: if a concrete `momentum` is not in [0, 1]; as `bx.single_loop.single_loop`; if there is no key.

    Cost: two ∇f, two ∇_y g and two pull-backs of v, on one sample.

    Reference: Khanduri et al., "A near-optimal algorithm for stochastic bilevel optimization via double-momentum",
    arXiv 2102.07367. Deviation: v is a third variable with its own step, where the paper takes a truncated Neumann
    series.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> loss = lambda x, y, c: ((y - x * c) ** 2).mean()
        >>> problem = bx.BilevelProblem(loss, loss)
        >>> method = bx.algorithms.sustain(problem, (0.1, 0.5, 0.5), sample=bx.sampling.minibatch(2))
        >>> data = jnp.arange(8.0)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(data, data))
    """
    return one_agent(lambda gossip: single_loop(problem, gossip, step_sizes, storm(momentum, sample=sample), none()))
