"""SAGA: a table of past directions takes the noise of sampling away."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.printing import as_called
from bilevax.problem import Batch
from bilevax.sampling import needed
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.estimator.estimator_type import Estimator, Oracle, everybody, zeros_like
from bilevax.typing import Array, Key, PyTree, Scalar


class SAGAState(NamedTuple):
    """The last directions on each block of the data, leaves [n, blocks, ...], and their means, leaves [n, ...].

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> gossip, levels = bx.gossip(bx.topology.ring(4)), ("x", "y", "v")
        >>> oracle = bx.single_loop.estimator.Oracle(lambda point, batch: point, gossip, levels)
        >>> point = bx.Levels(jnp.ones((4, 2)), jnp.ones(4), jnp.zeros(4))
        >>> state = bx.single_loop.estimator.saga(blocks=10).init(oracle, point, None)
        >>> state.table.x.shape, state.mean.x.shape
        ((4, 10, 2), (4, 2))
    """

    table: Levels[PyTree]
    mean: Levels[PyTree]


@as_called
def saga(blocks: int) -> Estimator:
    """SAGA: a table of the last directions on each block of the data corrects a fresh block.

        u_k = d(s_k; b) − T_b + mean_b' T_b',      T_b ← d(s_k; b)           b uniform, T = 0 at first

    Args:
      blocks: B, the number of blocks that the outer and the inner data of each agent are cut into, >= 1. Block b of the
        outer data goes with block b of the inner data, and the losses must be means over the examples.

    Returns:
      `Estimator` whose state is `SAGAState(table, mean)`.

    Raises:
      ValueError: if `blocks` < 1, or if the number of examples is no multiple of it; when it draws, if there is no key.

    Cost: one evaluation of the directions on one block for each agent and iteration; memory B directions for each
    agent.

    Reference: Defazio, Bach and Lacoste-Julien, arXiv 1407.0202; for bilevel problems SABA, arXiv 2201.13409, which
    draws the blocks of f and g apart.

    Example:
        >>> import bilevax as bx
        >>> estimator = bx.single_loop.estimator.saga(blocks=10)
    """
    blocks = checks.count("blocks", blocks, minimum=1)

    def block(data: Any, b: Array) -> Any:
        def rows(leaf: Array) -> Array:
            if jnp.ndim(leaf) == 0:
                return leaf
            if leaf.shape[0] % blocks:
                raise ValueError(
                    f"blocks must divide the number of examples of each agent; got {blocks} blocks of "
                    f"{leaf.shape[0]} examples. Choose a divisor of {leaf.shape[0]}."
                )
            return leaf.reshape(blocks, -1, *leaf.shape[1:])[b]

        return jax.tree.map(rows, data)

    def init(oracle: Oracle, point: Levels[PyTree], batch: Any) -> SAGAState:
        zeros = zeros_like(oracle, point)
        table = jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], blocks, *leaf.shape[1:]), leaf.dtype), zeros)
        return SAGAState(table, zeros)

    def update(
        key: Key | None, state: SAGAState, oracle: Oracle, point: Levels[PyTree], batch: Batch, k: Scalar
    ) -> tuple[Levels[PyTree], SAGAState, Array]:
        agents = oracle.gossip.agents()
        keys = jax.vmap(lambda agent: jax.random.fold_in(needed(key, "a random choice"), agent))(agents)
        chosen = jax.vmap(lambda key: jax.random.randint(key, (), 0, blocks))(keys)
        d = oracle.evaluate(point, jax.vmap(block)(batch, chosen))
        rows = jnp.arange(len(agents))
        change = jax.tree.map(lambda d, table: d - table[rows, chosen], d, state.table)
        u = optax.tree.add(change, state.mean)
        table = jax.tree.map(lambda table, d: table.at[rows, chosen].set(d), state.table, d)
        mean = jax.tree.map(lambda mean, change: mean + change / blocks, state.mean, change)
        return u, SAGAState(table, mean), everybody(oracle)

    return Estimator(init, update)
