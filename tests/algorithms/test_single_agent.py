"""The methods of one agent: x and y without an agents' axis, against the closed form of a quadratic over examples."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from networks import numbers

import bilevax as bx
from bilevax.testing.problems import Quadratic, quadratic
from bilevax.testing.problems._quadratic import inner_loss, outer_loss

STEPS = (0.02, 0.05, 0.05)
DATA = quadratic(5, n=12)  # its leading axis counts examples here
EXACT = DATA.solution
START = jnp.array([0.3, -0.2]), jnp.array([0.1, 0.4, -0.5])
MINIBATCH = bx.sampling.minibatch(4)


def over_examples(loss):
    return lambda x, y, batch: jnp.mean(jax.vmap(loss, (None, None, 0))(x, y, batch))


PROBLEM = bx.BilevelProblem(over_examples(outer_loss), over_examples(inner_loss))
METHODS = {
    "soba": bx.algorithms.soba(PROBLEM, STEPS),
    "soba_minibatch": bx.algorithms.soba(PROBLEM, STEPS, sample=MINIBATCH),
    "saba": bx.algorithms.saba(PROBLEM, STEPS, blocks=4),
    "sustain": bx.algorithms.sustain(PROBLEM, STEPS, sample=bx.sampling.full),
    "sustain_minibatch": bx.algorithms.sustain(PROBLEM, STEPS, sample=MINIBATCH, momentum=0.05),
}


@functools.cache
def run(name):
    """(start, path, infos) of 1,500 iterations; the path has leaves [iterations, ...]."""
    method = METHODS[name]

    def step(state, key):
        state, info = method.step(key, state, DATA.batch)
        return state, ((state.x, state.y, state.v), info)

    @jax.jit
    def scan(x, y):
        state = method.init(x, y, DATA.batch)
        return (state.x, state.y, state.v), *jax.lax.scan(step, state, jax.random.split(networks.KEY, 1500))[1]

    return numbers(scan(*START))


@pytest.mark.parametrize("name", METHODS)
def test_trajectory_limit_and_declared_cost(name):
    start, path, info = run(name)
    if name in ("soba", "sustain"):
        descends_along_the_three_directions(start, path)
    if not name.endswith("minibatch"):
        for level, expected in zip(path, EXACT, strict=True):
            np.testing.assert_allclose(level[-1], expected, rtol=0, atol=1e-10)
    for level, one in zip(path, start, strict=True):
        assert level.shape == (1500, *one.shape)
    for leaf in jax.tree.leaves(info):
        assert leaf.shape == (1500,)
    for count in info.calls:
        np.testing.assert_array_equal(count, 2 if name.startswith("sustain") else 1)
    assert np.all(info.bytes == 0)
    assert not np.any(info.breakdown)


def descends_along_the_three_directions(start, path):
    mean = Quadratic(*(leaf[None] for leaf in DATA.mean))
    moves = [networks.none() for _ in range(3)]
    expected = networks.simulate(mean, moves, STEPS, np.eye(1), 60, tuple(leaf[None] for leaf in start))
    networks.close([level[:60] for level in path], [np.stack([p[i][0] for p in expected[1:]]) for i in range(3)], 1e-13)


def test_minibatches_end_near_the_solution_and_recursive_momentum_nearer():
    error = {}
    for name in ("soba_minibatch", "sustain_minibatch"):
        start, path, _ = run(name)
        error[name] = np.sqrt(np.mean((path[0][-500:] - EXACT[0]) ** 2))
        assert 1e-4 < error[name] < 0.3 * np.sqrt(np.mean((start[0] - EXACT[0]) ** 2))
    assert error["sustain_minibatch"] < 0.7 * error["soba_minibatch"]


def test_numbers_are_points_too():
    problem = bx.BilevelProblem(lambda x, y, batch: (y - 1) ** 2, lambda x, y, batch: (y - x) ** 2)
    method = bx.algorithms.soba(problem, bx.Levels(0.1, 0.5, 0.5))
    state = method.init(0.0, 2.0)
    state, info = jax.jit(method.step)(None, state, bx.Batch(None, None))
    # d_x = −∇²_xy g v = 0, d_y = 2 (2 − 0), d_v = −2 (2 − 1) at v = 0
    assert [float(value) for value in (state.x, state.y, state.v)] == [0.0, 0.0, 1.0]
    assert [float(value) for value in info.moves] == [0.0, 2.0, 1.0]


def keyed(key, name, method=None):
    """One abstract step of a method from the state of `name`."""

    def step():
        state = jax.eval_shape(METHODS[name].init, *START, DATA.batch)
        jax.eval_shape(functools.partial((method or METHODS[name]).step, key), state, DATA.batch)

    return step


BAD = {
    "blocks_no_divisor": (r"blocks.*5.*12", keyed(networks.KEY, "saba", bx.algorithms.saba(PROBLEM, STEPS, blocks=5))),
    "no_blocks": ("blocks", lambda: bx.algorithms.saba(PROBLEM, STEPS, blocks=0)),
    "no_key_for_blocks": ("key", keyed(None, "saba")),
    "no_key_for_a_minibatch": ("key", keyed(None, "soba_minibatch")),
    "two_step_sizes": ("step_sizes", lambda: bx.algorithms.soba(PROBLEM, (0.1, 0.1))),
    "momentum": (r"^momentum.*1\.5", lambda: bx.algorithms.sustain(PROBLEM, STEPS, sample=MINIBATCH, momentum=1.5)),
    "integer_x": ("int", lambda: METHODS["soba"].init(jnp.zeros(2, int), START[1])),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    message, call = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
