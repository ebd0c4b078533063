"""The lazy snapshot: agents evaluate their directions when a coin says so."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.printing import as_called
from bilevax.problem import Batch
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.estimator.estimator_type import Coins, Estimator, Oracle, everybody, where
from bilevax.typing import Array, Key, PyTree, Scalar


@as_called
def lazy_snapshot(coins: Coins) -> Estimator:
    """The directions of the last refresh; a coin says who refreshes now.

        u_i = d_i(s_i) where the coin chooses agent i,      u_i as it was otherwise

    Everybody evaluates at `init`, which needs the batch; coin k acts at iteration k + 1. A coin that returns ids makes
    the program evaluate the chosen agents only (gather, evaluate, scatter), and so does one that chooses all or none
    (`lax.cond`); a mask [n] evaluates every agent held here and keeps the chosen, unless one agent is held.

    Args:
      coins: `coins(key, k, gossip)` -> who refreshes: a scalar bool (all or none), a bool [n] of the agents held here,
        or int [m], global ids, of which those of agents held elsewhere are left out. See `bx.coins`.

    Returns:
      `Estimator` whose state is u.

    Raises:
      ValueError: if `coins` is not such a function; from `init` if there is no batch.

    Cost: the evaluations of the chosen agents, and one of everybody at `init`. The first iteration finds the point of
    `init`: a choice by ids evaluates there once more.

    Example:
        >>> import bilevax as bx
        >>> estimator = bx.single_loop.estimator.lazy_snapshot(bx.coins.subset(0.25))
    """
    checks.function("coins", coins, "key", "k", "gossip")

    def init(oracle: Oracle, point: Levels[PyTree], batch: Any) -> Levels[PyTree]:
        if batch is None:
            raise ValueError(
                "batch is needed at init, where every agent evaluates its first snapshot; got None. Call "
                "algorithm.init(x, y, batch)."
            )
        return oracle.evaluate(point, batch)

    def update(
        key: Key | None, state: Levels[PyTree], oracle: Oracle, point: Levels[PyTree], batch: Batch, k: Scalar
    ) -> tuple[Levels[PyTree], Levels[PyTree], Array]:
        chosen = jnp.asarray(coins(key, jnp.maximum(k - 1, 0), oracle.gossip))
        ones = everybody(oracle)
        if jnp.issubdtype(chosen.dtype, jnp.integer) and chosen.ndim == 1:
            positions = chosen - oracle.gossip.agents()[0]
            positions = jnp.where((positions < 0) | (positions >= ones.size), ones.size, positions)  # held elsewhere
            d = oracle.evaluate(*jax.tree.map(lambda leaf: jnp.asarray(leaf)[positions], (point, batch)))
            d = jax.tree.map(lambda old, new: old.at[positions].set(new, mode="drop"), state, d)
            return d, d, (0 * ones).at[positions].add(1, mode="drop")
        _check_choice(chosen, ones.shape)
        chosen = chosen & (k > 0)
        if chosen.size == 1:
            d = jax.lax.cond(chosen.reshape(()), lambda: oracle.evaluate(point, batch), lambda: state)
        else:
            d = where(chosen, oracle.evaluate(point, batch), state)
        return d, d, jnp.where(chosen, ones, 0)

    return Estimator(init, update)


def _check_choice(chosen: Array, shape: tuple[int, ...]) -> None:
    if chosen.dtype != bool or chosen.shape not in ((), shape):
        raise ValueError(
            f"coins must return a scalar bool, a bool {list(shape)}, one for each agent held here, or int ids [m] of "
            f"such agents; got {chosen.dtype} {list(chosen.shape)}. Of a full mask, take mask[gossip.agents()]."
        )
