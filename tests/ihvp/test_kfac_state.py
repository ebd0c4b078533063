"""Factors that live from one outer step to the next, transformations of JAX, and arguments that do not fit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from kfac_cases import DAMPING, INPUTS, KEY, LABELS, C, D, N, Y, dense_solve, factors, make, normal

import bilevax as bx
from bilevax import curvature
from bilevax.curvature import fisher

B, BATCH = jax.tree.map(np.sin, Y), (INPUTS, LABELS)
STEPS = 7
BATCHES = (np.asarray(normal(7, STEPS, N, D)), np.arange(STEPS * N).reshape(STEPS, N) ** 2 % C)
SCALES = np.linspace(0.5, 1.5, STEPS)
POINTS = jax.tree.map(lambda leaf: np.asarray(leaf)[None] * SCALES.reshape((-1,) + (1,) * leaf.ndim), Y)
SOFTMAX = make(weights=lambda x, batch: jnp.exp(batch[0][:, 0]))


class Factors(NamedTuple):
    A: np.ndarray
    B: np.ndarray


def kfac(**choices):
    return bx.ihvp.kfac(damping=DAMPING, **{"fisher": fisher.exact, **choices})


def at(tree, step):
    return jax.tree.map(lambda leaf: leaf[step], tree)


def sequence(ihvp, points=POINTS, batches=BATCHES):
    """v of B at each step, with the state handed on, as one scan."""

    @jax.jit
    def run(points, batches):
        def step(state, current):
            apply, state = ihvp.prepare(KEY, state, SOFTMAX, (None, *current))
            return state, ravel_pytree(apply(B)[0])[0]

        begin = ihvp.init(None, at(points, 0), at(batches, 0), SOFTMAX)
        return jax.lax.scan(step, begin, (points, batches))[1]

    return np.asarray(run(points, batches))


@pytest.fixture(scope="module")
def fresh():
    """v of B at each step without memory."""
    return sequence(kfac())


@pytest.mark.parametrize(
    ("choices", "from_step"),
    [
        ({"factors_every": 2}, [0, 0, 2, 2, 4, 4, 6]),
        ({"factors_every": 2, "inverse_every": 3}, [0, 0, 0, 2, 2, 2, 6]),
        ({"factors_every": lambda step: (step == 0) | (step == 4)}, [0, 0, 0, 0, 4, 4, 4]),
        ({"inverse_every": lambda step: step % 5 == 0}, [0, 0, 0, 0, 0, 5, 5]),
    ],
    ids=["factors", "both", "function_factors", "function_inverse"],
)
def test_schedules(fresh, choices, from_step):
    np.testing.assert_allclose(sequence(kfac(**choices)), fresh[np.array(from_step)], rtol=1e-10)


def test_moving_averages_of_factors():
    """B ← ema B + (1 − ema) B_new from the first one on; A as the ratio of such averages of its sum and its mass."""
    ema, got, mass = 0.6, sequence(kfac(ema=0.6)), np.exp(BATCHES[0][:, :, 0]).mean(1)
    each = [factors(SOFTMAX, at(POINTS, step), at(BATCHES, step)) for step in range(3)]
    for last, share in enumerate(([1.0], [ema, 1 - ema], [ema**2, ema * (1 - ema), 1 - ema])):
        weight = share * mass[: last + 1] / (share @ mass[: last + 1])
        mean = {
            name: Factors(
                sum(w * found[name].A for w, found in zip(weight, each, strict=False)),
                sum(s * found[name].B for s, found in zip(share, each, strict=False)),
            )
            for name in each[0]
        }
        np.testing.assert_allclose(got[last], dense_solve(mean, Y, B, DAMPING), rtol=1e-9)


def test_averages_of_corrected_eigenvalues_stay_where_nothing_changes():
    still = [jax.tree.map(lambda leaf: np.stack([leaf[0]] * STEPS), tree) for tree in (POINTS, BATCHES)]
    for choices in ({"ema": 0.9}, {"factors_every": 2, "inverse_every": 3}):
        ihvp = bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact, **choices)
        got = sequence(ihvp, *still)
        expected = sequence(bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact), *still)
        np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_corrected_eigenvalues_on_a_schedule():
    expected = sequence(bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact))
    got = sequence(bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact, factors_every=3, inverse_every=3))
    np.testing.assert_allclose(got, expected[np.array([0, 0, 0, 3, 3, 3, 6])], rtol=1e-9)


def test_a_basis_follows_averaged_factors_between_decompositions():
    """Orthogonal iteration, from the basis of the first batch: nearer to that of the second by every step."""
    moved, fresh = ((at(POINTS, steps), at(BATCHES, steps)) for steps in (np.minimum(np.arange(101), 1), np.array([1])))
    start = {"inverse_every": lambda step: step == 0}
    got = sequence(bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact, ema=1e-14, **start), *moved)
    (expected,) = sequence(bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact), *fresh)
    error = np.linalg.norm(got[1:] - expected, axis=1) / np.linalg.norm(expected)
    kept = sequence(bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact, **start), *moved)[1]
    assert error[0] < np.linalg.norm(kept - expected) / np.linalg.norm(expected)
    assert error[-1] < 1e-12


# Transformations.

WEIGHTED = make(weights=lambda x, batch: jax.nn.sigmoid(x), l2=0.05)
X = jnp.linspace(-1.0, 1.0, N)


def outer_loss(x, y, batch):
    return SOFTMAX(None, y, batch)


def hypergrad():
    ihvp = bx.ihvp.kfac(damping=DAMPING, ema=0.5, factors_every=2, inverse_every=2)
    return bx.hypergradient(outer_loss, bx.inner.implicit(WEIGHTED, optax.sgd(0.3), 2, ihvp=ihvp))


def outer_loop(key, x, y, batch, steps=4):
    """Plain descent on x; sampled pseudo-gradients."""
    estimator = hypergrad()

    def step(carry, key):
        x, state = carry
        grad, state, info = estimator.estimate(key, state, x, bx.Batch(batch, batch))
        return (x - 0.1 * grad, state), (grad, info.inner.breakdown)

    return jax.lax.scan(step, (x, estimator.init(x, y, bx.Batch(batch, batch))), jax.random.split(key, steps))


def test_agents_seeds_and_outer_steps_are_loops():
    """vmap over agents with keys, data and variables of their own, around a scan of outer steps that keeps factors."""
    keys = jax.random.split(KEY, 3)
    agents = jax.device_get((X[None] + np.arange(3.0)[:, None], at(POINTS, slice(3)), at(BATCHES, slice(3))))
    (x, state), (grads, breakdown) = jax.device_get(jax.jit(jax.vmap(outer_loop))(keys, *agents))
    assert not breakdown.any()
    estimator = hypergrad()
    estimate = jax.jit(estimator.estimate)
    for agent in (1, 2):
        one, own = agents[0][agent], at(agents[1:], agent)
        memory = estimator.init(one, own[0], bx.Batch(own[1], own[1]))
        for step, key in enumerate(jax.random.split(keys[agent], 4)):
            grad, memory, _ = estimate(key, memory, one, bx.Batch(own[1], own[1]))
            np.testing.assert_allclose(grads[agent, step], grad, rtol=1e-9, atol=1e-14)
            one = one - 0.1 * grad
        np.testing.assert_allclose(x[agent], one, rtol=1e-10)
        same = lambda many, single: np.testing.assert_allclose(many[agent], single, rtol=1e-9, atol=1e-12)  # noqa: B023, E731
        jax.tree.map(same, state.y, memory.y)
    assert np.abs(grads[0] - grads[1]).max() > 1e-3


def test_no_derivative_runs_through_the_factors():
    def inner(x, scale):
        y = jax.tree.map(lambda leaf: scale * leaf, Y)
        ihvp = kfac()
        apply, _ = ihvp.prepare(KEY, ihvp.init(x, y, BATCH, WEIGHTED), WEIGHTED, (x, y, BATCH))
        return optax.tree.vdot(apply(B)[0], B)

    value, slopes = jax.jit(jax.value_and_grad(inner, (0, 1)))(X, 1.0)
    assert value > 0
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0)


# Arguments that do not fit.


@pytest.mark.parametrize("make_ihvp", [bx.ihvp.kfac, bx.ihvp.ekfac])
@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"damping": -1.0}, "damping must be a finite number >= 0; got -1.0"),
        ({"damping": float("nan")}, "damping must be"),
        ({"ema": 1.0}, "ema must be"),
        ({"ema": -0.1}, "ema must be"),
        ({"factors_every": 0}, "factors_every must be"),
        ({"inverse_every": 0}, "inverse_every must be"),
        ({"inverse_every": 1.5}, "inverse_every must be"),
        ({"factors_every": lambda: True}, "factors_every must be a function"),
        ({"sharing": 3}, "sharing must be"),
        ({"positions": 3}, "positions must be a function"),
        ({"unsupported": 3}, "unsupported must be"),
        ({"sample": 3}, "sample must be a function"),
        ({"fisher": 3}, "fisher must be a function"),
    ],
)
def test_choices_that_do_not_fit(make_ihvp, choices, says):
    with pytest.raises(ValueError, match=says):
        make_ihvp(**choices)


def test_choices_of_the_inverse_that_do_not_fit():
    with pytest.raises(ValueError, match="inverse must be an Inverse"):
        bx.ihvp.kfac(inverse=3)
    with pytest.raises(ValueError, match=r"damping must be a number with kronecker.factored"):
        bx.ihvp.kfac(damping=jnp.mean, inverse=curvature.kronecker.factored)
    for choices, says in (
        ({"damping": lambda eigenvalues: eigenvalues}, "damping must return one number"),
        ({"positions": lambda batch: jnp.ones((N, 2))}, r"positions must return ones and zeros \[N, T\]"),
    ):
        with pytest.raises(ValueError, match=says):
            jax.eval_shape(lambda y: bx.ihvp.kfac(**choices).prepare(KEY, (), SOFTMAX, (None, y, BATCH))[0](B), Y)  # noqa: B023


@pytest.mark.parametrize("make_ihvp", [bx.ihvp.kfac, bx.ihvp.ekfac])
def test_a_bare_function_gets_the_three_lines_to_write(make_ihvp):
    ihvp = make_ihvp()
    with pytest.raises(
        TypeError, match=r"must be a bx.curvature.ModelLoss(.|\n)*split = lambda x, batch: batch"
    ) as caught:
        ihvp.prepare(KEY, ihvp.init(None, Y), lambda x, y, batch: 0.0, (None, Y, BATCH))
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert [line.split(" = ")[0] for line in lines] == ["model", "split", "inner_loss"]


def test_memory_needs_a_batch_at_its_start():
    for choices in ({"ema": 0.5}, {"factors_every": 2}, {"inverse_every": 2}):
        with pytest.raises(
            ValueError, match=r"batch(.|\n)*init\(x, y, bx\.Batch\(outer, inner\)\), or ihvp\.init\(x, y, inner"
        ):
            kfac(**choices).init(None, Y)
        solver = bx.inner.implicit(SOFTMAX, ihvp=kfac(**choices))
        with pytest.raises(
            ValueError, match=r"batch(.|\n)*init\(x, y, bx\.Batch\(outer, inner\)\), or ihvp\.init\(x, y, inner"
        ):
            bx.hypergradient(outer_loss, solver).init(X, Y)


@pytest.mark.parametrize(
    ("loss", "targets", "says"),
    [
        (curvature.softmax_cross_entropy, INPUTS[:, :1], "targets must be integer labels"),
        (curvature.sigmoid_cross_entropy, LABELS, "targets must have the shape of the outputs"),
        (curvature.squared_error, LABELS, "targets must have the shape of the outputs"),
    ],
    ids=["softmax", "sigmoid", "squared"],
)
def test_a_loss_that_does_not_fit_the_outputs(loss, targets, says):
    for choose in (fisher.exact, fisher.sampled(), fisher.empirical):
        ihvp, inner_loss = bx.ihvp.kfac(fisher=choose), make(loss=loss)
        with pytest.raises(ValueError, match=says):
            ihvp.prepare(
                KEY, ihvp.init(None, Y, (INPUTS, targets), inner_loss), inner_loss, (None, Y, (INPUTS, targets))
            )


def test_negative_weights_are_reported():
    inner_loss = make(weights=lambda x, batch: jnp.full(N, -1.0))
    info = jax.jit(lambda y: kfac().prepare(KEY, (), inner_loss, (None, y, BATCH))[0](B)[1])(Y)
    assert info.breakdown


def test_sampled_pseudo_gradients_need_a_key():
    ihvp = bx.ihvp.kfac()
    with pytest.raises(ValueError, match="key must be"):
        ihvp.prepare(None, ihvp.init(None, Y, BATCH, SOFTMAX), SOFTMAX, (None, Y, BATCH))
    with pytest.raises(ValueError, match="samples must be"):
        fisher.sampled(0)
