"""SRBA: recursive differences of the three directions, from exact ones now and then."""

from bilevax import checks
from bilevax.algorithms._one_agent import one_agent
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample
from bilevax.single_loop.correction._none import none
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import spider
from bilevax.single_loop.step_sizes import StepSizes


@as_called
def srba(problem: BilevelProblem, step_sizes: StepSizes, *, sample: Sample, every: int) -> Algorithm:
    """Single-loop bilevel descent along SARAH estimates of the directions.

        u_s = d_s(x, y, v)                                              if k mod q = 0, on all data
        u_s ← u_s + d_s(point; ξ) − d_s(previous point; ξ)              otherwise
        s ← s − a_s u_s  for s = x, y, v, all at once

    With constant steps it converges to (x*, y*, v*). A q of about the number of batches in the data keeps the
    share of the full passes at a half or less. Do not use it where a pass over all data is out of reach: `sustain` and
    `fsla` read batches alone.

    Args:
      problem: f and g, means over their examples.
      step_sizes: `Levels(x, y, v)` of numbers, schedules k -> number, or optax transformations.
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`.
      every: q >= 1, iterations from one exact evaluation to the next.

    Returns:
      `Algorithm(init, step)` on x and y without an agents' axis.

    Raises:
      ValueError: if `every` < 1; as `bx.single_loop.single_loop`; if there is no key.

    Cost: two ∇f, two ∇_y g and two pull-backs of v on one sample; in every `every`-th iteration one of each on all
    data.

    Reference: Dagréou, Moreau, Vaiter and Ablin, "A lower bound and a near-optimal algorithm for bilevel empirical risk
    minimization", arXiv 2302.08766; v has the opposite sign here.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> loss = lambda x, y, c: ((y - x * c) ** 2).mean()
        >>> problem = bx.BilevelProblem(loss, loss)
        >>> method = bx.algorithms.srba(problem, (0.1, 0.5, 0.5), sample=bx.sampling.minibatch(2), every=4)
        >>> data = jnp.arange(8.0)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(data, data))
    """
    every = checks.count("every", every, minimum=1)
    return one_agent(
        lambda gossip: single_loop(problem, gossip, step_sizes, spider(every=every, sample=sample), none())
    )
