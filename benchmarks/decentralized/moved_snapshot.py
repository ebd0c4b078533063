"""An experiment: S3LDBO whose agents refresh when they have moved, in place of at random.

It is compared here and not offered by the library: RESULTS.md says on how many tasks it wins.
"""

from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevax as bx
from bilevax.typing import Array, Scalar


class MovedSnapshot(NamedTuple):
    """The directions of the last refresh of each agent and the point where that was; leaves [n, ...]."""

    directions: bx.Levels
    point: bx.Levels


def moved_snapshot(probability: float) -> bx.single_loop.estimator.Estimator:
    """The directions of the last refresh; the agents whose point has moved farthest since then refresh now.

        r_i = Σ_s ‖s_i − its snapshot‖ / mean_j ‖s_j − its snapshot‖,      s = x, y, v
        u_i = d_i, snapshot_i = (x_i, y_i, v_i)      for the ⌈probability · n⌉ agents of the largest r_i
        u_i as it was                                otherwise

    In a network the agents would tell each other three numbers in each iteration, which nothing counts. The program
    evaluates everybody and keeps the chosen: its seconds say nothing.
    """

    def init(oracle: bx.single_loop.estimator.Oracle, point: bx.Levels, batch: Any) -> MovedSnapshot:
        return MovedSnapshot(oracle.evaluate(point, batch), point)

    def update(key: Any, state: MovedSnapshot, oracle: Any, point: bx.Levels, batch: Any, k: Scalar) -> tuple:
        shares = jnp.stack([r / positive(r.mean()) for r in distances(point, state.point)]).sum(0)
        _, farthest = jax.lax.top_k(shares, ceil(probability * len(shares) - 1e-9))
        chosen = jnp.zeros(len(shares), bool).at[farthest].set(True)

        def kept(new: Array, old: Array) -> Array:
            return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        d = jax.tree.map(kept, oracle.evaluate(point, batch), state.directions)
        return d, MovedSnapshot(d, jax.tree.map(kept, point, state.point)), chosen.astype(jnp.int32)

    return bx.single_loop.estimator.Estimator(init, update)


def distances(one: bx.Levels, other: bx.Levels) -> list[Array]:
    """Of each agent, for x, y and v."""
    return [jax.vmap(optax.tree.norm)(s) for s in optax.tree.sub(one, other)]


def positive(number: Array) -> Array:
    """A divisor."""
    return jnp.maximum(number, jnp.finfo(number.dtype).tiny)


def s3ldbo_adaptive(
    problem: bx.BilevelProblem, gossip: Any, step_sizes: Any, *, probability: float, correction: Any = None
) -> bx.problem.Algorithm:
    """Snapshot gradient tracking with such a choice; its limit is that of `s3ldbo`."""
    corrections = bx.single_loop.correction.tracking() if correction is None else correction
    return bx.single_loop.single_loop(problem, gossip, step_sizes, moved_snapshot(probability), corrections)
