"""Where the agents of a contract are: all on one device, or on two parts of it that see each other by gossip alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bilevax import checks, parallel
from bilevax.agents import topology as graphs
from bilevax.agents._gossip import Gossip, Topologies, gossip, push_sum
from bilevax.parallel.agents import gossip_along
from bilevax.testing.trees import close
from bilevax.typing import PyTree

N, PARTS = 4, 2
LAZY_RING = graphs.lazy(graphs.ring(N))
DIRECTED = graphs.from_matrix(np.array([[0.5, 0, 0, 0.5], [0.5, 0.5, 0, 0], [0, 0.25, 0.5, 0], [0, 0.25, 0.5, 0.5]]))


def on_one_device(topology: Topologies) -> Gossip:
    """The gossip over a graph or several in turn; of directed ones push-sum."""
    return (push_sum if directed(topology) else gossip)(topology)


def of_four_agents(topology: Topologies) -> None:
    """Raises ValueError unless it is a graph of four agents, or several."""
    several: Sequence[Any] = in_turn(topology) if isinstance(topology, tuple | list) else [topology]
    for one in several:
        checks.instance("topology", one, graphs.Topology, f"Pass, say, bx.topology.ring({N}).")
        if one.n != N:
            raise ValueError(f"topology must have {N} agents; got {one!r}. Pass, say, bx.topology.ring({N}).")


def in_turn(topology: Topologies) -> list[graphs.Topology]:
    """The graphs, taken in turn."""
    return [topology] if isinstance(topology, graphs.Topology) else list(topology)


def directed(topology: Topologies) -> bool:
    """Whether the columns of a matrix alone sum to 1."""
    return any(one.directed for one in in_turn(topology))


def on_two_parts(run: Callable[..., PyTree], topology: Topologies, *trees: PyTree) -> PyTree:
    """The result of `run(gossip, *trees)`, where each part holds half of the agents and of the rows of the trees."""
    spread = gossip_along(topology, "parts", PARTS)
    program = jax.vmap(lambda *here: run(spread, *here), axis_name="parts")
    return jax.jit(lambda trees: parallel.join(program(*parallel.split(trees, PARTS))))(trees)


def equal(got: PyTree, expected: PyTree) -> None:
    """Raises AssertionError unless two trees agree to the rounding of a leaf in single precision among them."""
    close("the result", got, expected, rtol=1e-5, atol=1e-7)
