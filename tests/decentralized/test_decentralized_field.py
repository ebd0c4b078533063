"""The rest of the decentralized field: where each method goes, by linear algebra, and how far off that is.

x* solves the common problem, x_l has each agent's own inverse Hessian, x_p each agent's own lower level.
"""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from cases import DEFINITE, GT, INDEFINITE, LAZY_RING, LAZY_SQUARE, STEPS, TOY_STEPS, W, at, steps_of
from networks import close, lazy, numbers, off, ring, roll, simulate, stacked

import bilevax as bx
from bilevax import decentralized
from bilevax.single_loop import correction, single_loop
from bilevax.testing import check_limit
from bilevax.testing.limits import last
from bilevax.testing.problems import Quadratic, four_agents, neumann
from bilevax.testing.problems._quadratic import PROBLEM

full, whole = bx.sampling.full, bx.agents.compression.top_k(1.0)
C = 0.28  # 1 / L on the definite problem
EXACT = {"terms": 50, "inverse_step": C}  # a Neumann series of which nothing is missing


def make(preset, gossip=LAZY_RING, step_sizes=TOY_STEPS, **options):
    return preset(PROBLEM, gossip, steps_of(preset, step_sizes), **options)


def end(method, q=DEFINITE, iterations=2500):
    """The last state of a run with all data."""
    return last(method, q, iterations)


POINTS = {"x*": DEFINITE.x_star, "x_l": DEFINITE.x_l, "x_p": DEFINITE.x_p}
LIMITS = {
    "mdbo": ("x_l", lambda: make(decentralized.mdbo, sample=full, momentum=0.5, rate=0.5, **EXACT)),
    "vrdbo": ("x_l", lambda: make(decentralized.vrdbo, sample=full, momentum=0.5, rate=0.5, **EXACT)),
    "interact": ("x_p", lambda: make(decentralized.interact, **EXACT)),
    "interact_svr": ("x_p", lambda: make(decentralized.interact_svr, every=3, sample=full, **EXACT)),
    "diamond": ("x_p", lambda: make(decentralized.diamond, sample=full, momentum=0.3, **EXACT)),
    "lopa_tracking": ("x_p", lambda: make(decentralized.lopa_tracking, momentum=0.2)),
    "gbdsbo": ("x*", lambda: make(decentralized.gbdsbo)),
    "ma_dsbo_tracked": ("x*", lambda: make(decentralized.ma_dsbo, steps=2, v_steps=2, momentum=0.5, track=True)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limit_tells_which_problem_is_solved(name):
    where, method = LIMITS[name]
    state = check_limit(method(), DEFINITE, POINTS[where])
    for point, x in POINTS.items():
        assert point == where or off(state.x, x) > 1e-2
    if where == "x_p":
        y = [np.linalg.solve(a.A, a.B @ POINTS["x_p"] + a.c) for a in DEFINITE.agents]
    else:
        y = np.linalg.solve(DEFINITE.mean.A, DEFINITE.mean.B @ POINTS[where] + DEFINITE.mean.c)
    assert off(state.y, y) < 1e-10


@pytest.mark.parametrize("name", ["mdbo", "lopa_tracking"])
def test_limits_of_the_toy_are_fractions_known_by_hand(name):
    if name == "mdbo":
        x, method = (
            -117 / 191,
            make(
                decentralized.mdbo,
                sample=full,
                momentum=0.5,
                rate=1.0,
                terms=200,
                inverse_step=0.25,
                gossip=LAZY_SQUARE,
            ),
        )
    else:
        x, method = -137 / 293, make(decentralized.lopa_tracking, gossip=LAZY_SQUARE)
    assert off(end(method, four_agents()).x, x) < 1e-10


# What is left out of a Neumann series


MEAN = Quadratic(*(leaf.mean(0, keepdims=True) for leaf in DEFINITE))
ALIKE = Quadratic(*(np.repeat(leaf, 8, axis=0) for leaf in MEAN))
SERIES = {
    "mdbo": (
        DEFINITE,
        lambda terms: make(decentralized.mdbo, sample=full, momentum=0.5, rate=1.0, terms=terms, inverse_step=0.1),
    ),
    "alike": (
        ALIKE,
        lambda terms: make(decentralized.mdbo, sample=full, momentum=0.5, rate=1.0, terms=terms, inverse_step=0.1),
    ),
    "interact": (DEFINITE, lambda terms: make(decentralized.interact, terms=terms, inverse_step=0.1)),
    "gbdsbo": (DEFINITE, lambda terms: make(decentralized.gbdsbo, sample=full, terms=terms, inverse_step=0.1)),
}


@pytest.mark.parametrize("name", SERIES)
def test_a_truncated_series_moves_the_limit_as_linear_algebra_says(name):
    """Each agent's own series of `mdbo`, own lower level of `interact`, and the series of the mean of `gbdsbo`."""
    q, method = SERIES[name]
    inverted = MEAN if name == "gbdsbo" else q
    limit = Quadratic.personal if name == "interact" else Quadratic.local_inverse
    bias = []
    for terms in (5, 200) if name == "alike" else (2, 10):
        expected = limit(inverted, neumann(terms=terms, step_size=0.1))
        x = end(method(terms), q).x
        bias.append(off(x, limit(inverted)))
        assert off(x, expected) < 1e-10
    assert bias[0] > 1e-2
    if name == "alike":
        assert bias[1] < 1e-10
    else:
        assert bias[0] > 5 * bias[1] > 1e-4


# Steps and perturbations


def test_lopa_local_is_off_by_as_much_as_its_step():
    """Its limit solves (I − W + a W G) x = −a W h, with the affine hypergradients G_i x + h_i of all agents."""
    pieces = DEFINITE.personal_hypergradients()
    blocks = np.zeros((8, 2, 8, 2))
    blocks[np.arange(8), :, np.arange(8)] = [G for G, _ in pieces]
    mix, G, h = np.kron(W, np.eye(2)), blocks.reshape(16, 16), np.concatenate([h for _, h in pieces])
    scales = 2.0 ** -np.arange(6)

    def last(scale):
        method = make(decentralized.lopa_local, sample=full, momentum=0.5, step_sizes=(scale * 0.05, 0.1, 0.1))
        return roll(method, DEFINITE.batch, 10_000)[0].x

    x = numbers(jax.jit(jax.vmap(last))(jnp.asarray(scales)))
    for got, a in zip(x, 0.05 * scales, strict=True):
        expected = -np.linalg.solve(np.eye(16) - mix + a * mix @ G, a * mix @ h)
        assert off(got, expected.reshape(8, 2)) < 1e-10
    bias = np.array([off(one, POINTS["x_p"]) for one in x])
    ratios = bias[1:] / bias[:-1]
    assert np.all(np.diff(ratios) < 0)
    assert 0.5 < ratios[-1] < 0.55


def test_differences_of_gradients_are_products_of_a_quadratic():
    def path(delta):
        return roll(make(decentralized.dsoba_first_order, momentum=0.5, mu=delta), DEFINITE.batch, 200)[1]

    got = numbers(jax.jit(jax.vmap(path))(jnp.array([1e-3, 0.5, 10.0])))
    expected = numbers(jax.jit(lambda: roll(make(decentralized.dsoba, momentum=0.5), DEFINITE.batch, 200)[1])())
    for row in range(3):
        close(at(got, row), expected, 1e-9)


def test_differences_of_gradients_are_off_by_delta_squared():
    """δ²/6 times the third derivative along v: of g = exp(y) sin(x) this is known, in d_v and in d_x."""
    problem = bx.BilevelProblem(lambda x, y, c: c * x * y, lambda x, y, c: jnp.exp(y) * jnp.sin(x))
    x, y, v = 0.3, 0.2, 1.5
    exact = bx.single_loop.local_directions.second_order().evaluate(problem, x, y, v, bx.Batch(2.0, 0.0))
    for delta in (0.02, 0.01):
        d = bx.single_loop.local_directions.first_order(delta).evaluate(problem, x, y, v, bx.Batch(2.0, 0.0))
        size = delta**2 / 6 * v**3 * np.exp(y)
        assert d.v - exact.v == pytest.approx(size * np.sin(x), rel=1e-3)
        assert d.x - exact.x == pytest.approx(-size * np.cos(x), rel=1e-3)
        assert d.y == exact.y


# Local Hessians of which the mean alone is positive definite


def test_indefinite_agents_do_no_harm_where_the_mean_is_what_counts():
    methods = {
        "gbdsbo": (make(decentralized.gbdsbo, step_sizes=STEPS), INDEFINITE.x_star),
        "gbdsbo_factors": (
            make(decentralized.gbdsbo, sample=full, terms=3, inverse_step=0.25, step_sizes=STEPS),
            Quadratic.local_inverse(
                Quadratic(*(leaf.mean(0, keepdims=True) for leaf in INDEFINITE)), neumann(terms=3, step_size=0.25)
            ),
        ),
        "ma_dsbo": (make(decentralized.ma_dsbo, steps=2, v_steps=2, track=True, step_sizes=STEPS), INDEFINITE.x_star),
        "c2dfb": (
            make(decentralized.c2dfb, steps=3, multiplier=100.0, compressor=whole, gossip_step=0.5, step_sizes=STEPS),
            INDEFINITE.penalized(100.0),
        ),
    }
    for name, (method, x) in methods.items():
        assert off(end(method, INDEFINITE).x, x) < 1e-10, name


def test_indefinite_agents_break_methods_that_invert_their_own_hessian():
    """A Neumann series of such a Hessian grows with its terms, and a lower level of one's own has no minimum."""
    for method in (
        make(decentralized.mdbo, sample=full, momentum=0.5, rate=1.0, terms=20, inverse_step=0.1, step_sizes=STEPS),
        make(decentralized.interact, terms=20, inverse_step=0.1, step_sizes=STEPS),
    ):
        assert not np.all(np.isfinite(end(method, INDEFINITE).x))
    assert off(end(make(decentralized.lopa_tracking, step_sizes=STEPS), INDEFINITE).x, 0.0) > 1e6


# Other graphs


DIRECTED = 0.4 * np.eye(8) + 0.3 * np.roll(np.eye(8), 1, 0)
DIRECTED = DIRECTED + 0.3 * np.eye(8)[:, (2 * np.arange(8) + 1) % 8]  # columns sum to 1, rows do not


@pytest.mark.parametrize("name", ["gbdsbo", "ma_dsbo_tracked", "mdbo"])
def test_limits_over_a_directed_graph(name):
    gossip = bx.agents.push_sum(bx.topology.from_matrix(DIRECTED))
    assert np.ptp(DIRECTED.sum(1)) > 0.5
    presets = {
        "gbdsbo": lambda: make(decentralized.gbdsbo, gossip=gossip, step_sizes=(0.02, 0.05, 0.05)),
        "ma_dsbo_tracked": lambda: make(
            decentralized.ma_dsbo, steps=2, v_steps=2, track=True, gossip=gossip, step_sizes=(0.02, 0.05, 0.05)
        ),
        "mdbo": lambda: make(
            decentralized.mdbo, gossip, (0.02, 0.05, 0.05), sample=full, momentum=0.5, rate=1.0, **EXACT
        ),
    }
    assert off(end(presets[name]()).x, POINTS[LIMITS[name][0]]) < 1e-10


def test_a_series_over_a_directed_graph_is_that_of_the_mean_hessian():
    """Of sums that are not divided by their weights it would be another one: (I − c ω A)^q."""
    options = {"sample": full, "terms": 2, "inverse_step": 0.1, "step_sizes": (0.02, 0.05)}
    method = make(decentralized.gbdsbo, gossip=bx.agents.push_sum(bx.topology.from_matrix(DIRECTED)), **options)
    assert off(end(method).x, Quadratic.local_inverse(MEAN, neumann(terms=2, step_size=0.1))) < 1e-10


# Trajectories


@pytest.mark.parametrize("name", ["lopa_local", "lopa_tracking"])
def test_lopa_follows_its_recursion(name):
    preset = getattr(decentralized, name)
    moves = [networks.none() if name == "lopa_local" else networks.semi(), networks.local(), networks.local()]
    _, path, info = networks.run(make(preset, sample=full, momentum=0.3, step_sizes=STEPS), DEFINITE.batch, 60)
    close(path, stacked(simulate(DEFINITE, moves, STEPS, W, 60, theta=0.3)), 1e-12)
    per_neighbour = 8 * 2 * (1 if name == "lopa_local" else 2)
    np.testing.assert_array_equal(info.bytes, np.full((60, 8), 2 * per_neighbour))
    np.testing.assert_array_equal(info.rounds, np.ones(60))


def two_levels(q, moves, steps, iterations, inverse, a=1.0, rate=1.0):
    """The trajectory of x and y along moving averages of ∇_y g and of the hypergradient with `inverse(A_i)`."""
    inverses = np.stack([inverse(A) for A in q.A])
    x, y = np.zeros((8, 2)), np.zeros((8, 3))
    path, u = [(x, y)], None
    for _ in range(iterations):
        v = np.einsum("nij,nj->ni", inverses, -networks.direction_v(q, x, y, 0 * y))
        new = networks.direction_x(q, x, y, v), networks.direction_y(q, x, y)
        u = new if u is None else [(1 - a) * old + a * d for old, d in zip(u, new, strict=True)]
        mixed = [move(W, s, d, step) for move, s, d, step in zip(moves, (x, y), u, steps[:2], strict=True)]
        x, y = (s + rate * (m - s) for s, m in zip((x, y), mixed, strict=True))
        path.append((x, y))
    return stacked(path)


def test_mdbo_and_interact_follow_their_recursions():
    for method, moves, weights in (
        (
            make(
                decentralized.mdbo,
                sample=full,
                momentum=0.3 / 0.6**2,
                rate=0.6,
                terms=4,
                inverse_step=0.1,
                step_sizes=STEPS,
            ),
            [networks.non_atc(), networks.non_atc()],
            (0.3, 0.6),
        ),
        (
            make(decentralized.interact, terms=4, inverse_step=0.1, step_sizes=STEPS),
            [networks.non_atc(), networks.local()],
            (1.0, 1.0),
        ),
        (
            make(decentralized.interact, terms=4, inverse_step=0.1, correction=GT(), step_sizes=STEPS),
            [networks.semi(), networks.local()],
            (1.0, 1.0),
        ),
    ):
        _, path, _ = networks.run(method, INDEFINITE.batch, 40)
        close(path[:2], two_levels(INDEFINITE, moves, STEPS, 40, neumann(terms=4, step_size=0.1), *weights), 1e-12)


def test_gbdsbo_follows_its_recursion():
    """All of q is tracked, and every agent inverts its own tracker of the Hessian."""
    q, expected = INDEFINITE, [(np.zeros((8, 2)), np.zeros((8, 3)))]
    mixed, last = [0.0] * 5, [0.0] * 5
    for _ in range(20):
        x, y = expected[-1]
        outer_y = -networks.direction_v(q, x, y, 0 * y)
        own = networks.direction_x(q, x, y, 0 * y), outer_y, networks.direction_y(q, x, y), q.B, q.A
        t = [m + new - old for m, new, old in zip(mixed, own, last, strict=True)]
        mixed, last = [np.tensordot(W, one, 1) for one in t], own
        v = np.stack([neumann(terms=2, step_size=0.1)(A) @ b for A, b in zip(t[4], t[1], strict=True)])
        d = t[0] + np.einsum("nji,nj->ni", t[3], v)
        expected.append((W @ (x - STEPS[0] * d), W @ (y - STEPS[1] * t[2])))
    _, path, _ = networks.run(
        make(decentralized.gbdsbo, sample=full, terms=2, inverse_step=0.1, step_sizes=STEPS), q.batch, 20
    )
    close(path[:2], stacked(expected), 1e-12)


def test_local_correction_sends_nothing():
    """Every agent descends alone: the lower levels of LoPA, and all levels of agents that never meet."""
    method = single_loop(PROBLEM, LAZY_RING, STEPS, bx.single_loop.estimator.full(), correction.local())
    _, path, info = networks.run(method, DEFINITE.batch, 60)
    expected = simulate(DEFINITE, [networks.local() for _ in range(3)], STEPS, lazy(ring(8)), 60)
    close(path, stacked(expected), 1e-13)
    assert not np.any(info.bytes)
    assert not np.any(info.rounds)


# Noise


def noisy(key, t, data):
    """Gradients with noise of their own: both directions of one draw are wrong by the same amount."""
    width = 0.1 * 3**0.5  # of a uniform draw with the standard deviation 0.1, whose program is short
    errors = {
        name: jax.random.uniform(key, data[name].shape, float, -width, width) for name in data.keys() & {"c", "e", "r"}
    }
    return data | {name: data[name] + error for name, error in errors.items()}


def spread(method, iterations=1000):
    """Root mean square distance of the mean x from its own average, over the second half of a run with noise."""
    _, path, info = networks.run(method, DEFINITE.batch, iterations)
    assert not np.any(info.breakdown)
    tail = numbers(path[0])[iterations // 2 :].mean(1)
    return np.sqrt(((tail - tail.mean(0)) ** 2).sum(-1).mean())


def test_recursive_momentum_leaves_less_noise_than_momentum():
    """At one weight of the new direction: without the lag of a moving average, which lets noise swing up."""
    choices = {"sample": noisy, "momentum": 0.02, "rate": 1.0, "terms": 3, "inverse_step": 0.2}
    got = {name: spread(make(getattr(decentralized, name), **choices)) for name in ("mdbo", "vrdbo")}
    assert 1e-4 < got["vrdbo"] < 0.3 * got["mdbo"]
