"""SPARKLE: any correction at each level, levels in turn."""

from bilevax.agents._gossip import Gossip
from bilevax.decentralized._dsoba import averaged_outer
from bilevax.printing import as_called
from bilevax.problem import Algorithm, BilevelProblem
from bilevax.sampling import Sample, full
from bilevax.single_loop._levels import PerLevel, Rate
from bilevax.single_loop.correction import Correction
from bilevax.single_loop.engine import GAUSS_SEIDEL, Order, single_loop
from bilevax.single_loop.step_sizes import StepSizes


@as_called
def sparkle(
    problem: BilevelProblem,
    gossip: PerLevel[Gossip],
    step_sizes: StepSizes,
    *,
    correction: PerLevel[Correction],
    sample: Sample = full,
    momentum: Rate = 1.0,
    order: Order = GAUSS_SEIDEL,
) -> Algorithm:
    """Single-loop primal-dual bilevel method with its own correction and its own graph at each level.

        y⁺ along ∇_y g(x, y)
        v⁺ along ∇²_yy g(x, y⁺) v − ∇_y f(x, y⁺)
        h⁺ = (1 − θ) h + θ (∇_x f(x, y⁺) − ∇²_xy g(x, y⁺) v⁺),      x⁺ along h⁺

    where "along d" is s⁺ = A (C s − a d) − B q, q⁺ = q + B s⁺, with matrices A, B, C of the correction, in its own
    form. SPARKLE-ED is `exact_diffusion`, SPARKLE-EXTRA `extra`, SPARKLE-GT one of the trackings; ED or EXTRA for y and
    v with tracking for x is the mixed form. All reach (x*, y*, v*); a level with `none` leaves a bias.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them: one graph for each level.
      step_sizes: `Levels(x, y, v)` of numbers or schedules (optax transformations where the level is tracked).
      correction: one of `bx.single_loop.correction`, or `Levels` of them.
      sample: `sample(key, t, data) -> batch` for the data of one agent; all data by default.
      momentum: θ in (0, 1], weight of the new outer direction in its moving average: a number or a schedule.
      order: `GAUSS_SEIDEL`, or `JACOBI` for all levels at once.

    Returns:
      `Algorithm(init, step)`.

    Raises:
      ValueError: if a concrete `momentum` is not in (0, 1]; as `bx.single_loop.single_loop`; from `init`, if a graph
        does not suit its correction (λ_min(W) <= −1/3 with ED or EXTRA: take `bx.topology.lazy`).

    Cost: for each agent and iteration one ∇f, two ∇_y g (one in Jacobi order), one Hessian and one cross product;
    d_x + 2 d_y numbers to each neighbour with ED or EXTRA, twice that with tracking, in three rounds (Jacobi: one).

    Reference: Zhu, Kong, Lu, Huang and Yuan, "SPARKLE: a unified single-loop primal-dual framework for decentralized
    bilevel optimization", arXiv 2411.14166. The order of the levels and the average are as known, not verified.
    Deviation: h starts as the first direction, not as 0.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip = bx.gossip(bx.topology.lazy(bx.topology.ring(4)))
        >>> corrections = bx.single_loop.correction.exact_diffusion()
        >>> method = bx.decentralized.sparkle(problem, gossip, (0.1, 0.2, 0.2), correction=corrections)
        >>> state = method.init(jnp.zeros(4), jnp.zeros(4))
        >>> state, info = jax.jit(method.step)(None, state, bx.Batch(jnp.arange(4.0), jnp.zeros(4)))
        >>> float(info.bytes[0]) / state.x.dtype.itemsize, int(info.rounds)
        (6.0, 3)
    """
    averaged = averaged_outer(momentum, sample)
    return single_loop(problem, gossip, step_sizes, averaged, correction, order=order)
