"""S3LDBO whose agents refresh when they have moved, in place of at random."""

from typing import Any

import chex

from bilevax.decentralized.correction import Correction
from bilevax.decentralized.engine import Algorithm, single_loop
from bilevax.decentralized.estimator import moved_snapshot
from bilevax.decentralized.levels import Levels
from bilevax.decentralized.sldbo import tracked
from bilevax.problem import BilevelProblem


def s3ldbo_adaptive(
    problem: BilevelProblem,
    gossip: Any,
    step_sizes: Any,
    p: float,
    block: int | None = None,
    radius: chex.Numeric | None = None,
    correction: Correction | Levels | None = None,
) -> Algorithm:
    """Snapshot gradient tracking in which those agents evaluate who have moved farthest since they last did.

        s_i ← Σ_j w_ij (s_j − a_s t^s_j)            v_i ← its projection on the ball of this radius
        D'_i = d_i(new point) for the ⌈p n⌉ agents farthest from the point of their D_i, else D_i
        t^s_i ← Σ_j w_ij t^s_j + D'_i − D_i,        D ← D'

    It has the limit of `s3ldbo`, and its cost at the same p.

    Args:
      problem: f_i and g_i.
      gossip: a `Gossip`, or `Levels` of them.
      step_sizes: `Levels(x, y, v)` of numbers, schedules or optax transformations.
      p: fraction of the agents that evaluate in an iteration, in (0, 1].
      block: see `bx.estimator.moved_snapshot`; None compares all agents, on one device.
      radius: of the ball of v; None for no projection.
      correction: the form of gradient tracking, or `Levels` of corrections; None for `bx.correction.tracking()`,
        semi-ATC. With `bx.correction.local()` for y and v, every agent has a lower level of its own.

    Returns:
      `Algorithm(init, step)`; deterministic; `init` needs the batch, where everybody evaluates once.

    Raises:
      ValueError: as `bx.estimator.moved_snapshot` and `bx.decentralized.single_loop`; from `init` without a batch.

    Cost: as `s3ldbo` with `bx.coins.subset(p)`; besides, the agents of a block tell each other three numbers in each
    iteration, which Info does not count.

    Reference: the tracking is that of `s3ldbo`, arXiv 2605.31311; the choice of the agents is this library's own.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> problem = bx.BilevelProblem(lambda x, y, c: (y - c) ** 2, lambda x, y, c: (y - x) ** 2)
        >>> gossip, batch = bx.gossip(bx.topology.ring(4)), bx.Batch(jnp.arange(4.0), jnp.zeros(4))
        >>> method = bx.decentralized.s3ldbo_adaptive(problem, gossip, (0.1, 0.2, 0.2), p=0.25)
        >>> state, info = method.step(None, method.init(jnp.zeros(4), jnp.zeros(4), batch), batch)
        >>> int(info.calls.hessian_products.sum())
        1
    """
    corrections = tracked("correction", correction)
    return single_loop(problem, gossip, step_sizes, moved_snapshot(p, block), corrections, radius=radius)
