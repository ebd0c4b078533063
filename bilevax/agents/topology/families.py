"""Graphs by their name."""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from bilevax import checks
from bilevax.agents.topology.graph import Topology, from_matrix
from bilevax.agents.topology.weights import Weights, metropolis, undirected


def ring(n: int, *, weights: Weights = metropolis) -> Topology:
    """A cycle, w = 1/3: the standard hard case. σ = 1/3 + 2/3 cos(2π/n), a gap of 13/n²; λ_min = −1/3 for even n.

    Args:
      n: number of agents, >= 1; two of them share one edge.
      weights: `metropolis`, `uniform`, `self_weight(value)`, or a function adjacency -> W.

    Returns:
      `Topology`.

    Raises:
      ValueError: if n < 1.

    Cost: O(n).

    Example:
        >>> import bilevax as bx
        >>> bx.topology.ring(4).matrix.toarray()[0].round(3).tolist()
        [0.333, 0.333, 0.0, 0.333]
    """
    agents = np.arange(checks.count("n", n, minimum=1))
    return undirected(n, agents, np.roll(agents, -1), weights)


def path(n: int, *, weights: Weights = metropolis) -> Topology:
    """A line of agents, the slowest of all: σ = 1/3 + 2/3 cos(π/n), a quarter of the ring's gap.

    Args:
      n: number of agents, >= 1.
      weights: `metropolis`, `uniform`, `self_weight(value)`, or a function adjacency -> W.

    Returns:
      `Topology`.

    Raises:
      ValueError: if n < 1.

    Cost: O(n).

    Example:
        >>> import bilevax as bx
        >>> bx.topology.edges(bx.topology.path(3)).tolist()
        [[0, 1], [1, 0], [1, 2], [2, 1]]
    """
    agents = np.arange(checks.count("n", n, minimum=1))
    return undirected(n, agents[:-1], agents[1:], weights)


def star(n: int, *, weights: Weights = metropolis) -> Topology:
    """Agent 0 in touch with all others, w = 1/n: a server and its clients. σ = 1 − 1/n, λ_min = 0.

    Args:
      n: number of agents, >= 1, the centre included.
      weights: `metropolis`, `uniform`, `self_weight(value)`, or a function adjacency -> W.

    Returns:
      `Topology`.

    Raises:
      ValueError: if n < 1.

    Cost: O(n).

    Example:
        >>> import bilevax as bx
        >>> round(bx.topology.spectral_gap(bx.topology.star(8)), 6)
        0.125
    """
    agents = np.arange(checks.count("n", n, minimum=1))
    return undirected(n, np.zeros(n - 1, int), agents[1:], weights)


def complete(n: int) -> Topology:
    """All in touch with all: W = 11ᵀ/n, σ = 0. One round is the exact mean: the centralized method.

    Args:
      n: number of agents, >= 1.

    Returns:
      `Topology`.

    Raises:
      ValueError: if n < 1.

    Cost: O(n²).

    Example:
        >>> import bilevax as bx
        >>> bx.topology.complete(2).matrix.toarray().tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    n = checks.count("n", n, minimum=1)
    return from_matrix(np.full((n, n), 1 / n))


def torus(n: int, *, rows: int | None = None, weights: Weights = metropolis) -> Topology:
    """A two-dimensional lattice that wraps around, w = 1/5. σ = (3 + 2 cos(2π/longer side))/5, a gap of about 8/n.

    A side of 2 has one edge, not two; a side of 1 leaves a ring. λ_min = −3/5 for even sides above 2 (see `lazy`).

    Args:
      n: number of agents, >= 1, row by row.
      rows: a divisor of n; None takes the sides closest to a square.
      weights: `metropolis`, `uniform`, `self_weight(value)`, or a function adjacency -> W.

    Returns:
      `Topology`.

    Raises:
      ValueError: if n < 1, or rows does not divide n.

    Cost: O(n).

    Example:
        >>> import bilevax as bx
        >>> round(bx.topology.spectral_gap(bx.topology.torus(16)), 6)
        0.4
    """
    cells = _cells(n, rows)
    return undirected(n, _joined(cells, cells), _joined(np.roll(cells, -1, 0), np.roll(cells, -1, 1)), weights)


def grid(n: int, *, rows: int | None = None, weights: Weights = metropolis) -> Topology:
    """A two-dimensional lattice with borders: agents in touch with those next to them. A gap of order 1/n.

    Args:
      n: number of agents, >= 1, row by row.
      rows: a divisor of n; None takes the sides closest to a square; 1 leaves a path.
      weights: `metropolis`, `uniform`, `self_weight(value)`, or a function adjacency -> W.

    Returns:
      `Topology`.

    Raises:
      ValueError: if n < 1, or rows does not divide n.

    Cost: O(n).

    Example:
        >>> import bilevax as bx
        >>> bx.topology.edges(bx.topology.grid(6, rows=2))[:3].tolist()
        [[0, 1], [0, 3], [1, 0]]
    """
    cells = _cells(n, rows)
    return undirected(n, _joined(cells[:-1], cells[:, :-1]), _joined(cells[1:], cells[:, 1:]), weights)


def hypercube(n: int, *, weights: Weights = metropolis) -> Topology:
    """Agents whose binary numbers differ in one bit. σ = (m − 1)/(m + 1) for n = 2ᵐ; λ_min = −σ.

    Args:
      n: number of agents, a power of two.
      weights: `metropolis`, `uniform`, `self_weight(value)`, or a function adjacency -> W.

    Returns:
      `Topology`.

    Raises:
      ValueError: if n is not a power of two.

    Cost: O(n log n).

    Example:
        >>> import bilevax as bx
        >>> round(bx.topology.spectral_gap(bx.topology.hypercube(8)), 6)
        0.5
    """
    n = checks.count("n", n, minimum=1)
    if n & (n - 1):
        low, high = 1 << (n.bit_length() - 1), 1 << n.bit_length()
        raise ValueError(f"n must be a power of two for a hypercube; got {n}. Pass n={low} or n={high}.")
    agents = np.arange(n)
    bits = 1 << np.arange(n.bit_length() - 1)[:, None]
    return undirected(n, np.broadcast_to(agents, (len(bits), n)), agents ^ bits, weights)


def exponential(n: int) -> Topology:
    """The static exponential graph: i hears itself and i + 1, i + 2, i + 4, ... with equal weights. A wide gap.

    Doubly stochastic, but not symmetric: gradient tracking takes it, exact diffusion and EXTRA do not.
    σ = 1 − 2/(1 + ⌈log₂ n⌉) for even n, and less for odd n.

    Args:
      n: number of agents, >= 1.

    Returns:
      `Topology` with 1 + ⌈log₂ n⌉ weights in each row.

    Raises:
      ValueError: if n < 1.

    Cost: O(n log n).

    Reference: Ying et al., "Exponential graph is provably efficient for decentralized deep training", arXiv 2110.13363.

    Example:
        >>> import bilevax as bx
        >>> bx.topology.exponential(8).matrix.toarray()[0].tolist()
        [0.25, 0.25, 0.25, 0.0, 0.25, 0.0, 0.0, 0.0]
    """
    n = checks.count("n", n, minimum=1)
    return _circulant(n, [0, *(1 << k for k in range((n - 1).bit_length()))])


def one_peer_exponential(n: int) -> tuple[Topology, ...]:
    """One neighbour per round: half of itself and half of i + 2ᵏ in round k = 0, ..., ⌈log₂ n⌉ − 1.

    The cheapest round there is. For n = 2ᵐ the product of one period is exactly 11ᵀ/n, although each graph but the
    first is disconnected (σ = 1).

    Args:
      n: number of agents, >= 1.

    Returns:
      A tuple of ⌈log₂ n⌉ graphs (one for n = 1).

    Raises:
      ValueError: if n < 1.

    Cost: O(n log n).

    Reference: Ying et al., "Exponential graph is provably efficient for decentralized deep training", arXiv 2110.13363.

    Example:
        >>> import bilevax as bx
        >>> round(bx.topology.spectral_gap(bx.topology.one_peer_exponential(8)), 6)
        1.0
    """
    n = checks.count("n", n, minimum=1)
    return tuple(_circulant(n, [0, 1 << k]) for k in range(max(1, (n - 1).bit_length())))


def _circulant(n: int, hops: Sequence[int]) -> Topology:
    """Equal weights for these hops: (W s)_i = Σ_h s_{(i+h) mod n} / |hops|."""
    rows = np.repeat(np.arange(n), len(hops))
    weights = np.full(rows.size, 1 / len(hops))
    matrix = sparse.csr_array((weights, (rows, (rows + np.tile(hops, n)) % n)), shape=(n, n))
    matrix.sum_duplicates()
    return Topology(matrix)


def _cells(n: int, rows: int | None) -> np.ndarray:
    n = checks.count("n", n, minimum=1)
    divisors = [side for side in range(1, n + 1) if n % side == 0]
    rows = max(side for side in divisors if side**2 <= n) if rows is None else rows
    if rows not in divisors:
        raise ValueError(f"rows must divide n={n}; got {rows!r}. Pass one of {divisors}.")
    return np.arange(n).reshape(rows, -1)


def _joined(*blocks: np.ndarray) -> np.ndarray:
    return np.concatenate([block.ravel() for block in blocks])
