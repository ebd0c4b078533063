"""Methods with inner loops, and adaptive steps: recursions in plain numpy, limits, biases that the loops leave."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from cases import DEFINITE, INDEFINITE, LAZY_RING, STEPS, TOY_STEPS, W
from networks import close, non_atc, none, numbers, run, stacked

import bilevax as bx
from bilevax import decentralized
from bilevax.testing.problems._quadratic import PROBLEM

SOLUTION = DEFINITE.x_star


def origin(q):
    return np.zeros((8, q.B.shape[2])), np.zeros((8, q.B.shape[1])), np.zeros((8, q.B.shape[1]))


def final(make, values, batch=DEFINITE.batch, iterations=1000):
    """The last x [values, n, d] of `make(value)`, one program for all values."""

    def last(value):
        method = make(value)
        start = method.init(*networks.zeros(batch), batch)
        return jax.lax.fori_loop(0, iterations, lambda _, state: method.step(None, state, batch)[0], start).x

    return numbers(jax.jit(jax.vmap(last))(jnp.asarray(values)))


# MA-DSBO


def ma_dsbo(steps, v_steps, step_sizes=TOY_STEPS, **options):
    return decentralized.ma_dsbo(PROBLEM, LAZY_RING, step_sizes, steps=steps, v_steps=v_steps, **options)


def ma_dsbo_recursion(q, steps, inner_steps, product_steps, theta, track, restart, iterations):
    (x, y, v), h = origin(q), None
    move_x, move_y = (non_atc(), non_atc()) if track else (none(), none())
    move_v, path = non_atc(), [origin(q)]
    for _ in range(iterations):
        for _ in range(inner_steps):
            y = move_y(W, y, networks.direction_y(q, x, y), steps[1])
        move_v = non_atc() if restart else move_v
        for _ in range(product_steps):
            v = move_v(W, v, networks.direction_v(q, x, y, v), steps[2])
        d = networks.direction_x(q, x, y, v)
        h = d if h is None else (1 - theta) * h + theta * d
        x = move_x(W, x, h, steps[0])
        path.append((x, y, v))
    return stacked(path)


@pytest.mark.parametrize(("track", "restart"), [(False, False), (True, False), (False, True)])
def test_ma_dsbo_follows_its_recursion(track, restart):
    method = ma_dsbo(2, 3, STEPS, momentum=0.3, track=track, restart=restart)
    _, path, info = run(method, INDEFINITE.batch, 20)
    close(path, ma_dsbo_recursion(INDEFINITE, STEPS, 2, 3, 0.3, track, restart, 20), 1e-12)
    d_x, d_y = 2, 3
    sent = 2 * d_x + (2 * 2 + 2 * 3) * d_y if track else d_x + (2 + 2 * 3) * d_y
    np.testing.assert_array_equal(info.bytes, np.full((20, 8), 2 * 8 * sent))
    np.testing.assert_array_equal(info.rounds, np.full(20, 6))


def test_a_tracker_that_starts_anew_leaves_a_bias_that_many_products_cure():
    """Although v itself starts where it was; carried over, one product is enough."""
    bias = []
    for products in (1, 160, 400):
        x = final(lambda _, n=products: ma_dsbo(1, n, track=True, restart=True), [0.0], iterations=600)[0]
        bias.append(np.abs(x - SOLUTION).max())
    assert bias[0] > 1e-2
    assert bias[0] > 10 * bias[1] > 1e-4
    assert bias[2] < 1e-5
    carried = final(lambda _: ma_dsbo(1, 1, track=True), [0.0], iterations=1500)[0]
    assert np.abs(carried - SOLUTION).max() < 1e-10


def test_ma_dsbo_without_tracking_is_off_by_about_its_step():
    """Of the agents' mean, too."""
    x = final(
        lambda scale: ma_dsbo(1, 1, tuple(scale * a for a in TOY_STEPS)), [1.0, 0.5, 0.25, 0.125], iterations=5000
    )
    bias = np.linalg.norm(x.mean(1) - SOLUTION, axis=1)
    assert bias[0] > 1e-2
    assert np.all((bias[1:] / bias[:-1] > 0.4) & (bias[1:] / bias[:-1] < 0.9))


# C2DFB


def c2dfb(multiplier, fraction=1.0, gossip_step=0.5, steps=10, step_sizes=TOY_STEPS):
    compressor = bx.agents.compression.top_k(fraction)
    return decentralized.c2dfb(
        PROBLEM,
        LAZY_RING,
        step_sizes,
        steps=steps,
        multiplier=multiplier,
        compressor=compressor,
        gossip_step=gossip_step,
    )


def penalized_paths(method, q, iterations):
    """The paths of x, y and y_λ, and the infos."""
    start = method.init(*networks.zeros(q.batch), q.batch)

    def step(state, _):
        state, info = method.step(None, state, q.batch)
        return state, ((state.x, state.y, state.penalized), info)

    return numbers(jax.jit(lambda: jax.lax.scan(step, start, length=iterations)[1])())


@pytest.mark.parametrize(("fraction", "gossip_step"), [(0.4, 0.4), (0.2, 0.2)])
def test_c2dfb_converges_to_the_penalized_solution(fraction, gossip_step):
    """Of the three entries of y it sends two and one; of all three, see below."""
    x = DEFINITE.penalized(10.0)
    assert np.linalg.norm(x - SOLUTION) > 1e-2
    method = c2dfb(10.0, fraction, gossip_step)
    got = final(lambda _: method, [0.0], iterations=1000 if fraction > 0.3 else 2500)[0]
    np.testing.assert_allclose(got, np.tile(x, (8, 1)), rtol=0, atol=1e-10)


def test_the_penalty_is_off_by_its_inverse():
    multipliers = [1.0, 10.0, 100.0, 1000.0]
    x = final(lambda multiplier: c2dfb(multiplier), multipliers)
    for got, multiplier in zip(x, multipliers, strict=True):
        np.testing.assert_allclose(got, np.tile(DEFINITE.penalized(multiplier), (8, 1)), rtol=0, atol=1e-10)
    scaled = np.linalg.norm(x.mean(1) - SOLUTION, axis=1) * multipliers
    assert 0.08 < scaled.min() < scaled.max() < 0.13
    np.testing.assert_allclose(scaled[2:], scaled[3], rtol=5e-3)


def c2dfb_recursion(q, steps, inner_steps, multiplier, gossip_step, fraction, iterations):
    """Reference copies of each vector and of its tracker; what travels is the change of a copy."""
    (x, y, z), move_x = origin(q), non_atc()
    kept = int(np.ceil(fraction * 3))

    def compress(rows):
        out = np.zeros_like(rows)
        for row, into in zip(rows, out, strict=True):
            largest = np.argsort(-np.abs(row), kind="stable")[:kept]
            into[largest] = row[largest]
        return out

    def penalized(x, z):
        return networks.direction_y(q, x, z) - networks.direction_v(q, x, z, 0 * z) / multiplier

    copies = {name: [0 * y, 0 * y, 0 * y, 0 * y] for name in "yz"}  # ŝ, t̂, the tracker behind its mixing, the last d

    def inner(name, s, d, a):
        s_copy, t_copy, mixed, last = copies[name]
        t = mixed + d - last
        s_copy, t_copy = s_copy + compress(s - s_copy), t_copy + compress(t - t_copy)
        mixed = t + gossip_step * (W @ t_copy - t_copy)
        copies[name] = [s_copy, t_copy, mixed, d]
        return s + gossip_step * (W @ s_copy - s_copy) - a * t

    path = [(x, y, z)]
    for _ in range(iterations):
        for _ in range(inner_steps):
            y = inner("y", y, networks.direction_y(q, x, y), steps[1])
            z = inner("z", z, penalized(x, z), steps[2])
        # ∇_x f at y_λ, and ∇_x g = −Bᵀy
        d = networks.direction_x(q, x, z, 0 * z) + multiplier * np.einsum("nji,nj->ni", q.B, y - z)
        x = move_x(W, x, d, steps[0])
        path.append((x, y, z))
    return stacked(path)


def test_c2dfb_follows_its_recursion():
    fraction = 0.4
    path, info = penalized_paths(c2dfb(10.0, fraction, 0.4, steps=3), DEFINITE, 15)
    expected = c2dfb_recursion(DEFINITE, TOY_STEPS, 3, 10.0, 0.4, fraction, 15)
    close(path, [level[1:] for level in expected], 1e-12)
    value, index, kept = 8, 4, int(np.ceil(fraction * 3))
    sent = 2 * 2 * value + 4 * 3 * kept * (value + index)
    np.testing.assert_array_equal(info.bytes, np.full((15, 8), 2 * sent))
    for moved, level in zip(info.moves, expected, strict=True):
        np.testing.assert_allclose(moved, np.linalg.norm(np.diff(level, axis=0), axis=-1), rtol=0, atol=1e-12)


# AdaSDBO


def adasdbo_recursion(q, steps, accumulated, iterations):
    point, m = origin(q), [np.full(8, accumulated) for _ in range(3)]
    path = [point]
    for _ in range(iterations):
        d = networks.directions(q, point)
        m = [old + (part**2).sum(1) for old, part in zip(m, d, strict=True)]
        y, v = np.sqrt(m[1]), np.sqrt(np.maximum(m[1], m[2]))
        sizes = [a / length for a, length in zip(steps, (np.sqrt(m[0]) * v, y, v), strict=True)]
        point = tuple(W @ (s - size[:, None] * part) for s, size, part in zip(point, sizes, d, strict=True))
        m = [W @ one for one in m]
        path.append(point)
    return stacked(path), m


def test_adasdbo_follows_its_recursion():
    method = decentralized.adasdbo(PROBLEM, LAZY_RING, (0.3, 0.5, 0.7), accumulated=0.2)
    state, path, info = run(method, INDEFINITE.batch, 60)
    expected, m = adasdbo_recursion(INDEFINITE, (0.3, 0.5, 0.7), 0.2, 60)
    close(path, expected, 1e-12)
    np.testing.assert_allclose(state.accumulated, m, rtol=1e-13)
    np.testing.assert_array_equal(info.bytes, np.full((60, 8), 2 * 8 * (2 + 2 * 3 + 3)))


def test_adasdbo_approaches_the_solution_slowly():
    method = decentralized.adasdbo(PROBLEM, LAZY_RING, 1.0)
    start = method.init(*networks.zeros(DEFINITE.batch), DEFINITE.batch)

    def thousands(state, _):
        state = jax.lax.fori_loop(0, 2000, lambda _, state: method.step(None, state, DEFINITE.batch)[0], state)
        return state, state.x

    x = numbers(jax.jit(lambda: jax.lax.scan(thousands, start, length=10)[1])())
    error = np.abs(x - SOLUTION).max((1, 2))
    assert np.all(np.diff(error) < 0)
    assert error[0] > 1e-2 > error[-1] > 1e-3


# Samples


def noisy(key, t, data, size=0.1):
    width = size * 3**0.5  # of a uniform draw with this standard deviation, whose program is short
    errors = {
        name: jax.random.uniform(key, data[name].shape, float, -width, width) for name in data.keys() & {"A", "e"}
    }
    return data | {name: data[name] + error for name, error in errors.items()}


SAMPLED = {
    "ma_dsbo": lambda sample: ma_dsbo(2, 2, STEPS, sample=sample, momentum=0.1, track=True),
    "c2dfb": lambda sample: decentralized.c2dfb(
        PROBLEM,
        LAZY_RING,
        STEPS,
        steps=3,
        multiplier=10.0,
        compressor=bx.agents.compression.top_k(0.4),
        gossip_step=0.4,
        sample=sample,
    ),
    "adasdbo": lambda sample: decentralized.adasdbo(PROBLEM, LAZY_RING, 1.0, sample=sample),
    "gbdsbo": lambda sample: decentralized.gbdsbo(
        PROBLEM, LAZY_RING, STEPS[:2], sample=sample, terms=2, inverse_step=0.2
    ),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_noise_of_the_samples_leaves_noise_around_the_limit(name):
    """And every agent and every iteration has noise of its own."""

    @jax.jit
    def last(keys, size):
        method = SAMPLED[name](lambda key, t, data: noisy(key, t, data, size))
        start = method.init(*networks.zeros(DEFINITE.batch), DEFINITE.batch)
        return jax.lax.scan(lambda s, key: (method.step(key, s, DEFINITE.batch)[0], ()), start, keys)[0]

    keys = jax.random.split(networks.KEY, 300)
    state = numbers(jax.vmap(last, (None, 0))(keys, jnp.array([0.0, 0.1])))
    distance = np.abs(state.x[1] - state.x[0]).max(1)
    assert np.unique(distance).size == 8
    assert np.all((distance > 1e-4) & (distance < 0.3))
    if name == "gbdsbo":  # with one draw for both factors, equal Hessians would stand in the series
        hessians = state.last.hessians[1]
        assert np.abs(hessians[:, 0] - hessians[:, 1]).max((1, 2)).min() > 1e-2


def test_both_inner_problems_of_c2dfb_see_the_same_samples():
    """With f = 0 they are one problem, and nothing moves x."""
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(8, 50, 3)))
    problem = bx.BilevelProblem(
        lambda x, y, rows: 0.0 * jnp.sum(y), lambda x, y, rows: jnp.mean((rows @ y - rows @ x) ** 2)
    )
    compressor, sample = bx.agents.compression.top_k(0.4), bx.sampling.minibatch(5)
    method = decentralized.c2dfb(
        problem,
        LAZY_RING,
        (0.1, 0.02, 0.02),
        steps=3,
        multiplier=10.0,
        compressor=compressor,
        gossip_step=0.4,
        sample=sample,
    )
    start = method.init(jnp.ones((8, 3)), jnp.zeros((8, 3)))

    def step(state, key):
        return method.step(key, state, bx.Batch(rows, rows))[0], None

    keys = jax.random.split(networks.KEY, 20)
    state = numbers(jax.jit(lambda keys: jax.lax.scan(step, start, keys)[0])(keys))
    np.testing.assert_allclose(state.x, 1.0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state.penalized, state.y, rtol=0, atol=1e-12)
    assert np.abs(state.y).min() > 1e-2


def test_a_restart_forgets_the_tracker_and_not_the_round_of_a_sequence():
    gossip = bx.gossip(bx.topology.one_peer_exponential(8))
    method = decentralized.ma_dsbo(PROBLEM, gossip, STEPS, steps=1, v_steps=1, restart=True)
    state, _, _ = run(method, DEFINITE.batch, 7)
    assert int(state.corrections.v.gossip) == 7
