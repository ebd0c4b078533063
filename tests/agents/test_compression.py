"""Compressed gossip: the mean is kept, consensus is reached, and bytes are those of the messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax.agents import compression, topology
from bilevax.agents._gossip import gossip, push_sum
from bilevax.decentralized._sldbo import sldbo
from bilevax.single_loop import correction

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(jax.random.key(1), (8, 50)))
RING = gossip(topology.ring(8))
COMPRESSORS = {
    "top_k": compression.top_k(0.1),
    "random_k": compression.random_k(0.1),
    "random_k_unbiased": compression.random_k_unbiased(0.8),
    "qsgd": compression.qsgd(2),
    "qsgd_unbiased": compression.qsgd_unbiased(4),
    "sign": compression.sign(),
}


def rounds(gossip, x, number):
    """The end, and the relative distance from consensus there, of so many rounds of gossip."""

    def one(carry, t):
        x, state = carry
        return gossip.mix(jax.random.fold_in(KEY, t), state, x), None

    (end, _), _ = jax.lax.scan(one, (x, gossip.init(x)), jnp.arange(number))
    return end, jnp.linalg.norm(end - x.mean(0)[None]) / jnp.linalg.norm(x - x.mean(0)[None])


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
def test_mean_is_kept_and_consensus_approached(compressor):
    end, distance = jax.jit(lambda x: rounds(compression.choco(RING, compressor, gossip_step=0.1), x, 200))(X)
    np.testing.assert_allclose(end.mean(0), X.mean(0), rtol=0, atol=1e-13)
    assert 1e-6 < distance < 0.8  # not there yet, so that the mean is no trivial one


@pytest.mark.parametrize(
    ("fraction", "number", "good", "bad"),
    [(0.1, 4000, [0.1, 0.2], [0.5]), pytest.param(0.02, 20_000, [0.03], [0.2], marks=pytest.mark.slow)],
)
def test_step_scales_with_the_compression(fraction, number, good, bad):
    def run(step):
        return rounds(compression.choco(RING, compression.top_k(fraction), gossip_step=step), X, number)

    end, distance = jax.jit(jax.vmap(run))(jnp.array(good + bad))
    assert (distance[: len(good)] <= 1e-12).all()
    assert not (distance[len(good) :] < 1e3).any()
    np.testing.assert_allclose(end[0].mean(0), X.mean(0), rtol=0, atol=1e-13)


def test_everything_sent_at_step_one_is_plain_gossip():
    tree = {"w": X.reshape(8, 5, 10), "b": X[:, 0]}
    full = compression.choco(RING, compression.top_k(1.0), gossip_step=1.0)
    state, plain = full.init(tree), tree
    compressed = tree
    one, reference = (
        jax.jit(
            lambda state, tree, gossip=gossip: (gossip.mix(None, state, tree), gossip.laplacian(None, state, tree)[0])
        )
        for gossip in (full, RING)
    )
    for _ in range(3):
        (compressed, state), difference = one(state, compressed)
        (plain, _), expected = reference((), plain)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), difference, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), compressed, plain)
    assert full.n == 8
    assert full.topology is RING.topology
    assert full.weights(state) is None
    np.testing.assert_array_equal(full.agents(), np.arange(8))
    np.testing.assert_allclose(full.mean(tree)["b"], X[:, 0].mean(), rtol=1e-14)


def test_compressed_messages_entry_by_entry():
    vector = np.array([1.0, -3.0, 0.5, 0.0, 2.0])

    @jax.jit
    def messages(vector):
        few = [compression.top_k(0.4), compression.top_k(0.41), compression.sign()]
        some = [compression.random_k(0.4), compression.random_k_unbiased(0.4)]
        coarse = [compression.qsgd_unbiased(1), compression.qsgd(1)]
        vectors = ((few, vector), (some, vector + 7), (coarse, vector))
        return [one.compress(KEY, vector) for these, vector in vectors for one in these]

    two, three, signs, kept, scaled, coarse, shrunk = map(np.asarray, messages(vector))
    np.testing.assert_array_equal(two, [0, -3, 0, 0, 2])
    np.testing.assert_array_equal(three, [1, -3, 0, 0, 2])
    np.testing.assert_allclose(signs, [1.3, -1.3, 1.3, 1.3, 1.3], rtol=1e-14)
    assert int((kept != 0).sum()) == 2
    np.testing.assert_array_equal(scaled, 2.5 * kept)
    coarse, shrunk = coarse / np.linalg.norm(vector), shrunk / np.linalg.norm(vector)
    assert {round(abs(float(entry)), 12) for entry in coarse} <= {0.0, 1.0}
    np.testing.assert_allclose(shrunk, coarse / (1 + np.sqrt(5)), rtol=1e-14)  # s = 1, so that √d/s < d/s²


@pytest.mark.parametrize("name", ["random_k_unbiased", "qsgd_unbiased"])
def test_unbiased(name):
    vector, draws = X[0, :10], 4000
    keys = jax.random.split(KEY, draws)
    messages = np.asarray(jax.jit(jax.vmap(COMPRESSORS[name].compress, (0, None)))(keys, vector))
    deviation = np.abs(messages.mean(0) - vector)
    assert (messages.std(0) > 0).all()
    assert (deviation <= 4 * messages.std(0) / np.sqrt(draws)).all()


@pytest.mark.parametrize("name", ["top_k", "random_k", "qsgd", "sign"])
def test_contractive(name):
    """E‖Q(v) − v‖² ≤ (1 − δ)‖v‖², with the δ of the docstring."""
    vector = X[0]
    keys = jax.random.split(KEY, 1000)
    messages = np.asarray(jax.jit(jax.vmap(COMPRESSORS[name].compress, (0, None)))(keys, vector))
    error = ((messages - vector) ** 2).sum(1).mean() / (vector**2).sum()
    delta = {
        "top_k": 0.1,
        "random_k": 0.1,
        "qsgd": 1 / (1 + np.sqrt(50) / 3),
        "sign": np.abs(vector).sum() ** 2 / (50 * (vector**2).sum()),
    }[name]
    assert error <= (1 - delta) * 1.02
    if name in ("random_k", "sign"):
        np.testing.assert_allclose(error, 1 - delta, rtol=0.02)


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_zeros_stay_zero_and_dtypes_are_kept(compressor, dtype):
    vectors = np.stack([np.zeros(30, dtype), np.full(30, 1000.0, dtype)])  # whose squares overflow in float16
    message, large = np.asarray(jax.jit(jax.vmap(compressor.compress, (None, 0)))(KEY, vectors))
    assert message.dtype == dtype
    assert (message == 0).all()
    assert np.isfinite(large).all()
    assert (large >= 0).all()
    assert large.max() > 0


@pytest.mark.parametrize(
    ("compressor", "step", "form"),
    [
        (compression.top_k(0.2), 0.2, correction.tracking),
        (compression.qsgd(4), 0.5, correction.tracking),
        (compression.top_k(0.2), 0.05, correction.exact_diffusion),
    ],
    ids=["top_k-tracking", "qsgd-tracking", "top_k-exact_diffusion"],
)
def test_methods_reach_their_limit_by_compressed_messages(compressor, step, form):
    """Diagonal quadratics, different for each agent, whose x* is known in closed form."""
    draw = np.random.default_rng(0)
    a, c, e, r = (draw.uniform(low, 3, (8, 20)) for low in (1, -3, -3, 1))
    problem = bx.BilevelProblem(
        lambda x, y, b: 0.5 * jnp.sum(y**2) - jnp.sum(b[2] * y) + 0.5 * jnp.sum(b[3] * x**2),
        lambda x, y, b: 0.5 * jnp.sum(b[0] * y**2) - jnp.sum(y * (x + b[1])),
    )
    mean_a, mean_c, mean_e, mean_r = (leaf.mean(0) for leaf in (a, c, e, r))
    x_star = -(mean_c / mean_a - mean_e) / mean_a / (mean_r + 1 / mean_a**2)
    compressed = compression.choco(gossip(topology.lazy(topology.ring(8))), compressor, gossip_step=step)
    method = sldbo(problem, compressed, (0.02, 0.05, 0.05), correction=form())
    batch = bx.Batch(outer=(a, c, e, r), inner=(a, c, e, r))

    def one(state, k):
        state, info = method.step(jax.random.fold_in(KEY, k), state, batch)
        return state, info.bytes

    @jax.jit
    def run(x):
        return jax.lax.scan(one, method.init(x, x), jnp.arange(6000))

    state, sent = run(np.zeros((8, 20)))
    np.testing.assert_allclose(state.x, np.broadcast_to(x_star, (8, 20)), rtol=0, atol=1e-6)
    vectors = 6 if form is correction.tracking else 3
    np.testing.assert_array_equal(sent[-1], np.full(8, 2 * vectors * compressor.bytes(20, float)))


def test_half_precision_leaves_mix():
    x = X.astype(jnp.bfloat16)
    compressed = compression.choco(RING, compression.top_k(0.5), gossip_step=0.3)
    mixed, state = jax.jit(lambda x: compressed.mix(None, compressed.init(x), x))(x)
    assert mixed.dtype == state.copies.dtype == jnp.bfloat16
    np.testing.assert_allclose(mixed.astype(float).mean(0), x.astype(float).mean(0), rtol=0, atol=0.02)


def test_bytes_by_hand():
    assert [
        compressor.bytes(50, dtype)
        for compressor in COMPRESSORS.values()
        for dtype in ("bfloat16", "float32", "float64")
    ] == [
        *(5 * (2 + 4), 5 * (4 + 4), 5 * (8 + 4)),  # five values, five indices
        *(5 * 2, 5 * 4, 5 * 8),  # five values
        *(40 * 2, 40 * 4, 40 * 8),
        *(19 + 4, 19 + 4, 19 + 8),  # 150 bits and the norm
        *(32 + 4, 32 + 4, 32 + 8),  # 250 bits and the norm
        *(7 + 4, 7 + 4, 7 + 8),  # 50 bits and the scale
    ]
    assert compression.top_k(0.07).bytes(100, "float32") == 7 * 8  # 0.07 · 100 > 7 in floating point
    star = compression.choco(gossip(topology.star(4)), compression.top_k(0.1), gossip_step=0.1)
    tree = {"w": jnp.zeros((4, 5, 10), jnp.float32), "b": jnp.zeros((4, 3), jnp.float64)}
    message = 5 * 8 + 1 * 12
    np.testing.assert_array_equal(star.bytes(star.init(tree), tree), [3 * message, message, message, message])


@pytest.mark.parametrize("name", ["random_k", "qsgd"])
def test_a_draw_depends_on_the_id_of_the_agent_alone(name):
    """Agents in another order, with their ids, send the same messages; two agents and two leaves draw apart."""
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    complete = gossip(topology.complete(8))
    moved = complete._replace(agents=lambda: jnp.asarray(order, jnp.int32))
    tree = {"a": X, "b": X}

    def copies(gossip, tree):
        compressed = compression.choco(gossip, COMPRESSORS[name], gossip_step=0.1)
        mix = jax.jit(lambda tree: compressed.mix(KEY, compressed.init(tree), tree)[1].copies)
        return jax.tree.map(np.asarray, mix(tree))

    here = copies(complete, tree)
    there = copies(moved, jax.tree.map(lambda leaf: leaf[order], tree))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), here, there)
    assert (here["a"] != here["b"]).any()
    same = copies(complete, np.broadcast_to(X[:1], X.shape))
    assert (same[0] != same[1]).any()


MISTAKES = {
    "no fraction": (lambda: compression.top_k(0.0), r"fraction must be in \(0, 1\]"),
    "large fraction": (lambda: compression.random_k(1.5), r"fraction must be in \(0, 1\]"),
    "nan fraction": (lambda: compression.random_k_unbiased(float("nan")), r"fraction must be in \(0, 1\]"),
    "traced fraction": (
        lambda: jax.jit(lambda f: compression.top_k(f).bytes(9, float))(0.5),
        "fraction must be one plain number",
    ),
    "array fraction": (lambda: compression.top_k(np.full(2, 0.5)), r"fraction must be one plain number.*\(2,\)"),
    "no bits": (lambda: compression.qsgd(0), "bits must be an int >= 1"),
    "many bits": (lambda: compression.qsgd_unbiased(17), "bits must be an int from 1 to 16"),
    "step": (lambda: compression.choco(RING, compression.sign(), gossip_step=0.0), "step must be a finite number > 0"),
    "gossip": (
        lambda: compression.choco(topology.ring(8), compression.sign(), gossip_step=0.1),
        "gossip must be a Gossip",
    ),
    "compressor": (
        lambda: compression.choco(RING, compression.sign, gossip_step=0.1),
        "compressor must be a Compressor",
    ),
    "sequence": (
        lambda: compression.choco(gossip(topology.one_peer_exponential(8)), compression.sign(), gossip_step=0.1),
        "gossip must mix over one fixed graph",
    ),
    "push-sum": (
        lambda: compression.choco(push_sum(topology.ring(8)), compression.sign(), gossip_step=0.1).init(X),
        "gossip must be doubly stochastic to be compressed; got push-sum",
    ),
}


@pytest.mark.parametrize(("wrong", "says"), MISTAKES.values(), ids=MISTAKES)
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


@pytest.mark.parametrize("name", ["random_k", "random_k_unbiased", "qsgd", "qsgd_unbiased"])
def test_a_draw_needs_a_key(name):
    compressed = compression.choco(RING, COMPRESSORS[name], gossip_step=0.1)
    with pytest.raises(ValueError, match=r"key must be a jax.random.key for (random_k|qsgd)"):
        compressed.mix(None, compressed.init(X), X)
