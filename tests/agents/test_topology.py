"""Graphs of agents: their numbers first, then what is refused."""

import sys

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from bilevax.agents import topology as tp

FAMILIES = (tp.ring, tp.path, tp.star, tp.torus, tp.grid, tp.exponential, tp.hypercube)
SIGMA = {  # ‖W − 11ᵀ/n‖₂ in the order of FAMILIES
    4: (0.3333, 0.8047, 0.7500, 0.3333, 0.3333, 0.3333, 0.3333),
    8: (0.8047, 0.9493, 0.8750, 0.5000, 0.8536, 0.5000, 0.5000),
    10: (0.8727, 0.9674, 0.9000, 0.6545, 0.9045, 0.6000),
    16: (0.9493, 0.9872, 0.9375, 0.6000, 0.8686, 0.6000, 0.6000),
    20: (0.9674, 0.9918, 0.9500, 0.7236, 0.9143, 0.6667),
    32: (0.9872, 0.9968, 0.9688, 0.8828, 0.9658, 0.6667, 0.6667),
    64: (0.9968, 0.9992, 0.9844, 0.8828, 0.9677, 0.7143, 0.7143),
}
LAMBDA_MIN = {
    4: (-0.333, -0.138, 0, -0.333, -0.333, 0, -0.333),
    8: (-0.333, -0.283, 0, -0.500, -0.384, -0.177, -0.500),
    10: (-0.333, -0.301, 0, -0.405, -0.421, -0.124),
    16: (-0.333, -0.321, 0, -0.600, -0.431, -0.218, -0.600),
    20: (-0.333, -0.325, 0, -0.524, -0.460, -0.201),
    32: (-0.333, -0.330, 0, -0.600, -0.496, -0.274, -0.667),
    64: (-0.333, -0.333, 0, -0.600, -0.551, -0.302, -0.714),
}
TABLE = [
    pytest.param(family, n, SIGMA[n][k], LAMBDA_MIN[n][k], id=f"{family.__name__}-{n}")
    for n in SIGMA
    for k, family in enumerate(FAMILIES[: len(SIGMA[n])])
]


def assert_doubly_stochastic(topology):
    matrix = topology.matrix
    assert isinstance(matrix, sparse.csr_array)
    assert matrix.dtype == np.float64
    assert matrix.has_sorted_indices
    assert matrix.has_canonical_format
    assert not topology.directed
    assert (matrix.data > 0).all()
    np.testing.assert_allclose(matrix.sum(0), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=0, atol=1e-12)
    tp.check(topology)


def norm(topology):
    """‖W − 11ᵀ/n‖₂, written out."""
    return np.linalg.svd(topology.matrix.toarray() - 1 / topology.n, compute_uv=False)[0]


@pytest.mark.parametrize(("family", "n", "sigma", "smallest"), TABLE)
def test_table(family, n, sigma, smallest):
    topology = family(n)
    assert_doubly_stochastic(topology)
    assert topology.n == n
    assert 1 - tp.spectral_gap(topology) == pytest.approx(sigma, abs=5.1e-5)
    assert 1 - tp.spectral_gap(topology) == pytest.approx(norm(topology), abs=1e-12)
    assert tp.smallest_eigenvalue(topology) == pytest.approx(smallest, abs=5.1e-4)
    assert tp.is_symmetric(topology) == (family is not tp.exponential)


def test_closed_forms():
    for n in (4, 5, 9, 16, 20):
        assert tp.spectral_gap(tp.ring(n)) == pytest.approx(2 / 3 * (1 - np.cos(2 * np.pi / n)), abs=1e-12)
        assert tp.spectral_gap(tp.path(n)) == pytest.approx(2 / 3 * (1 - np.cos(np.pi / n)), abs=1e-12)
        assert tp.spectral_gap(tp.star(n)) == pytest.approx(1 / n, abs=1e-12)
        assert tp.spectral_gap(tp.complete(n)) == pytest.approx(1, abs=1e-12)
    for rows, columns in ((3, 3), (3, 5), (4, 6)):
        gap = 2 / 5 * (1 - np.cos(2 * np.pi / max(rows, columns)))
        assert tp.spectral_gap(tp.torus(rows * columns, rows=rows)) == pytest.approx(gap, abs=1e-12)
    for n in range(2, 40, 2):
        assert tp.spectral_gap(tp.exponential(n)) == pytest.approx(2 / (1 + np.ceil(np.log2(n))), abs=1e-12)
        assert tp.spectral_gap(tp.exponential(n + 1)) > 2 / (1 + np.ceil(np.log2(n + 1))) - 1e-12


@pytest.mark.parametrize("family", [tp.ring, tp.path, tp.star, tp.complete, tp.torus, tp.grid, tp.exponential])
def test_small_ones(family):
    assert family(1).matrix.toarray().tolist() == [[1.0]]
    assert family(2).matrix.toarray().tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert tp.edges(family(2)).tolist() == [[0, 1], [1, 0]]
    assert tp.spectral_gap(family(1)) == 1
    for n in (3, 5, 6, 7):
        assert_doubly_stochastic(family(n))


def test_neighbours():
    third, fifth = 1 / 3, 1 / 5
    np.testing.assert_allclose(tp.ring(5).matrix.toarray()[0], [third, third, 0, 0, third])
    np.testing.assert_allclose(
        tp.exponential(5).matrix.toarray()[1], [0, 0.25, 0.25, 0.25, 0][:5] + np.eye(5)[0] * 0.25
    )
    assert [np.flatnonzero(one.matrix.toarray()[6]).tolist() for one in tp.one_peer_exponential(8)] == [
        [6, 7],
        [0, 6],
        [2, 6],
    ]
    torus = tp.torus(12)  # 3 × 4
    assert tp.edges(torus)[:4].tolist() == [[0, 1], [0, 3], [0, 4], [0, 8]]
    np.testing.assert_allclose(torus.matrix.data, fifth)
    assert tp.edges(torus).dtype == np.int64
    assert len(tp.edges(tp.torus(8))) == 24  # 2 × 4: the short side has one edge, not two
    assert len(tp.edges(tp.grid(12))) == 2 * 17
    assert [j for i, j in tp.edges(tp.hypercube(8)).tolist() if i == 5] == [1, 4, 7]
    np.testing.assert_array_equal(tp.grid(7).matrix.toarray(), tp.path(7).matrix.toarray())
    np.testing.assert_array_equal(tp.torus(7).matrix.toarray(), tp.ring(7).matrix.toarray())
    assert repr(tp.ring(8)) == "Topology(n=8, edges=16, directed=False)"


@pytest.mark.parametrize("n", [8, 16, 32])
def test_one_peer_is_exact_for_powers_of_two(n):
    sequence = tp.one_peer_exponential(n)
    assert len(sequence) == np.log2(n)
    product = np.linalg.multi_dot([one.matrix.toarray() for one in sequence])
    np.testing.assert_array_equal(product, np.full((n, n), 1 / n))
    assert tp.spectral_gap(sequence) == pytest.approx(1, abs=1e-12)
    assert norm(sequence[0]) == pytest.approx(np.cos(np.pi / n), abs=1e-12)
    for one in sequence:
        np.testing.assert_array_equal(one.matrix.sum(0), 1)
    for one in sequence[1:]:
        assert norm(one) == pytest.approx(1, abs=1e-12)
        with pytest.raises(ValueError, match=r"topology must be connected; got \d+ components of agents"):
            tp.check(one)
    tp.check(sequence)
    tp.check(list(sequence))


def test_one_peer_otherwise():
    sequence = tp.one_peer_exponential(10)
    product = np.linalg.multi_dot([one.matrix.toarray() for one in sequence])
    assert np.abs(product - 0.1).max() == pytest.approx(0.0375, abs=1e-12)
    assert 1 - tp.spectral_gap(sequence) == pytest.approx(np.linalg.norm(product - 0.1, 2), abs=1e-12)
    tp.check(sequence)
    assert tp.one_peer_exponential(1)[0].matrix.toarray().tolist() == [[1.0]]
    assert [one.n for one in tp.one_peer_exponential(2)] == [2]


@pytest.mark.parametrize("topology", [tp.ring(12), tp.ring(7), tp.exponential(11), tp.complete(6)], ids=repr)
def test_fourier_is_the_dense_spectrum(topology):
    assert tp.is_circulant(topology)
    values, dense = tp.eigenvalues(topology), np.linalg.eigvals(topology.matrix.toarray())
    assert np.iscomplexobj(values) == (not tp.is_symmetric(topology))
    assert (np.diff(values.real) <= 1e-12).all()
    np.testing.assert_allclose(values[0], 1, atol=1e-12)
    distance = np.abs(values[:, None] - dense[None])
    assert (
        max(distance.min(0).max(), distance.min(1).max()) < 1e-7
    )  # eigenvalues of multiplicity > 1 of a general matrix
    np.testing.assert_allclose([values.sum(), (values**2).sum()], [dense.sum(), (dense**2).sum()], atol=1e-12)


def test_irregular_spectrum():
    for topology in (tp.path(9), tp.star(9), tp.grid(12)):
        assert not tp.is_circulant(topology)
        expected = np.linalg.eigvalsh(topology.matrix.toarray())[::-1]
        np.testing.assert_allclose(tp.eigenvalues(topology), expected, atol=1e-12)
    sequence = (tp.path(6), tp.exponential(6), tp.star(6))
    product = sequence[2].matrix.toarray() @ sequence[1].matrix.toarray() @ sequence[0].matrix.toarray()
    assert 1 - tp.spectral_gap(sequence) == pytest.approx(np.linalg.norm(product - 1 / 6, 2), abs=1e-12)
    assert tp.smallest_eigenvalue(sequence) == pytest.approx(np.linalg.eigvals(product).real.min(), abs=1e-12)
    assert (tp.is_circulant(sequence), tp.is_symmetric(sequence)) == (False, False)
    assert tp.is_circulant(tp.one_peer_exponential(6))


def test_lazy():
    for topology in (tp.ring(8), tp.torus(16), tp.star(9), tp.exponential(8)):
        half = tp.lazy(topology)
        assert_doubly_stochastic(half)
        np.testing.assert_allclose(half.matrix.toarray(), (np.eye(topology.n) + topology.matrix.toarray()) / 2)
        np.testing.assert_allclose(tp.eigenvalues(half), (1 + tp.eigenvalues(topology)) / 2, atol=1e-7)
    assert tp.spectral_gap(tp.lazy(tp.ring(8))) == pytest.approx((1 - np.cos(np.pi / 4)) / 3, abs=1e-12)
    assert tp.smallest_eigenvalue(tp.lazy(tp.ring(8))) == pytest.approx(1 / 3, abs=1e-12)
    halves = tp.lazy(tp.one_peer_exponential(8))
    assert isinstance(halves, tuple)
    assert [one.matrix[0, 0] for one in halves] == [0.75] * 3


def test_a_large_ring_needs_no_dense_matrix(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a dense computation")

    for name in ("eig", "eigh", "eigvals", "eigvalsh", "svd", "norm"):
        monkeypatch.setattr(np.linalg, name, refuse)
    monkeypatch.setattr(sparse.csr_array, "toarray", _small_only(sparse.csr_array.toarray))
    n = 4096
    ring = tp.ring(n)
    assert ring.matrix.nnz == 3 * n
    assert len(tp.edges(ring)) == 2 * n
    tp.check(ring)
    assert tp.spectral_gap(ring) == pytest.approx(2 / 3 * (1 - np.cos(2 * np.pi / n)), rel=1e-8)
    assert tp.smallest_eigenvalue(ring) == pytest.approx(-1 / 3, abs=1e-12)
    assert tp.eigenvalues(ring).shape == (n,)
    sequence = tp.one_peer_exponential(n)
    tp.check(sequence)
    assert tp.spectral_gap(sequence) == pytest.approx(1, abs=1e-12)


def _small_only(toarray):
    def guarded(self, *args, **kwargs):
        assert min(self.shape) <= 1, "a dense W"
        return toarray(self, *args, **kwargs)

    return guarded


def test_ends_of_the_spectrum_of_large_irregular_graphs(monkeypatch):
    monkeypatch.setattr(sys.modules[tp.eigenvalues.__module__], "DENSE", 10)
    sequence = (tp.path(30), tp.exponential(30))
    asymmetric = tp.from_matrix(sequence[1].matrix @ sequence[0].matrix)
    assert not tp.is_symmetric(asymmetric)
    for topology in (tp.path(40), tp.star(30), tp.torus(36), tp.hypercube(32), tp.lazy(tp.grid(30)), asymmetric):
        dense = np.linalg.eigvals(topology.matrix.toarray()).real
        assert tp.spectral_gap(topology) == pytest.approx(1 - norm(topology), abs=1e-8)
        assert tp.smallest_eigenvalue(topology) == pytest.approx(dense.min(), abs=1e-8)
    assert tp.spectral_gap(sequence) == pytest.approx(1 - norm(asymmetric), abs=1e-8)
    with pytest.raises(ValueError, match=r"at most 10 agents .* got n=40\. Take bx\.topology\.spectral_gap"):
        tp.eigenvalues(tp.path(40))


def test_large_irregular_graphs():
    assert tp.spectral_gap(tp.path(2100)) == pytest.approx(2 / 3 * (1 - np.cos(np.pi / 2100)), rel=1e-6)
    assert tp.spectral_gap(tp.hypercube(4096)) == pytest.approx(2 / 13, abs=1e-10)
    assert tp.smallest_eigenvalue(tp.hypercube(4096)) == pytest.approx(-11 / 13, abs=1e-10)


def test_weights():
    star = tp.star(4, weights=tp.uniform).matrix.toarray()
    np.testing.assert_allclose(star[0], [0.25] * 4)
    np.testing.assert_allclose(star[1], [0.25, 0.75, 0, 0])
    path = tp.path(3, weights=tp.metropolis).matrix.toarray()
    np.testing.assert_allclose(path, [[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]])
    ring = tp.ring(6, weights=tp.self_weight(0.8))
    assert_doubly_stochastic(ring)
    np.testing.assert_allclose(ring.matrix.diagonal(), 0.8)
    assert tp.spectral_gap(ring) == pytest.approx(0.2 * (1 - np.cos(np.pi / 3)), abs=1e-12)
    assert_doubly_stochastic(tp.star(6, weights=tp.self_weight(0.1)))
    assert tp.ring(1, weights=tp.self_weight(0.5)).matrix.toarray().tolist() == [[1.0]]
    own = tp.ring(5, weights=lambda adjacency: (adjacency.toarray() + 2 * np.eye(5)) / 4)
    assert own.matrix.toarray()[0].tolist() == [0.5, 0.25, 0, 0, 0.25]
    np.testing.assert_allclose(tp.ring(4, weights=tp.out_weights).matrix.toarray(), tp.ring(4).matrix.toarray())


def test_random_graphs():
    first, again, other = (tp.erdos_renyi(20, probability=0.2, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.matrix.toarray(), again.matrix.toarray())
    assert (first.matrix != other.matrix).nnz
    assert_doubly_stochastic(first)
    assert tp.erdos_renyi(1, probability=0.1, seed=0).n == 1
    np.testing.assert_allclose(tp.erdos_renyi(5, probability=1.0, seed=0).matrix.toarray(), 0.2)
    regular = tp.random_regular(20, degree=4, seed=3)
    assert_doubly_stochastic(regular)
    assert np.bincount(tp.edges(regular)[:, 0]).tolist() == [4] * 20
    np.testing.assert_array_equal(regular.matrix.toarray(), tp.random_regular(20, degree=4, seed=3).matrix.toarray())
    np.testing.assert_allclose(regular.matrix.data, 0.2)


@st.composite
def connected_graphs(draw):
    """A random tree with random edges on top."""
    n = draw(st.integers(2, 12))
    graph = nx.Graph((i, draw(st.integers(0, i - 1))) for i in range(1, n))
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))
    graph.add_edges_from(draw(st.lists(pairs, max_size=2 * n)))
    return graph


@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(connected_graphs(), st.randoms(use_true_random=False))
def test_any_connected_graph(graph, source):
    for weights in (tp.metropolis, tp.uniform, tp.self_weight(0.3)):
        topology = tp.from_graph(graph, weights=weights)
        assert_doubly_stochastic(topology)
        assert tp.is_symmetric(topology)
        assert 0 < tp.spectral_gap(topology) <= 1 + 1e-12
    nodes = list(graph)
    order = source.sample(range(len(nodes)), len(nodes))
    shuffled = nx.Graph()
    shuffled.add_nodes_from(nodes[i] for i in order)
    shuffled.add_edges_from(graph.edges)
    expected = tp.from_graph(graph).matrix.toarray()[np.ix_(order, order)]
    np.testing.assert_allclose(tp.from_graph(shuffled).matrix.toarray(), expected, atol=1e-15)


def test_from_graph_keeps_the_order_of_its_nodes():
    graph = nx.Graph()
    graph.add_nodes_from(["c", "a", "b"])
    graph.add_edge("a", "b", weight=7.0)
    graph.add_edge("a", "c")
    graph.add_edge("b", "b")
    np.testing.assert_allclose(
        tp.from_graph(graph).matrix.toarray(), [[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]]
    )
    parallel = nx.MultiGraph([(0, 1), (0, 1), (1, 2)])
    np.testing.assert_allclose(tp.from_graph(parallel).matrix.toarray(), tp.path(3).matrix.toarray())


def test_directed_graphs():
    graph = nx.DiGraph([("a", "b"), ("b", "c"), ("c", "a"), ("a", "c")])
    topology = tp.from_graph(graph)
    assert topology.directed
    np.testing.assert_allclose(topology.matrix.toarray(), [[1 / 3, 0, 1 / 2], [1 / 3, 1 / 2, 0], [1 / 3, 1 / 2, 1 / 2]])
    assert tp.edges(topology).tolist() == [[0, 2], [1, 0], [2, 0], [2, 1]]
    tp.check(topology)
    assert tp.lazy(topology).directed
    np.testing.assert_allclose(tp.eigenvalues(topology)[0], 1, atol=1e-12)
    cycle = tp.from_graph(nx.cycle_graph(5, create_using=nx.DiGraph))
    assert not cycle.directed
    assert cycle.matrix.diagonal().tolist() == [0.5] * 5
    with pytest.raises(ValueError, match=r"topology must be doubly stochastic .* second largest modulus"):
        tp.spectral_gap(topology)
    with pytest.raises(ValueError, match=r"strongly connected; got 2 components of agents: \[\d\]; \[\d\]\. Add edges"):
        tp.from_graph(nx.DiGraph([(0, 1)]))
    with pytest.raises(ValueError, match=r"adjacency must be square; got shape \(2, 3\)"):
        tp.out_weights(sparse.csr_array(np.ones((2, 3))))
    with pytest.raises(ValueError, match=r"adjacency must be symmetric .* weights=bx\.topology\.out_weights"):
        tp.from_graph(graph, weights=tp.metropolis)


def test_from_matrix():
    given_one = tp.ring(6).matrix
    for matrix in (
        given_one,
        given_one.tocoo(),
        sparse.csc_matrix(given_one),
        given_one.toarray(),
        given_one.toarray().tolist(),
    ):
        topology = tp.from_matrix(matrix)
        assert_doubly_stochastic(topology)
        np.testing.assert_array_equal(topology.matrix.toarray(), given_one.toarray())
    topology.matrix.data[0] = 9.0
    assert given_one[0, 0] == pytest.approx(1 / 3)
    off = np.full((3, 3), 1 / 3)
    off[0, 0] += 5e-7
    assert not tp.from_matrix(off).directed
    assert tp.from_matrix([[1]]).matrix.toarray().tolist() == [[1.0]]
    no_self_weights = tp.from_matrix((np.ones((4, 4)) - np.eye(4)) / 3)
    assert tp.spectral_gap(no_self_weights) == pytest.approx(2 / 3, abs=1e-12)
    directed = tp.from_matrix([[0.5, 0.2], [0.5, 0.8]])
    assert directed.directed
    assert directed.matrix[0, 1] == 0.2


def with_entry(row, column, value):
    matrix = tp.ring(5).matrix.toarray()
    matrix[row, column] = value
    return matrix


BLOCKS = np.kron(np.eye(2), np.full((12, 12), 1 / 12))
SWAP = [[0.0, 1.0], [1.0, 0.0]]
REFUSED = [
    (lambda: tp.from_matrix(np.ones((2, 3))), r"matrix must be square, \[n, n\] .* got shape \(2, 3\)"),
    (lambda: tp.from_matrix(np.ones(4)), r"matrix must be square, .* got shape \(4,\)"),
    (lambda: tp.from_matrix(np.ones((0, 0))), r"n >= 1; got shape \(0, 0\)"),
    (lambda: tp.from_matrix(np.eye(2) * 1j), r"real numbers; got dtype complex128\. Cast it"),
    (lambda: tp.from_matrix(with_entry(3, 4, np.nan)), r"finite weights; got nan in row 3, column 4\. .*Metropolis"),
    (
        lambda: tp.from_matrix(with_entry(2, 1, -0.5)),
        r"nonnegative weights; got -0.5 in row 2, column 1\. .*Metropolis",
    ),
    (
        lambda: tp.from_matrix(with_entry(2, 1, 0.5)),
        r"got row 2 with sum 1\.166667, column 1 with sum 1\.166667\. .*Metro",
    ),
    (
        lambda: tp.from_matrix([[0.5, 0.5], [0.2, 0.8]]),
        r"columns that sum to 1, not its rows alone; got column 0 with sum 0\.7\. .*push_sum with its transpose",
    ),
    (
        lambda: tp.from_matrix(np.eye(3)),
        r"matrix must be connected; got 3 components of agents: \[0\]; \[1\]; \[2\]\. Add",
    ),
    (
        lambda: tp.from_matrix(BLOCKS),
        r"got 2 components of agents: \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\] \(12 agents\); \[12, .*\] \(12 agents\)\. Add",
    ),
    (lambda: tp.from_matrix(np.eye(9)), r"9 components of agents: \[0\]; \[1\]; \[2\]; \[3\]; \.\.\.\. Add edges"),
    (lambda: tp.from_matrix(SWAP), r"must contract \(σ < 1\); got σ = 1 .* at agent 0\. Take bx\.topology\.lazy"),
    (
        lambda: tp.from_matrix([[0.0, 0.5, 0], [1, 0.25, 1], [0, 0.25, 0]]),
        r"positive self weights where it is directed; got 0 at agent 0\. Take bx\.topology\.lazy",
    ),
    (lambda: tp.from_graph(nx.Graph()), "at least one node; got an empty graph"),
    (lambda: tp.from_graph(nx.Graph([(0, 1), (2, 3)])), r"connected; got 2 components of agents: \[0, 1\]; \[2, 3\]"),
    (lambda: tp.from_graph(np.eye(3)), r"graph must be a networkx graph; got ndarray\. Take bx\.topology\.from_matrix"),
    (lambda: tp.ring(0), "n must be an int >= 1; got 0"),
    (lambda: tp.ring(4.0), "n must be a static Python int >= 1; got float"),
    (lambda: tp.ring(4, weights=0.5), r"weights must be a function \(adjacency\) -> \.\.\.; got 0\.5"),
    (
        lambda: tp.ring(4, weights=lambda adjacency: adjacency),
        r"graph with these weights must have rows .* row 0 with sum 2",
    ),
    (lambda: tp.ring(4, weights=tp.self_weight(1.0)), r"value must be a number in \(0, 1\); got 1\.0"),
    (lambda: tp.torus(12, rows=5), r"rows must divide n=12; got 5\. Pass one of \[1, 2, 3, 4, 6, 12\]"),
    (lambda: tp.hypercube(6), r"power of two for a hypercube; got 6\. Pass n=4 or n=8"),
    (lambda: tp.erdos_renyi(5, probability=0.0, seed=0), r"probability must be a number in \(0, 1\]; got 0\.0"),
    (
        lambda: tp.erdos_renyi(50, probability=0.01, seed=4),
        r"n=50 agents connected; got 0\.01, and 100 graphs drawn from seed=4 were not\. Pass probability=0\.16 or more",
    ),
    (lambda: tp.erdos_renyi(5, probability=0.5, seed=0.5), "seed must be a static Python int"),
    (lambda: tp.random_regular(5, degree=3, seed=0), r"degree must be below n=5, and n · degree even; got 3"),
    (lambda: tp.random_regular(4, degree=4, seed=0), r"degree must be below n=4.*; got 4"),
    (
        lambda: tp.random_regular(6, degree=1, seed=0),
        r"n=6 agents connected; got 1, and 100 graphs .* Pass degree=3 or more",
    ),
    (lambda: tp.check(np.eye(3)), r"topology must be a Topology, or .*; got ndarray\. Pass .*from_matrix\(W\)"),
    (lambda: tp.check(()), "topology must be a Topology, or .*; got an empty sequence"),
    (lambda: tp.check((tp.ring(3), tp.ring(4))), r"one number of agents in all rounds; got \[3, 4\]"),
    (lambda: tp.check(tp.Topology(np.eye(3))), r"(?s)topology\.matrix must be a csr_array; got .*from_matrix\(W\)"),
    (
        lambda: tp.check([tp.ring(2), tp.Topology(sparse.csr_array([[0.5, 0.2], [0.5, 0.8]]))]),
        r"topology\[1\] must have rows .*got row 0 with sum 0\.7\. Mark it directed=True, .*bx\.agents\.push_sum",
    ),
    (
        lambda: tp.check([tp.one_peer_exponential(8)[2]] * 2),
        r"topology must be connected over one period; got 4 components of agents: \[0, 4\]; \[1, 5\]; \[2, 6\]; \[3,",
    ),
    (lambda: tp.check([tp.Topology(sparse.csr_array(SWAP))] * 2), r"topology must contract .*lazy"),
    (lambda: tp.edges(tp.one_peer_exponential(4)), "topology must be a Topology; got"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_matchings_in_turn():
    """Each round pairs the agents off; none is connected, and together they are."""

    def pairs(*partner):
        return tp.Topology(sparse.csr_array((np.eye(4) + np.eye(4)[list(partner)]) / 2))

    sequence = (pairs(1, 0, 3, 2), pairs(3, 2, 1, 0))
    tp.check(sequence)
    assert tp.spectral_gap(sequence) == pytest.approx(1, abs=1e-12)
    swap = tp.Topology(sparse.csr_array(np.eye(4)[[1, 0, 3, 2]]))
    tp.check((swap, tp.ring(4)))  # a permutation in between does no harm


def test_networkx_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ModuleNotFoundError, match="pip install networkx"):
        tp.erdos_renyi(5, probability=0.5, seed=0)
