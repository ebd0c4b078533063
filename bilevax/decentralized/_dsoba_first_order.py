"""D-SOBA-FO: decentralized SOBA whose second-order products are differences of gradients."""

from bilevax.agents._gossip import Gossip
from bilevax.decentralized._dsoba import averaged_outer
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample, full
from bilevax.single_loop._levels import PerLevel, Rate
from bilevax.single_loop.correction._none import none
from bilevax.single_loop.engine import single_loop
from bilevax.single_loop.local_directions import first_order
from bilevax.single_loop.step_sizes import StepSizes
from bilevax.typing import Scalar


@as_called
def dsoba_first_order(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    sample: Sample = full,
    momentum: Rate = 1.0,
    mu: Scalar = 1e-3,
) -> Algorithm:
    """Decentralized single-loop bilevel descent, first-order form: `dsoba` without second derivatives.

        ∇²_yy g · v ≈ [∇_y g(x, y + δ v) − ∇_y g(x, y − δ v)] / 2δ,      ∇²_xy g · v likewise from ∇_x g

    in the update of `dsoba`, with its bias; for a quadratic g it IS `dsoba`, whatever δ. Use it where g can be
    differentiated only once, or second derivatives do not fit into memory; elsewhere `dsoba` is exact and cheaper.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them.
      step_sizes: `Levels(x, y, v)` of numbers, schedules or optax transformations.
      sample: `sample(key, t, data) -> batch` for the data of one agent; all data by default.
      momentum: θ in (0, 1], weight of the new outer direction in its moving average: a number or a schedule.
      mu: δ > 0; 1e-3 suits float32 and v of order one.

    Returns:
      `Algorithm(init, step)`.

    Raises:
      ValueError: if a concrete `mu` is not positive; as `dsoba`.

    Cost: for each agent and iteration one ∇f and three ∇g, no second derivative; d_x + 2 d_y numbers to each neighbour
    in one round.

    Reference: Kong et al., arXiv 2402.03167 (D-SOBA-FO), see `dsoba`.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> method = bx.decentralized.dsoba_first_order(problem, bx.gossip(bx.topology.ring(4)), (0.1, 0.2, 0.2))
        >>> state = method.init(jnp.zeros(4), jnp.zeros(4))
        >>> state, info = jax.jit(method.step)(None, state, bx.Batch(jnp.arange(4.0), jnp.zeros(4)))
        >>> int(info.calls.inner_gradients[0]), int(info.calls.hessian_products[0])
        (3, 0)
    """
    rule = first_order(mu)
    return single_loop(problem, gossip, step_sizes, averaged_outer(momentum, sample), none(), local_directions=rule)
