"""DSVRBGD, SPIDER and PAGE follow their recursions, with their own previous points; D-SOBA keeps its bias."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from cases import DEFINITE, INDEFINITE, LAZY_RING, STEPS, W, at, mean_dynamics
from networks import at_solution, close, numbers, roll, run, stacked

import bilevax as bx
from bilevax import decentralized
from bilevax.single_loop import correction, estimator, single_loop
from bilevax.testing.problems import Quadratic
from bilevax.testing.problems._quadratic import PROBLEM, inner_loss, outer_loss


def noisy(q, iterations, noise):
    """Coefficients [n, iterations, ...], of which iteration t reads row t; `noise` names those that change."""
    rng = np.random.default_rng(3)

    def draw(name, leaf):
        change = 0.3 * rng.normal(size=(len(leaf), iterations, *leaf.shape[1:]))
        if name in "AQR":
            change = change + np.swapaxes(change, -1, -2)
        return leaf[:, None] + (name in noise) * change

    return Quadratic(*(draw(name, leaf) for name, leaf in zip(q._fields, q, strict=True)))


KINDS = "simultaneous", "alternating"
RATE = 0.6
PAPERS = correction.tracking_non_atc(RATE)  # damped, and mixed before it moves


def dsvrbgd(kind, a, rate=RATE, sample=bx.sampling.per_step, form=PAPERS):
    """With the momentum a = α η² itself."""
    options = {"momentum": a / rate**2, "rate": rate, "alternating": kind == "alternating", "correction": form}
    return decentralized.dsvrbgd(PROBLEM, LAZY_RING, STEPS, sample=sample, **options)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def noisy_run(kind, batch, momenta, rate=RATE, form=PAPERS):
    return jax.vmap(lambda a: roll(dsvrbgd(kind, a, rate, form=form), batch, 30)[:2])(momenta)


MOMENTA = jnp.array([0.0, 0.1, 1.0])
OF_EACH_LEVEL = bx.Levels(correction.tracking(), correction.exact_diffusion(), correction.exact_diffusion())
FOLLOWED = {  # rate, correction, its recursions, and the rate that damps
    "simultaneous-papers": (RATE, PAPERS, [networks.non_atc] * 3, RATE),
    "alternating-papers": (RATE, PAPERS, [networks.non_atc] * 3, RATE),
    "simultaneous-damped": (RATE, None, [networks.semi] * 3, RATE),
    "alternating-own": (RATE, OF_EACH_LEVEL, [networks.semi, *[networks.exact_diffusion] * 2], 1.0),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_dsvrbgd_follows_its_recursion_for_any_samples(name):
    """A correction of one's own takes the place of the damping, and leaves a = α η² as it is."""
    (rate, form, recursions, damping), kind = FOLLOWED[name], name.split("-")[0]
    data = noisy(INDEFINITE, 30, noise="ABcQeRrS")
    _, path = noisy_run(kind, data.batch, MOMENTA, rate, form)
    samples = [Quadratic(*(leaf[:, t] for leaf in data)) for t in range(30)]
    for row, a in enumerate(MOMENTA):
        forms = [make() for make in recursions]
        expected = networks.storm_recursion(samples, W, STEPS, float(a), damping, kind == "alternating", forms)
        close(at(path, row), stacked(expected), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_momentum_freezes_the_error_of_additive_noise(kind):
    """One sample at both points: the first error stays for ever. A fresh one at the second would make it walk."""
    data = noisy(INDEFINITE, 30, noise="cer")
    state, path = at(numbers(noisy_run(kind, data.batch, MOMENTA)), 0)
    origin = tuple(np.zeros((8, d)) for d in (2, 3, 3))
    first = networks.directions(Quadratic(*(leaf[:, 0] for leaf in data)), origin)
    errors = [got - d for got, d in zip(first, networks.directions(INDEFINITE, origin), strict=True)]
    assert min(np.abs(error).max() for error in errors) > 0.1

    def exact(k):
        (x, y, v), (_, new_y, new_v) = at(path, k), at(path, k + 1)
        if kind == "simultaneous":
            return networks.directions(INDEFINITE, (x, y, v))
        d_y, d_v = networks.direction_y(INDEFINITE, x, y), networks.direction_v(INDEFINITE, x, new_y, v)
        return networks.direction_x(INDEFINITE, x, new_y, new_v), d_y, d_v

    estimates = [[d + e for d, e in zip(exact(k), errors, strict=True)] for k in range(30)]
    mean_dynamics(path, stacked(estimates), [RATE * a for a in STEPS])
    order = (0, 1, 2) if kind == "simultaneous" else (1, 2, 0)
    close(state.estimators, [estimates[-1][level] for level in order], 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_dsvrbgd_without_noise_reaches_the_solution_whatever_its_momentum(kind):
    def path(a):
        return roll(dsvrbgd(kind, a, 1.0, bx.sampling.full, None), INDEFINITE.batch, 2500)[1]

    got = numbers(jax.jit(jax.vmap(path))(MOMENTA))
    for row in range(3):
        at_solution(at(got, row), INDEFINITE)
        close(at(got, row, slice(50)), at(got, 0, slice(50)), 1e-12)


# SPIDER and PAGE


def over_examples(loss):
    return lambda x, y, batch: jnp.mean(jax.vmap(loss, (None, None, 0))(x, y, batch))


def one_in_turn(key, t, data):
    return jax.tree.map(lambda leaf: leaf[t % 4][None], data)


@pytest.mark.parametrize("kind", ["spider", "page"])
def test_recursive_estimates_restart_from_the_exact_directions(kind):
    """u = d(s) when an iteration counts one evaluation, u + d(s; ξ) − d(previous s; ξ) when it counts two."""
    problem = bx.BilevelProblem(over_examples(outer_loss), over_examples(inner_loss))
    restarts = {
        "spider": estimator.spider(every=3, sample=one_in_turn),
        "page": estimator.page(probability=0.3, sample=one_in_turn),
    }
    data = noisy(DEFINITE, 4, noise="ABcQeRrS")
    method = single_loop(problem, LAZY_RING, STEPS, restarts[kind], correction.none())
    start = tuple(jnp.zeros((8, d)) for d in (2, 3))
    _, path, info = numbers(run(method, data.batch, 20, start))
    mean = Quadratic(*(leaf.mean(1) for leaf in data))
    samples = [Quadratic(*(leaf[:, t] for leaf in data)) for t in range(4)]
    exact = info.calls.outer_gradients == 1
    np.testing.assert_array_equal(info.calls.cross_products, np.where(exact, 1, 2))
    for k in range(20):
        point, last = at(path, k), at(path, k - 1)
        if exact[k, 0]:
            u = networks.directions(mean, point)
        else:
            now, then = (networks.directions(samples[k % 4], s) for s in (point, last))
            u = [u + a - b for u, a, b in zip(u, now, then, strict=True)]
        for level, d, a in zip(path, u, STEPS, strict=True):
            np.testing.assert_allclose(level[k + 1], W @ (level[k] - a * d), rtol=0, atol=1e-13)
    assert exact[0].all()
    if kind == "spider":
        np.testing.assert_array_equal(exact[:, 0], np.arange(20) % 3 == 0)
    assert 1 < exact[:, 0].sum() < 12


def test_dsoba_keeps_a_bias_that_is_about_linear_in_the_step():
    """And none where the agents are alike; with a moving average of d_x in between."""
    alike = Quadratic(*(np.broadcast_to(leaf.mean(0), leaf.shape) for leaf in DEFINITE))
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[DEFINITE.batch] * 3, alike.batch)

    def final(scale, batch):
        method = decentralized.dsoba(PROBLEM, LAZY_RING, tuple(2 * scale * a for a in STEPS), momentum=0.5)
        return roll(method, batch, 6000)[1]

    path = numbers(jax.jit(jax.vmap(final))(jnp.array([1.0, 0.5, 0.25, 1.0]), batches))
    bias = np.linalg.norm(path[0][:3, -1].mean(1) - DEFINITE.x_star, axis=1)
    assert bias[0] > 1e-3
    ratios = bias[1:] / bias[:-1]
    assert np.all((ratios > 0.4) & (ratios < 0.8))
    at_solution(at(path, 3), DEFINITE)
