"""MRBO: recursive momentum on y and on a hypergradient with its own Neumann series."""

from bilevax import checks
from bilevax.algorithms._one_agent import one_agent
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample
from bilevax.single_loop._levels import PerLevel, Rate, levels
from bilevax.single_loop.correction._none import none
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import storm
from bilevax.single_loop.local_directions import own_neumann
from bilevax.single_loop.step_sizes import StepSizes


@as_called
def mrbo(
    problem: BilevelProblem, step_sizes: StepSizes, *, sample: Sample, momentum: PerLevel[Rate] = 0.1, terms: int = 10
) -> Algorithm:
    """Single-loop bilevel descent on x and y along STORM estimates; there is no v, but a series in each evaluation.

        d_y = ∇_y g          d_x = ∇_x f − ∇²_xy g · a_v Σ_{j=0}^{terms} (I − a_v ∇²_yy g)ʲ ∇_y f          on ξ
        u_s ← (1 − a) (u_s − d_s(previous point; ξ)) + d_s(point; ξ),      s ← s − a_s u_s  for s = x, y

    The whole series is on one sample, and the inverse of a sampled Hessian is not the mean inverse: the limit is
    biased by the noise of the Hessian, besides the (1 − a_v μ)^(terms+1) of the series. `sustain` has neither, and
    needs 2 Hessian products where this needs 2 `terms`.

    Args:
      problem: f and g.
      step_sizes: `Levels(x, y, v)`: of x and y numbers, schedules k -> number, or optax transformations; that of v, a
        number in (0, 2 / L), is that of the series.
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`.
      momentum: a in [0, 1]: a number, a schedule, or `Levels` of them.
      terms: Hessian products of the series, >= 0.

    Returns:
      `Algorithm(init, step)` on x and y without an agents' axis; v of its `State` is ().

    Raises:
      ValueError: if a concrete `momentum` is not in [0, 1], `terms` < 0, the step size of v is no positive number; as
        `bx.single_loop.single_loop`; if there is no key.

    Cost: two ∇f, two ∇_y g, 2 `terms` Hessian products and two cross products, on one sample.

    Reference: Yang, Ji and Liang, "Provably faster algorithms for bilevel optimization", arXiv 2106.04692, algorithm 1.
    Deviation: one sample for all factors of the series, where the paper draws each.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> loss = lambda x, y, c: ((y - x * c) ** 2).mean()
        >>> problem = bx.BilevelProblem(loss, loss)
        >>> method = bx.algorithms.mrbo(problem, (0.1, 0.5, 0.1), sample=bx.sampling.minibatch(2))
        >>> data = jnp.arange(8.0)
        >>> state, info = jax.jit(method.step)(jax.random.key(0), method.init(1.0, 2.0), bx.Batch(data, data))
    """
    sizes = levels("step_sizes", step_sizes)
    checks.scalar("step_sizes.v", sizes.v)
    checks.positive("step_sizes.v", sizes.v)
    rule, estimator = own_neumann(terms=terms, inverse_step=sizes.v), storm(momentum, sample=sample)
    return one_agent(lambda gossip: single_loop(problem, gossip, sizes[:2], estimator, none(), local_directions=rule))
