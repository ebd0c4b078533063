"""A decentralized method with one agent: the same engine on x and y without an agents' axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.agents import topology
from bilevax.agents._gossip import Gossip, gossip
from bilevax.problem import Algorithm, Batch
from bilevax.single_loop.method import Info, State
from bilevax.typing import Key, PyTree


def one_agent(make_algorithm: Callable[[Gossip], Algorithm]) -> Algorithm:
    """Runs `make_algorithm(gossip)` for a single agent, on leaves [...] instead of [1, ...].

    Args:
      make_algorithm: any method as a function of its gossip.

    Returns:
      `Algorithm(init, step)`; x, y and v of its `State`, and all of its `Info`, are without the agents' axis.

    Raises:
      ValueError: if `make_algorithm` is no function of a gossip; as the method.

    Cost: that of the method; nothing is sent.

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> method = bx.algorithms.one_agent(lambda gossip: bx.decentralized.sldbo(problem, gossip, 0.1))
        >>> float(method.init(1.0, 2.0).x)
        1.0
    """
    checks.function("make_algorithm", make_algorithm, "gossip")
    algorithm = make_algorithm(gossip(topology.complete(1)))

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> State:
        return _without_axis(algorithm.init(_with_axis(x), _with_axis(y), _with_axis(batch)))

    def step(key: Key | None, state: State, batch: Batch) -> tuple[State, Info]:
        stacked = state._replace(x=_with_axis(state.x), y=_with_axis(state.y), v=_with_axis(state.v))
        state, info = algorithm.step(key, stacked, _with_axis(batch))
        return _without_axis(state), jax.tree.map(lambda leaf: leaf[0] if jnp.ndim(leaf) else leaf, info)

    return Algorithm(init, step)


def _with_axis(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def _without_axis(state: State) -> State:
    x, y, v = jax.tree.map(lambda leaf: leaf[0], (state.x, state.y, state.v))
    return state._replace(x=x, y=y, v=v)
