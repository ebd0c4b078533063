"""The moved snapshot: those agents evaluate their directions who have moved farthest since they last did."""

from math import ceil
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.decentralized.coins import blocks_of
from bilevax.decentralized.estimator.lazy_snapshot import at_init, refreshed
from bilevax.decentralized.estimator.oracle import Estimator, Oracle
from bilevax.decentralized.levels import Levels
from bilevax.problem import Batch, norm


class MovedSnapshotState(NamedTuple):
    """The directions of the last refresh of each agent and the point where that was; leaves [n, ...].

    Example:
        >>> import bilevax as bx
        >>> bx.estimator.MovedSnapshotState._fields
        ('directions', 'point')
    """

    directions: Levels
    point: Levels


def moved_snapshot(p: float, block: int | None = None) -> Estimator:
    """The directions of the last refresh; the agents whose point has moved farthest since then refresh now.

        r_i = Σ_s ‖s_i − its snapshot‖ / mean_j ‖s_j − its snapshot‖,      s = x, y, v
        u_i = d_i, snapshot_i = (x_i, y_i, v_i)      for the ⌈p · block⌉ agents of the largest r_i in each block
        u_i as it was                                otherwise

    Stale directions are wrong in proportion to how far their agent has moved: nobody is left behind, and whoever stands
    still is not asked. As many evaluations as `lazy_snapshot(bx.coins.subset(p))`, without a draw.

    Args:
      p: fraction in (0, 1].
      block: agents per block, a divisor of the number of agents on a device, who compare their r_i; None for one block
        of all agents, on one device.

    Returns:
      `Estimator` whose state is `MovedSnapshotState`.

    Raises:
      ValueError: if `p` is not in (0, 1] or `block` < 1; from `init` if there is no batch; when it chooses, if the
        blocks do not fit the agents or span two devices.

    Cost: the evaluations of the chosen agents, and one of everybody at `init`; one more copy of the point. In a
    network, the agents of a block also tell each other three numbers in each iteration, which `Info.bytes` does not
    count.

    Example:
        >>> import bilevax as bx
        >>> estimator = bx.estimator.moved_snapshot(0.25)
    """
    if isinstance(p, jax.core.Tracer) or jnp.ndim(p):
        raise ValueError(f"p must be a plain number: it fixes the shape of the program; got {p!r}. Pass, say, p=0.25.")
    checks.fraction("p", p)
    if block is not None:
        block = checks.count("block", block, minimum=1)

    def init(oracle: Oracle, point: Levels, batch: Any) -> MovedSnapshotState:
        return MovedSnapshotState(at_init(oracle, point, batch), point)

    def update(
        key: Any, state: MovedSnapshotState, oracle: Oracle, point: Levels, batch: Batch, k: chex.Numeric
    ) -> tuple:
        local = len(oracle.gossip.agents())
        size = blocks_of(oracle.gossip, block, f"block={local}, all agents of a device")
        moved = [jax.vmap(norm)(s).reshape(-1, size) for s in optax.tree.sub(point, state.point) if jax.tree.leaves(s)]
        tiny = jnp.finfo(jnp.float32).tiny
        shares = sum(distance / jnp.maximum(distance.mean(1, keepdims=True), tiny) for distance in moved)
        _, farthest = jax.lax.top_k(shares, ceil(p * size - 1e-9))
        first = jnp.arange(len(farthest)) * size
        positions = (first[:, None] + farthest).reshape(-1)
        d, evaluations = refreshed(oracle, point, batch, state.directions, positions)
        snapshot = jax.tree.map(lambda old, new: old.at[positions].set(new[positions]), state.point, point)
        return d, MovedSnapshotState(d, snapshot), evaluations

    return Estimator(init, update)
