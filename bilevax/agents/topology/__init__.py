"""Communication graphs of n agents: w_ij is the weight that agent i gives to what it receives from agent j.

A graph is a mixing matrix W >= 0 with w_ij > 0 on edges and the diagonal alone. Its rows and columns sum to 1, so that
averaging with the neighbours keeps the mean of all agents; over a directed graph the columns alone may, which push-sum
corrects. With σ = ‖W − 11ᵀ/n‖₂ the disagreement shrinks by σ in each round; the spectral gap is 1 − σ.
"""

from bilevax.agents.topology.families import (
    complete,
    exponential,
    grid,
    hypercube,
    one_peer_exponential,
    path,
    ring,
    star,
    torus,
)
from bilevax.agents.topology.graph import Topology, check, edges, from_matrix, is_circulant, is_symmetric, lazy
from bilevax.agents.topology.networks import erdos_renyi, from_graph, random_regular
from bilevax.agents.topology.spectrum import eigenvalues, smallest_eigenvalue, spectral_gap
from bilevax.agents.topology.weights import metropolis, out_weights, self_weight, uniform

__all__ = [
    "Topology",
    "check",
    "complete",
    "edges",
    "eigenvalues",
    "erdos_renyi",
    "exponential",
    "from_graph",
    "from_matrix",
    "grid",
    "hypercube",
    "is_circulant",
    "is_symmetric",
    "lazy",
    "metropolis",
    "one_peer_exponential",
    "out_weights",
    "path",
    "random_regular",
    "ring",
    "self_weight",
    "smallest_eigenvalue",
    "spectral_gap",
    "star",
    "torus",
    "uniform",
]


def __dir__() -> list[str]:
    return __all__
