"""Gossip: every form of a matrix is that matrix, sequences take turns, push-sum finds the average."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

import bilevax as bx
from bilevax.agents import _gossip as forms
from bilevax.testing import correction

GRAPHS = {
    "one": bx.topology.ring(1),
    "two": bx.topology.ring(2),
    "ring": bx.topology.ring(8),
    "path": bx.topology.path(7),
    "star": bx.topology.star(9),
    "complete": bx.topology.complete(5),
    "torus": bx.topology.torus(16),
    "grid": bx.topology.grid(12),
    "hypercube": bx.topology.hypercube(8),
    "exponential": bx.topology.exponential(10),
    "erdos_renyi": bx.topology.erdos_renyi(12, probability=0.4, seed=0),
    "random_regular": bx.topology.random_regular(10, degree=3, seed=0),
    "user": bx.topology.from_matrix(np.array([[0.5, 0.2, 0.3], [0.3, 0.5, 0.2], [0.2, 0.3, 0.5]])),
    "lazy": bx.topology.lazy(bx.topology.torus(9)),
}
DIRECTED = bx.topology.from_graph(nx.DiGraph([(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)]))


def leaves(n, dtype=float):
    random = np.random.default_rng(0)
    return {"a": random.normal(size=(n, 2, 3)).astype(dtype), "b": random.normal(size=n).astype(dtype)}


def products(matrix, tree):
    return jax.tree.map(lambda leaf: np.tensordot(matrix, np.asarray(leaf), 1), tree)


def assert_close(got, expected, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, expected)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_form_is_the_matrix(name):
    graph = GRAPHS[name]
    matrix, tree = graph.matrix.toarray(), leaves(graph.n)
    mixed, slope = products(matrix, tree), products(np.eye(graph.n) - matrix, tree)
    made = [make(graph) for make in (forms.dense, forms.shifts, forms.sparse, forms.by_structure)]
    both = jax.jit(lambda tree: [(jax.tree.map(form.mix, tree), jax.tree.map(form.laplacian, tree)) for form in made])
    for got in both(tree):
        assert_close(got, (mixed, slope))


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
trees = st.recursive(
    shapes,
    lambda inner: st.lists(inner, min_size=1, max_size=2) | st.dictionaries(st.text(max_size=1), inner, max_size=2),
    max_leaves=3,
)


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(trees, st.sampled_from(["ring", "star", "exponential", "erdos_renyi"]), st.integers(0, 99))
def test_any_pytree_is_mixed_leaf_by_leaf_and_keeps_its_mean(tree, name, seed):
    random, graph = np.random.default_rng(seed), GRAPHS[name]

    def numbers(shape):
        return np.asarray(random.normal(size=(graph.n, *shape)))

    tree = {"any": jax.tree.map(numbers, tree, is_leaf=lambda node: isinstance(node, tuple)), "sure": numbers((2,))}
    gossip = bx.gossip(graph)

    @jax.jit
    def mixed_and_means(tree):
        mixed = gossip.mix(None, gossip.init(tree), tree)[0]
        return mixed, gossip.mean(mixed), gossip.mean(tree)

    mixed, after, before = mixed_and_means(tree)
    assert_close(mixed, products(graph.matrix.toarray(), tree))
    assert_close(after, before)


def program(topology):
    gossip = bx.gossip(topology)
    return jax.make_jaxpr(lambda tree: gossip.mix(None, gossip.init(tree), tree)[0])(jnp.zeros((topology.n, 2)))


def test_the_form_follows_the_structure():
    assert "dot_general" in str(program(bx.topology.erdos_renyi(12, probability=0.4, seed=0)))
    for graph in (bx.topology.ring(4096), bx.topology.torus(1024), bx.topology.exponential(64)):
        shifts = program(graph)
        assert "dot_general" not in str(shifts)
        assert "scatter" not in str(shifts)
    irregular = bx.topology.random_regular(600, degree=3, seed=0)
    sparse = program(irregular)
    assert "scatter-add" in str(sparse)
    assert max(np.size(constant) for constant in sparse.consts) <= irregular.matrix.nnz


def test_the_laplacian_of_equal_agents_is_zero_to_the_last_bit():
    for graph in (GRAPHS["ring"], GRAPHS["torus"], GRAPHS["erdos_renyi"]):
        laplacian = jax.jit(bx.gossip(graph).laplacian)
        assert not np.any(laplacian(None, (), np.tile([0.1, 1 / 3], (graph.n, 1)))[0])


def test_a_sequence_takes_turns():
    """Of the one-peer exponential graph one period is the exact average."""
    gossip = bx.gossip(bx.topology.one_peer_exponential(8))
    tree = start = leaves(8)
    state = gossip.init(tree)
    step = jax.jit(lambda state, tree: (gossip.bytes(state, tree["b"]), *gossip.mix(None, state, tree)))
    for _ in range(3):
        sent, tree, state = step(state, tree)
        np.testing.assert_array_equal(sent, np.full(8, 8.0))
    assert int(state) == 3
    assert_close(tree, jax.tree.map(lambda leaf: np.broadcast_to(leaf.mean(0), leaf.shape), start), atol=1e-15)
    mixed = bx.gossip([bx.topology.path(3), bx.topology.star(3), bx.topology.complete(3)])
    slope, state = jax.jit(mixed.laplacian)(None, np.array(5, np.int32), leaves(3))
    assert_close(slope, products(np.eye(3) - np.full((3, 3), 1 / 3), leaves(3)))
    assert int(state) == 6


def test_bytes_agents_mean_and_topology():
    gossip = bx.gossip(bx.topology.star(4))
    tree = {"a": jnp.zeros((4, 2, 3), jnp.float32), "b": jnp.zeros(4, jnp.float64)}
    np.testing.assert_array_equal(gossip.bytes((), tree), np.array([3, 1, 1, 1]) * (6 * 4 + 8))
    np.testing.assert_array_equal(gossip.agents(), np.arange(4))
    assert gossip.agents().dtype == jnp.int32
    assert gossip.n == 4
    assert gossip.topology.n == 4
    assert_close(gossip.mean({"a": jnp.arange(4.0)}), {"a": jnp.array(1.5)})


@pytest.mark.parametrize("make", [forms.dense, forms.shifts, forms.sparse])
def test_half_precision_keeps_its_dtype_and_its_mean(make):
    form, tree = make(bx.topology.ring(8)), leaves(8, jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float32), tree)
    mixed, expected = jax.jit(lambda *trees: [jax.tree.map(form.mix, tree) for tree in trees])(tree, exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(mixed)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(mixed, jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), expected), atol=0)


def test_push_sum_reaches_the_average_on_a_directed_graph():
    assert DIRECTED.directed
    gossip = bx.agents.push_sum(DIRECTED)
    start = tree = leaves(4)
    state = gossip.init(tree)
    mix = jax.jit(gossip.mix)
    for _ in range(200):
        tree, state = mix(None, state, tree)
        np.testing.assert_allclose(gossip.weights(state).sum(), 4, rtol=1e-14)
    assert_close(gossip.debias(state, tree), bx.replicate(gossip.mean(start), 4), atol=1e-14)
    assert_close(gossip.weigh(state, gossip.debias(state, tree)), tree, atol=1e-14)
    assert not np.allclose(gossip.weights(state), 1)
    sent = gossip.bytes(state, start["b"])  # one float64, and the weight
    np.testing.assert_array_equal(sent, np.array([2, 1, 1, 1]) * 16)


def test_push_sum_of_a_doubly_stochastic_matrix_is_plain_gossip():
    plain, pushed = bx.gossip(GRAPHS["ring"]), bx.agents.push_sum(GRAPHS["ring"])
    tree = leaves(8)
    assert_close(pushed.mix(None, pushed.init(tree), tree)[0], plain.mix(None, (), tree)[0])


def test_tracking_over_push_sum_is_exact():
    """The scalar problem with x* = −23/79, y* = 27/79, v* = −10/79, on a directed graph."""
    inner = tuple(jnp.array(row) for row in [(1.0, 2.0, 3.0, 4.0), (1.0, -1.0, 2.0, 0.0), (0.0, 1.0, 2.0, 1.0)])
    outer = tuple(
        jnp.array(row)
        for row in [(1.0, 1.0, 2.0, 4.0), (1.0, 3.0, -1.0, 1.0), (1.0, 2.0, 1.0, 2.0), (-1.0, 0.0, 1.0, 2.0)]
    )
    problem = bx.BilevelProblem(
        lambda x, y, t: 0.5 * t[0] * y**2 - t[1] * y + 0.5 * t[2] * x**2 + t[3] * x,
        lambda x, y, t: 0.5 * t[0] * y**2 - y * (t[1] * x + t[2]),
    )
    method = bx.decentralized.sldbo(problem, bx.agents.push_sum(DIRECTED), (0.02, 0.05, 0.05))
    state = method.init(jnp.zeros(4), jnp.zeros(4))
    step = lambda state, _: (method.step(None, state, bx.Batch(outer, inner))[0], None)  # noqa: E731
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=4000))(state)
    limit = tuple(bx.replicate(jnp.array([-23, 27, -10]) / 79, 4).T)
    assert_close((state.x, state.y, state.v), limit)


@pytest.mark.parametrize(
    "moved", [bx.single_loop.correction.none(), bx.single_loop.correction.tracking()], ids=["none", "tracking"]
)
def test_the_weighted_mean_moves_along_the_mean_direction(moved):
    """Σ_i ω_i s_i⁺ = Σ_i ω_i s_i − a Σ_i d_i in every update, with ω⁺ = C ω: stochastic gradient push."""
    path, d = correction.CorrectionSubject(moved, DIRECTED).path, correction._directions()
    before, matrix = np.ones(4), DIRECTED.matrix.toarray()
    for k in range(correction.UPDATES):
        after = matrix @ before
        total = lambda omega, k: jax.tree.map(lambda leaf: np.tensordot(omega, leaf[k], 1), path)  # noqa: E731
        along = jax.tree.map(lambda leaf, k=k: -correction.STEP * np.asarray(leaf)[:, k].sum(0), d)
        assert_close(jax.tree.map(np.subtract, total(after, k + 1), total(before, k)), along)
        before = after
    assert not np.allclose(before, 1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"columns alone sum to 1\. Take bx\.agents\.push_sum"):
        bx.gossip(DIRECTED)
    gossip = bx.agents.push_sum(DIRECTED)
    with pytest.raises(ValueError, match=r"symmetric W .* bx\.single_loop\.correction\.tracking"):
        gossip.laplacian(None, gossip.init(jnp.zeros(4)), jnp.zeros(4))
    with pytest.raises(ValueError, match="n must be an int >= 1; got 0"):
        bx.replicate(jnp.zeros(2), 0)
