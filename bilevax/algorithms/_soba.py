"""SOBA: one step on each of x, y and v along sampled directions."""

from bilevax.algorithms._one_agent import one_agent
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample, full
from bilevax.single_loop.correction._none import none
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.estimator import stochastic
from bilevax.single_loop.step_sizes import StepSizes


@as_called
def soba(problem: BilevelProblem, step_sizes: StepSizes, *, sample: Sample = full) -> Algorithm:
    """Stochastic single-loop bilevel descent on one machine.

        x ← x − a_x d_x(x, y, v; ξ),      y ← y − a_y d_y(x, y, v; ξ),      v ← v − a_v d_v(x, y, v; ξ)

    all at once. With exact directions it converges to (x*, y*, v*), with samples for decreasing steps.

    Args:
      problem: f and g.
      step_sizes: `Levels(x, y, v)` of numbers, schedules k -> number, or optax transformations.
      sample: `sample(key, t, data) -> batch`, such as `bx.sampling.minibatch(64)`; outer and inner data are drawn
        apart. All data by default.

    Returns:
      `Algorithm(init, step)` on x and y without an agents' axis.

    Raises:
      ValueError: as `bx.single_loop.single_loop`.

    Cost: one ∇f, one ∇_y g and one pull-back of v for both second-order products, on a sample.

    Reference: Dagréou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables stochastic and
    global variance reduction algorithms", arXiv 2201.13409; v has the opposite sign here.

    Example:
        >>> import bilevax as bx, jax
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> method = bx.algorithms.soba(problem, (0.1, 0.5, 0.5))
        >>> state, info = jax.jit(method.step)(None, method.init(1.0, 2.0), bx.Batch(None, None))
        >>> float(state.x), float(state.y), float(state.v)
        (1.0, 1.0, 2.0)
    """
    return one_agent(lambda gossip: single_loop(problem, gossip, step_sizes, stochastic(sample), none()))
