"""Graphs of networkx: random ones, and any of your own."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from bilevax import checks
from bilevax.agents.topology.graph import Topology
from bilevax.agents.topology.weights import Weights, links, metropolis, out_weights, undirected, weighted

TRIES = 100  # random graphs drawn until one is connected


def erdos_renyi(n: int, *, probability: float, seed: int, weights: Weights = metropolis) -> Topology:
    """A random graph with each edge drawn by itself, drawn anew until it is connected.

    Args:
      n: number of agents, >= 1.
      probability: that of each edge, in (0, 1]; 2 ln(n)/n is connected with probability near 1 − 1/n.
      seed: a whole number; the same seed draws the same graph.
      weights: `metropolis`, `uniform`, `self_weight(value)`, or a function adjacency -> W.

    Returns:
      `Topology`.

    Raises:
      ValueError: if an argument is out of range, or 100 graphs in a row are not connected.
      ModuleNotFoundError: if networkx is not installed.

    Cost: O(n + edges) for each graph that is drawn.

    Example:
        >>> import bilevax as bx
        >>> bx.topology.erdos_renyi(10, probability=0.5, seed=0).n
        10
    """
    n = checks.count("n", n, minimum=1)
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be a number in (0, 1]; got {probability!r}. Pass, say, probability=0.5.")
    likely = min(1.0, np.ceil(200 * np.log(n) / n) / 100)
    wanted = f"probability must make a graph of n={n} agents connected; got {probability!r}"
    fix = f"Pass probability={likely:.2f} or more."
    draw = _networkx().fast_gnp_random_graph
    return from_graph(_connected(lambda source: draw(n, probability, seed=source), seed, wanted, fix), weights=weights)


def random_regular(n: int, *, degree: int, seed: int, weights: Weights = metropolis) -> Topology:
    """A random graph with `degree` neighbours for each agent: an expander, whose gap does not shrink with n.

    Args:
      n: number of agents, > degree.
      degree: neighbours of each, >= 1; n · degree is even.
      seed: a whole number; the same seed draws the same graph.
      weights: `metropolis`, `uniform`, `self_weight(value)`, or a function adjacency -> W.

    Returns:
      `Topology`.

    Raises:
      ValueError: if an argument is out of range, or 100 graphs in a row are not connected.
      ModuleNotFoundError: if networkx is not installed.

    Cost: O(n · degree²) for each graph that is drawn.

    Example:
        >>> import bilevax as bx
        >>> bx.topology.random_regular(10, degree=3, seed=0)
        Topology(n=10, edges=30, directed=False)
    """
    n, degree = checks.count("n", n, minimum=2), checks.count("degree", degree, minimum=1)
    if degree >= n or n * degree % 2:
        raise ValueError(f"degree must be below n={n}, and n · degree even; got {degree}. Pass another degree or n.")
    wanted, fix = f"degree must make a graph of n={n} agents connected; got {degree}", "Pass degree=3 or more."
    draw = _networkx().random_regular_graph
    return from_graph(_connected(lambda source: draw(degree, n, seed=source), seed, wanted, fix), weights=weights)


def from_graph(graph: Any, *, weights: Weights | None = None) -> Topology:
    """Any graph of networkx; agent i is its i-th node. Its own self loops and edge weights are left out.

    Args:
      graph: a `networkx.Graph`, or a `DiGraph` where an edge (u, v) says that u sends to v.
      weights: a function adjacency -> W; None takes `metropolis`, and `out_weights` where the graph is directed.

    Returns:
      `Topology`; `directed` is True where the columns of W alone sum to 1.

    Raises:
      ValueError: if graph is not one of networkx, has no nodes, or is not (strongly) connected.

    Cost: O(nodes + edges).

    Example:
        >>> import bilevax as bx, networkx as nx
        >>> bx.topology.from_graph(nx.petersen_graph())
        Topology(n=10, edges=30, directed=False)
    """
    if not hasattr(graph, "is_directed"):
        raise ValueError(
            f"graph must be a networkx graph; got {type(graph).__name__}. Take bx.topology.from_matrix for a matrix."
        )
    if not (index := {node: i for i, node in enumerate(graph)}):
        raise ValueError("graph must have at least one node; got an empty graph. Give it one node per agent.")
    receivers, senders = np.array([(index[v], index[u]) for u, v in graph.edges()], int).reshape(-1, 2).T
    if graph.is_directed():
        return weighted(links(len(index), receivers, senders), weights or out_weights)
    return undirected(len(index), receivers, senders, weights or metropolis)


def _networkx() -> Any:
    try:
        import networkx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Random graphs need networkx. Run: pip install networkx") from error
    return networkx


def _connected(draw: Callable[[random.Random], Any], seed: int, wanted: str, fix: str) -> Any:
    """The first connected graph of `draw`."""
    source = random.Random(checks.count("seed", seed))
    for _ in range(TRIES):
        if _networkx().is_connected(graph := draw(source)):
            return graph
    raise ValueError(f"{wanted}, and {TRIES} graphs drawn from seed={seed} were not. {fix}")
