"""Weights of the edges: functions adjacency -> W."""

from collections.abc import Callable

import numpy as np
from scipy import sparse

from bilevax import checks
from bilevax.agents.topology.graph import Topology, stochastic, symmetric

Weights = Callable[[sparse.csr_array], sparse.csr_array]


def metropolis(adjacency: sparse.csr_array) -> sparse.csr_array:
    """Metropolis–Hastings weights: doubly stochastic for every undirected graph, from the neighbours' degrees alone.

        w_ij = 1 / (1 + max(deg_i, deg_j)) on edges,   w_ii = 1 − Σ_j w_ij

    Args:
      adjacency: 1 at (i, j) where i receives from j, without self loops [n, n].

    Returns:
      W [n, n].

    Raises:
      ValueError: if adjacency is not symmetric.

    Cost: O(edges).

    Reference: Xiao, Boyd and Lall, "A scheme for robust distributed sensor fusion based on average consensus", 2005.

    Example:
        >>> import bilevax as bx
        >>> bx.topology.star(3).matrix.toarray().round(3).tolist()
        [[0.333, 0.333, 0.333], [0.333, 0.667, 0.0], [0.333, 0.0, 0.667]]
    """
    degree, edge = adjacency.sum(0), adjacency.tocoo()
    weights = 1 / (1 + np.maximum(degree[edge.row], degree[edge.col]))
    return _with_self_weights(sparse.csr_array((weights, (edge.row, edge.col)), shape=adjacency.shape))


def uniform(adjacency: sparse.csr_array) -> sparse.csr_array:
    """One weight for all edges: w_ij = 1 / (1 + max degree), w_ii = 1 − Σ_j w_ij; slow where degrees differ much.

    Args:
      adjacency: 1 at (i, j) where i receives from j, without self loops [n, n].

    Returns:
      W [n, n].

    Raises:
      ValueError: if adjacency is not symmetric.

    Cost: O(edges).

    Example:
        >>> import bilevax as bx
        >>> bx.topology.path(3, weights=bx.topology.uniform).matrix.diagonal().round(3).tolist()
        [0.667, 0.333, 0.667]
    """
    return _with_self_weights(adjacency / (1.0 + adjacency.sum(0).max()))


def self_weight(value: float) -> Weights:
    """Weights of a chosen spectral gap: w_ij = (1 − value) / max degree, w_ii = 1 − Σ_j w_ij; on a ring w_ii = value.

    Args:
      value: self weight of the agents with the most neighbours, in (0, 1); 1/3 leaves the usual ring.

    Returns:
      A function adjacency -> W.

    Raises:
      ValueError: if value is outside (0, 1), or, from the function, if adjacency is not symmetric.

    Cost: O(edges).

    Example:
        >>> import bilevax as bx
        >>> bx.topology.ring(4, weights=bx.topology.self_weight(0.5)).matrix.toarray()[0].tolist()
        [0.5, 0.25, 0.0, 0.25]
    """
    if not 0 < value < 1:
        raise ValueError(f"value must be a number in (0, 1); got {value!r}. Pass, say, value=0.5.")
    return lambda adjacency: _with_self_weights(adjacency * ((1 - value) / max(1, adjacency.sum(0).max())))


def out_weights(adjacency: sparse.csr_array) -> sparse.csr_array:
    """Weights of a directed graph: each agent keeps and sends equal parts, w_ij = 1 / (1 + out-degree of j).

    Args:
      adjacency: 1 at (i, j) where i receives from j, without self loops [n, n].

    Returns:
      W [n, n], column-stochastic; doubly stochastic where the degrees all agree.

    Raises:
      ValueError: if adjacency is not square.

    Cost: O(edges).

    Example:
        >>> import bilevax as bx, networkx as nx
        >>> bx.topology.from_graph(nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])).matrix.toarray()[:, 0].round(3)
        array([0.333, 0.333, 0.333])
    """
    if adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"adjacency must be square; got shape {adjacency.shape}. Pass one row and column per agent.")
    return ((adjacency + sparse.eye_array(adjacency.shape[0])) / (1 + adjacency.sum(0))[None]).tocsr()


def _with_self_weights(weights: sparse.csr_array) -> sparse.csr_array:
    if not symmetric(weights):
        raise ValueError(
            "adjacency must be symmetric for these weights; got a directed graph. Take weights=bx.topology.out_weights."
        )
    return (weights + sparse.diags_array(1 - weights.sum(1))).tocsr()


def undirected(n: int, i: np.ndarray, j: np.ndarray, weights: Weights) -> Topology:
    """The graph of the pairs {i, j}."""
    i, j = np.ravel(i), np.ravel(j)
    return weighted(links(n, np.concatenate([i, j]), np.concatenate([j, i])), weights)


def weighted(adjacency: sparse.csr_array, weights: Weights) -> Topology:
    """The graph with these weights, checked."""
    checks.function("weights", weights, "adjacency")
    return stochastic("graph with these weights", weights(adjacency))


def links(n: int, i: np.ndarray, j: np.ndarray) -> sparse.csr_array:
    """1 at each (i, j), once, without self loops."""
    i, j = i[i != j], j[i != j]
    adjacency = sparse.csr_array((np.ones(i.size), (i, j)), shape=(n, n))
    adjacency.sum_duplicates()
    adjacency.data[:] = 1
    return adjacency
