"""SPARKLE: its primal-dual form with three matrices, mixed corrections, their limits, and single precision."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from networks import at_solution, close, lazy, numbers, ring, roll, run, simulate, stacked, topology

import bilevax as bx
from bilevax import decentralized
from bilevax.single_loop import JACOBI, correction
from bilevax.testing.problems import quadratic
from bilevax.testing.problems._quadratic import PROBLEM

STEPS = (0.01, 0.025, 0.025)
DEFINITE, INDEFINITE = quadratic(0), quadratic(0, indefinite=2.5)
W = lazy(ring(8))
LAZY_RING = bx.gossip(topology(W))


def sparkle(forms, theta=1.0, gossip=LAZY_RING, step_sizes=STEPS, **choices):
    corrections = bx.Levels(*(getattr(correction, form)() for form in forms))
    return decentralized.sparkle(PROBLEM, gossip, step_sizes, correction=corrections, momentum=theta, **choices)


@pytest.mark.parametrize("form", networks.PRACTICAL)
def test_literal_and_practical_recursions_agree(form):
    """The two oracles of the test above, with no package in between."""
    paths = [
        simulate(DEFINITE, [table[form]() for _ in range(3)], STEPS, W, 60)
        for table in (networks.LITERAL, networks.PRACTICAL)
    ]
    close(stacked(paths[0]), stacked(paths[1]), 1e-11)


START = tuple(np.tile(leaf, (8, 1)) for leaf in (np.array([0.3, -0.2]), np.array([0.1, 0.4, -0.5]), np.zeros(3)))
THETAS = (1.0, 0.2)


def paths(forms, iterations=1500, **choices):
    """Trajectories with and without a moving average of d_x, on the definite and the indefinite problem."""
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), DEFINITE.batch, INDEFINITE.batch)

    def path(batch, theta):
        return roll(sparkle(forms, theta, **choices), batch, iterations, start=START[:2])[1]

    return numbers(jax.jit(jax.vmap(jax.vmap(path, (0, None)), (None, 0)))(batches, jnp.array(THETAS)))


def follows(path, forms, gauss_seidel=True):
    """s⁺ = A (C s − a d) − B q, q⁺ = q + B s⁺ from a common start, for a moving average of d_x too."""
    for row, theta in enumerate(THETAS):
        for table, atol in ((networks.LITERAL, 1e-9), (networks.PRACTICAL, 1e-12)):
            recursions = [table[form]() for form in forms]
            expected = stacked(simulate(INDEFINITE, recursions, STEPS, W, 60, START, theta, gauss_seidel))
            close([level[row, 1, :61] for level in path], expected, atol)


FORMS = [  # each of the five on each level
    ("exact_diffusion", "extra", "tracking"),
    ("tracking_atc", "tracking_non_atc", "exact_diffusion"),
    ("extra", "tracking", "tracking_atc"),
    ("tracking", "exact_diffusion", "tracking_non_atc"),
    ("tracking_non_atc", "tracking_atc", "extra"),
]


def at_solutions(path):
    for row in range(2):
        for column, q in enumerate((DEFINITE, INDEFINITE)):
            at_solution([level[row, column] for level in path], q)


@pytest.mark.parametrize("forms", FORMS, ids="-".join)
def test_any_correction_is_its_primal_dual_form_and_goes_to_the_solution(forms):
    path = paths(forms)
    follows(path, forms)
    at_solutions(path)


def test_order_does_not_change_the_limit():
    forms = ("tracking", "exact_diffusion", "extra")
    path = paths(forms, order=JACOBI)
    follows(path, forms, gauss_seidel=False)
    at_solutions(path)


@pytest.mark.parametrize("level", range(3), ids=["x", "y", "v"])
def test_one_uncorrected_level_leaves_a_bias(level):
    forms = ["exact_diffusion"] * 3
    forms[level] = "none"
    path = paths(tuple(forms))
    follows(path, forms)
    for column, q in enumerate((DEFINITE, INDEFINITE)):
        x = q.x_star
        bias = np.abs(path[0][:, column, -1] - x).max((1, 2))
        assert np.all(bias > 1e-3)
        assert np.all(np.isfinite(bias))


def test_each_level_has_a_graph_of_its_own():
    graphs = bx.Levels(*(bx.gossip(topology(matrix)) for matrix in (W, networks.complete(8), lazy(lazy(ring(8))))))
    method = sparkle(("tracking", "exact_diffusion", "extra"), gossip=graphs)
    _, path, info = run(method, INDEFINITE.batch, 2500)
    at_solution(path, INDEFINITE)
    x, y, v = 2 * 2, 3, 3
    np.testing.assert_array_equal(info.bytes[0], np.full(8, 8 * (2 * x + 7 * y + 2 * v)))


def test_mean_follows_the_mean_direction():
    """Mean s⁺ = mean s − step · mean d at every step of exact diffusion and EXTRA."""
    forms = ("exact_diffusion", "extra", "exact_diffusion")
    path = numbers(run(sparkle(forms, order=JACOBI), INDEFINITE.batch, 60)[1])
    for k in range(60):
        d = networks.directions(INDEFINITE, [level[k] for level in path])
        for level, direction, a in zip(path, d, STEPS, strict=True):
            np.testing.assert_allclose((level[k + 1] - level[k]).mean(0), -a * direction.mean(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", ["exact_diffusion", "extra"])
def test_single_precision_does_not_drift(form):
    """20,000 steps of float32 end near where float64 ends; the recursions in s itself are off by 4e-3 there."""
    q = quadratic(0)
    with jax.enable_x64(False):
        method = sparkle((form,) * 3)
        batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), q.batch)

        @jax.jit
        def end(batch):
            state = method.init(*networks.zeros(batch), batch)
            return jax.lax.fori_loop(0, 20_000, lambda _, state: method.step(None, state, batch)[0], state)

        state = end(batch)
    assert state.x.dtype == jnp.float32
    for got, expected in zip((state.x, state.y, state.v), q.solution, strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=0, atol=1e-5)
