"""The engine: reports, schedules, transformations of JAX and of optax, networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BATCH, DEFINITE, KEY, LAZY_RING, TOY_RING, TOY_STEPS, X, Y, all_directions, at, semi, toy_run
from networks import at_solution, close, numbers, ring, roll, run, simulate, stacked

import bilevax as bx
from bilevax import coins, decentralized
from bilevax.single_loop import correction
from bilevax.testing.problems import four_agents
from bilevax.testing.problems._quadratic import PROBLEM


def test_moves_are_lengths_of_displacements():
    path, info = toy_run()
    for level, move in zip(path, info.moves, strict=True):
        np.testing.assert_allclose(move, np.linalg.norm(np.diff(level, axis=0), axis=-1), rtol=1e-6)


def test_breakdown_names_the_agents_that_are_not_finite():
    batch = four_agents().batch
    batch.outer["r"] = batch.outer["r"].at[2].set(jnp.nan)
    path, info = toy_run(batch=batch)
    finite = np.all([np.isfinite(level[1:, :, 0]) for level in path], axis=0)
    np.testing.assert_array_equal(info.breakdown, ~finite)
    assert info.breakdown[0, 2]
    assert np.all(info.breakdown[-1])


@pytest.mark.compiles(90)  # eager is its subject
def test_step_outside_jit_is_the_same_step():
    method = decentralized.sldbo(PROBLEM, TOY_RING, TOY_STEPS)
    state, _ = method.step(None, method.init(X, Y), BATCH)
    close((state.x, state.y, state.v), [level[1] for level in toy_run()[0]], 1e-15)


def test_vmap_over_step_sizes():
    def path(scale):
        return roll(decentralized.sldbo(PROBLEM, TOY_RING, bx.Levels(*(scale * a for a in TOY_STEPS))), BATCH, 20)[1]

    scales = (0.5, 1.0)
    got = jax.jit(jax.vmap(path))(jnp.array(scales))
    for row, scale in enumerate(scales):
        expected = simulate(four_agents(), semi(), [scale * a for a in TOY_STEPS], ring(4), 20)
        close(at(got, row), stacked(expected), 1e-13)


def test_schedules_and_transformations_per_level():
    """A schedule, a number, and a clipping by the norm of each agent's own direction."""
    schedule = optax.exponential_decay(0.05, 1, 0.5)
    clip = optax.chain(optax.clip_by_global_norm(0.1), optax.scale(-0.1))
    method = decentralized.sldbo(PROBLEM, TOY_RING, (schedule, 0.1, clip), correction=correction.none())
    path, _ = toy_run(method)
    x, y, v = all_directions(four_agents(), path, 4)
    v = v * np.minimum(1, 0.1 / np.abs(v).clip(1e-30))
    for k in range(4):
        for level, d, a in zip(path, (x, y, v), (0.05 * 0.5**k, 0.1, 0.1), strict=True):
            np.testing.assert_allclose(level[k + 1], ring(4) @ (level[k] - a * d[k]), rtol=0, atol=1e-8)


def test_adam_on_tracked_directions_converges():
    adam = optax.adam(optax.exponential_decay(0.05, 100, 0.5))
    _, path, _ = run(decentralized.sldbo(PROBLEM, LAZY_RING, adam), DEFINITE.batch, 2500)
    at_solution(path, DEFINITE, 1e-4)


def test_parameters_of_a_network_descend():
    """A ridge weight x and a small flax network y for every agent."""
    from flax import linen

    network = linen.Sequential([linen.Dense(4), jnp.tanh, linen.Dense(1)])
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 2)))
    data = inputs, jnp.sin(inputs.sum(-1, keepdims=True))

    def fit(x, params, data):
        return jnp.mean((network.apply(params, data[0]) - data[1]) ** 2)

    def ridge(x, params, data):
        return fit(x, params, data) + jnp.exp(x) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    method = decentralized.s3ldbo(
        bx.BilevelProblem(fit, ridge), TOY_RING, (0.05, 0.1, 0.02), coins=coins.subset(0.5), radius=5.0
    )
    batch = bx.Batch(data, data)

    @jax.jit
    def train(params):
        state = method.init(bx.replicate(jnp.array(-2.0), 4), bx.replicate(params, 4), batch)
        keys = jax.random.split(KEY, 300)
        end, info = jax.lax.scan(lambda s, k: method.step(k, s, batch), state, keys)
        losses = [jnp.mean(jax.vmap(fit)(s.x, s.y, data)) for s in (state, end)]
        return losses, end, info

    losses, end, info = train(jax.jit(network.init)(jax.random.key(1), inputs[0]))
    assert losses[1] < 0.7 * losses[0]
    assert end.x.mean() < -2.1
    assert not np.any(info.breakdown)


def test_ids_that_are_not_held_here_are_left_out():
    def calls_and_path(choice):
        method = decentralized.s3ldbo(PROBLEM, TOY_RING, TOY_STEPS, coins=lambda key, k, gossip: choice)
        _, path, info = run(method, BATCH, 5)
        return numbers(path), info.calls.cross_products

    ids, calls = calls_and_path(np.array([1, 7, -1]))
    mask, _ = calls_and_path(np.arange(4) == 1)
    close(ids, mask, 1e-15)
    np.testing.assert_array_equal(calls, [[0, 1, 0, 0]] * 5)


def test_samples_of_f_and_g_and_of_agents_are_drawn_apart():
    """Of one data set for both losses and for all agents: no two of eight samples share more than chance."""
    rows = jnp.broadcast_to(jnp.arange(1000), (4, 1000))
    draw = jax.jit(
        lambda key, data: bx.single_loop.estimator.draw(key, bx.sampling.minibatch(50), 0, data, jnp.arange(4))
    )
    samples = np.concatenate(draw(KEY, bx.Batch(rows, rows)))
    shared = (samples[:, None] == samples).mean(-1) - np.eye(8)
    assert shared.max() < 0.1
