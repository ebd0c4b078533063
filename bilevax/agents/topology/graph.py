"""The graph itself, and what is refused."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from bilevax import checks

TOLERANCE = 1e-6  # of the sums of rows and columns


class Topology(NamedTuple):
    """A communication graph. A graph that changes from round to round is a tuple of them, taken in turn.

    Attributes:
      matrix: W [n, n], float64 with sorted indices, self weights included.
      directed: True where the columns alone sum to 1, which only `push_sum` corrects.

    Example:
        >>> import bilevax as bx
        >>> bx.topology.ring(8)
        Topology(n=8, edges=16, directed=False)
    """

    matrix: sparse.csr_array
    directed: bool = False

    @property
    def n(self) -> int:
        """Number of agents."""
        return self.matrix.shape[0]

    @property
    def text(self) -> str:
        """What `print` shows."""
        return repr(self)

    def __repr__(self) -> str:
        return f"Topology(n={self.n}, edges={len(edges(self))}, directed={self.directed})"


Topologies = Topology | Sequence[Topology]


def from_matrix(matrix: Any) -> Topology:
    """Any matrix W of your own: entry (i, j) is the weight that agent i gives to what it receives from agent j.

    It is taken as it is. Gradient tracking inherits what its sums are off: with 1e-6, errors of that order stay.

    Args:
      matrix: [n, n], an array or a scipy.sparse array, nonnegative; rows and columns sum to 1 within 1e-6, or, for a
        directed graph, the columns do.

    Returns:
      `Topology`; `directed` is True where the columns alone sum to 1.

    Raises:
      ValueError: if matrix is not as above, or its graph is not (strongly) connected.

    Cost: O(nonzeros).

    Example:
        >>> import bilevax as bx
        >>> bx.topology.from_matrix([[0.5, 0.2], [0.5, 0.8]])
        Topology(n=2, edges=2, directed=True)
    """
    return stochastic("matrix", matrix)


def lazy(topology: Topologies) -> Any:
    """The lazy graph (I + W)/2: half as fast, but λ_min >= 0 where W is symmetric.

    Exact diffusion and EXTRA need λ_min(W) > −1/3, and a ring of an even number of agents has exactly −1/3.

    Args:
      topology: a `Topology`, or a sequence of them.

    Returns:
      A `Topology`, or a tuple of them.

    Raises:
      ValueError: if topology is neither.

    Cost: O(edges).

    Example:
        >>> import bilevax as bx
        >>> round(bx.topology.smallest_eigenvalue(bx.topology.lazy(bx.topology.ring(8))), 6)
        0.333333
    """
    halves = [
        one._replace(matrix=((one.matrix + sparse.eye_array(one.n)) / 2).tocsr()) for one in period(topology).values()
    ]
    return halves[0] if isinstance(topology, Topology) else tuple(halves)


def edges(topology: Topology) -> np.ndarray:
    """The directed pairs (i, j), i ≠ j, where w_ij > 0: i receives from j.

    Args:
      topology: a `Topology`.

    Returns:
      int64 [edges, 2], in the order of i; an undirected edge counts twice.

    Raises:
      ValueError: if topology is a sequence.

    Cost: O(edges).

    Example:
        >>> import bilevax as bx
        >>> bx.topology.edges(bx.topology.star(3)).tolist()
        [[0, 1], [0, 2], [1, 0], [2, 0]]
    """
    checks.instance("topology", topology, Topology, "Take one graph of the sequence.")
    entry = topology.matrix.tocoo()
    chosen = (entry.row != entry.col) & (entry.data > 0)
    return np.stack([entry.row[chosen], entry.col[chosen]], axis=1).astype(np.int64)


def is_symmetric(topology: Topologies) -> bool:
    """Whether W = Wᵀ (of a sequence: each W), as exact diffusion and EXTRA need it.

    Args:
      topology: a `Topology`, or a sequence of them.

    Returns:
      True or False.

    Raises:
      ValueError: if topology is neither.

    Cost: O(edges).

    Example:
        >>> import bilevax as bx
        >>> bx.topology.is_symmetric(bx.topology.ring(8)), bx.topology.is_symmetric(bx.topology.exponential(8))
        (True, False)
    """
    return all(symmetric(one.matrix) for one in period(topology).values())


def is_circulant(topology: Topologies) -> bool:
    """Whether every agent has the same weights by hop, w_{i, (i+h) mod n} = w_h (of a sequence: in each graph).

    Args:
      topology: a `Topology`, or a sequence of them.

    Returns:
      True or False.

    Raises:
      ValueError: if topology is neither.

    Cost: O(edges log edges).

    Example:
        >>> import bilevax as bx
        >>> bx.topology.is_circulant(bx.topology.ring(8)), bx.topology.is_circulant(bx.topology.path(8))
        (True, False)
    """
    return all(_circular(one.matrix) for one in period(topology).values())


def check(topology: Topologies) -> None:
    """Raises ValueError unless gossip over this graph, or sequence of graphs, reaches the mean of all agents.

    Each W is square, finite and nonnegative with columns, and unless it is `directed` rows, that sum to 1 within 1e-6.
    One graph must be connected; of a sequence the union over one period must be, so that each graph alone need not.
    Directed graphs must be strongly connected, with positive self weights. Where a self weight is 0, gossip must still
    contract: a permutation, say, is connected, but averages nothing.

    Args:
      topology: a `Topology`, or a sequence of them.

    Raises:
      ValueError: if it does not; the message names the row, the entry or the components.

    Cost: O(edges); for a sequence with a self weight of 0, a sparse product of one period.

    Example:
        >>> import bilevax as bx
        >>> bx.topology.check(bx.topology.one_peer_exponential(8))
    """
    rounds = period(topology)
    for name, one in rounds.items():
        _check_matrix(name, one)
    _check_connected(rounds)


def stochastic(name: str, matrix: Any) -> Topology:
    """The graph of a matrix, checked under the name that it has in messages."""
    shape = np.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"{name} must be square, [n, n] with n >= 1; got shape {shape}. Pass one row per agent.")
    given = matrix if sparse.issparse(matrix) else np.asarray(matrix)
    if given.dtype.kind not in "fiu":
        raise ValueError(f"{name} must hold real numbers; got dtype {given.dtype}. Cast it with .astype(float).")
    w = sparse.csr_array(given, dtype=np.float64, copy=True)
    w.sum_duplicates()
    w.eliminate_zeros()
    w.sort_indices()
    directed = bool(_first_off(w.sum(1)) and not _first_off(w.sum(0)))
    topology = Topology(w, directed)
    _check_matrix(name, topology)
    _check_connected({name: topology})
    return topology


def period(topology: Topologies) -> dict[str, Topology]:
    """The graphs of one period by their names in error messages."""
    sequence = [topology] if isinstance(topology, Topology) else topology
    known = isinstance(sequence, list | tuple) and all(isinstance(one, Topology) for one in sequence)
    if not known or not sequence:
        what = "an empty sequence" if known else type(topology).__name__
        raise ValueError(
            f"topology must be a Topology, or a list or tuple of them; got {what}. Pass bx.topology.ring(8), or "
            f"bx.topology.from_matrix(W) for a matrix of your own."
        )
    if len(sizes := sorted({one.n for one in sequence})) > 1:
        raise ValueError(f"topology must have one number of agents in all rounds; got {sizes}. Give all the same n.")
    name = "topology" if isinstance(topology, Topology) else "topology[{}]"
    return {name.format(k): one for k, one in enumerate(sequence)}


def _check_matrix(name: str, topology: Topology) -> None:
    matrix = topology.matrix
    checks.instance(f"{name}.matrix", matrix, sparse.csr_array, "Take bx.topology.from_matrix(W) to make a Topology.")
    entry = matrix.tocoo()
    for bad, expected in ((~np.isfinite(entry.data), "finite"), (entry.data < 0, "nonnegative")):
        if bad.any():
            row, column, weight = (values[bad][0] for values in (entry.row, entry.col, entry.data))
            raise ValueError(
                f"{name} must have {expected} weights; got {weight} in row {row}, column {column}. Correct it, or "
                f"take bx.topology.from_graph(graph) with Metropolis weights."
            )
    rows, columns = _first_off(matrix.sum(1)), _first_off(matrix.sum(0))
    if columns and not rows:
        fix = "Take Metropolis weights (bx.topology.from_graph), or bx.agents.push_sum with its transpose."
        raise ValueError(f"{name} must have columns that sum to 1, not its rows alone; got column {columns}. {fix}")
    if columns:
        fix = "Take bx.topology.from_graph(graph), whose Metropolis weights are always doubly stochastic."
        raise ValueError(f"{name} must have rows and columns that sum to 1; got row {rows}, column {columns}. {fix}")
    if rows and not topology.directed:
        fix = "Mark it directed=True, as bx.topology.from_matrix does, and take bx.agents.push_sum."
        raise ValueError(f"{name} must have rows that sum to 1, not its columns alone; got row {rows}. {fix}")


def _first_off(sums: np.ndarray) -> str:
    off = np.flatnonzero(np.abs(sums - 1) > TOLERANCE)
    return f"{off[0]} with sum {sums[off[0]]:.7g}" if off.size else ""


def _check_connected(rounds: dict[str, Topology]) -> None:
    matrices = [one.matrix for one in rounds.values()]
    name = "topology" if len(rounds) > 1 else next(iter(rounds))
    directed = any(one.directed for one in rounds.values())
    number, label = connected_components(sum(matrices[1:], matrices[0]), connection="strong")
    if number > 1:
        what = ("strongly " if directed else "") + "connected" + " over one period" * (len(rounds) > 1)
        parts = "; ".join(_shortened(np.flatnonzero(label == k)) for k in range(min(number, 4)))
        more = "; ..." if number > 4 else ""
        raise ValueError(
            f"{name} must be {what}; got {number} components of agents: {parts}{more}. Add edges between them."
        )
    idle = np.flatnonzero(np.min([matrix.diagonal() for matrix in matrices], axis=0) == 0)
    if idle.size and directed:
        raise ValueError(
            f"{name} must have positive self weights where it is directed; got 0 at agent {idle[0]}. Take "
            f"bx.topology.lazy(topology)."
        )
    if idle.size:
        product = reduce(lambda past, matrix: matrix @ past, matrices)
        if connected_components(product.T @ product)[0] > 1:
            raise ValueError(
                f"{name} must contract (σ < 1); got σ = 1 with a self weight of 0 at agent {idle[0]}. Take "
                f"bx.topology.lazy(topology)."
            )


def _shortened(agents: np.ndarray) -> str:
    shown = ", ".join(map(str, agents[:8]))
    return f"[{shown}]" if agents.size <= 8 else f"[{shown}, ...] ({agents.size} agents)"


def symmetric(matrix: sparse.csr_array) -> bool:
    """Whether a matrix equals its transpose up to rounding."""
    return matrix.shape[0] == matrix.shape[1] and np.abs((matrix - matrix.T).data).max(initial=0.0) <= 1e-14


def _circular(matrix: sparse.csr_array) -> bool:
    n, (degree, rest) = matrix.shape[0], divmod(matrix.nnz, matrix.shape[0])
    if rest or (np.diff(matrix.indptr) != degree).any():
        return False
    rows = np.repeat(np.arange(n), degree)
    hops = (matrix.indices.astype(np.int64) - rows) % n
    order = np.lexsort((hops, rows))
    hops, weights = hops[order].reshape(n, degree), matrix.data[order].reshape(n, degree)
    return bool((hops == hops[0]).all() and np.allclose(weights, weights[0], rtol=1e-14, atol=0))
