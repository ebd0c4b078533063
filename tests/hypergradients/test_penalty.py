"""The penalty estimator against its closed form on quadratics, and its bias of order 1 / λ."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

RANDOM = np.random.default_rng(0)
ROOT = RANDOM.normal(size=(4, 4))
H = ROOT @ ROOT.T + np.eye(4)
A = np.diag([1.0, 2.0, 0.5, 3.0])
C = RANDOM.normal(size=(4, 3))
B = RANDOM.normal(size=4)
X = np.array([0.3, -1.0, 2.0])
BATCH = bx.Batch(B, None)


def inner_loss(x, y, batch):
    return 0.5 * y @ H @ y - y @ (C @ x)


def outer_loss(x, y, b):
    return 0.5 * (y - b) @ A @ (y - b) + 0.5 * x @ x


PROBLEM = bx.BilevelProblem(outer_loss, inner_loss)
EXACT = X + C.T @ np.linalg.solve(H, A @ (np.linalg.solve(H, C @ X) - B))
OPTIMIZER = optax.sgd(2 / (np.linalg.eigvalsh(H)[0] + np.linalg.eigvalsh(H)[-1]))


def estimate(multiplier, steps=3000, **options):
    hypergrad = bx.penalty(PROBLEM, OPTIMIZER, steps, multiplier=multiplier, **options)
    return jax.jit(hypergrad.estimate)(None, hypergrad.init(X, jnp.zeros(4)), X, BATCH)


@pytest.mark.parametrize("multiplier", [10.0, 1000.0])
def test_closed_form(multiplier):
    y = jnp.linalg.solve(H, C @ X)
    penalized = jnp.linalg.solve(H + A / multiplier, C @ X + A @ B / multiplier)
    grad, state, info = estimate(multiplier)
    np.testing.assert_allclose(grad, X - multiplier * C.T @ (penalized - y), rtol=1e-9)
    np.testing.assert_allclose(state.y, y, rtol=1e-10)
    np.testing.assert_allclose(state.penalized, penalized, rtol=1e-10)
    np.testing.assert_allclose(info.outer_loss, outer_loss(X, penalized, B), rtol=1e-10)
    np.testing.assert_allclose(info.inner.inner_loss, inner_loss(X, y, None), rtol=1e-10)
    gap = inner_loss(X, penalized, None) - inner_loss(X, y, None)
    np.testing.assert_allclose(info.inner.detail.gap, gap, rtol=1e-6)
    assert info.inner.detail.gradient_norm < 1e-10
    assert info.inner.gradient_norm < 1e-10
    assert info.inner.detail.multiplier == multiplier
    assert not info.inner.breakdown


def test_the_error_is_inversely_proportional_to_the_multiplier():
    errors = [jnp.linalg.norm(estimate(multiplier)[0] - EXACT) for multiplier in (1e2, 1e3, 1e4)]
    np.testing.assert_allclose(errors[0] / errors[1], 10, rtol=0.1)
    np.testing.assert_allclose(errors[1] / errors[2], 10, rtol=0.01)


def test_a_schedule_is_asked_with_the_outer_step():
    hypergrad = bx.penalty(PROBLEM, OPTIMIZER, 1, multiplier=optax.linear_schedule(5.0, 25.0, 4))
    state, multipliers, estimate = hypergrad.init(X, jnp.zeros(4)), [], jax.jit(hypergrad.estimate)
    for _ in range(3):
        _, state, info = estimate(None, state, X, BATCH)
        multipliers.append(float(info.inner.detail.multiplier))
    assert multipliers == [5.0, 10.0, 15.0]


def test_both_inner_problems_stay_warm():
    _, once, _ = estimate(10.0, steps=6)
    hypergrad = bx.penalty(PROBLEM, OPTIMIZER, 3, multiplier=10.0)
    state, warm = hypergrad.init(X, jnp.zeros(4)), jax.jit(hypergrad.estimate)
    for _ in range(2):
        _, state, _ = warm(None, state, X, BATCH)
    np.testing.assert_allclose(state.y, once.y, rtol=1e-12)
    np.testing.assert_allclose(state.penalized, once.penalized, rtol=1e-12)


def test_both_inner_problems_see_the_same_batches():
    """With f = 0 they are one problem, and the penalty is nothing but f's direct part."""

    def loss(x, y, rows):
        return jnp.mean((rows @ y - jnp.sum(x)) ** 2)

    rows = bx.Batch(None, jnp.asarray(RANDOM.normal(size=(50, 4))))
    options = {"sample": bx.sampling.minibatch(5), "cross_sample": bx.sampling.minibatch(7)}
    problem = bx.BilevelProblem(lambda x, y, b: 0.5 * x @ x, loss)
    hypergrad = bx.penalty(problem, optax.sgd(0.05), 9, multiplier=10.0, **options)
    grad, state, _ = jax.jit(hypergrad.estimate)(jax.random.key(0), hypergrad.init(X, jnp.zeros(4)), X, rows)
    np.testing.assert_allclose(grad, X, rtol=1e-12)
    np.testing.assert_allclose(state.y, state.penalized, rtol=1e-12)
    assert jnp.abs(state.y).max() > 0


def test_it_takes_a_loss_that_has_no_second_derivative():
    @jax.custom_vjp
    def once(y):
        return 0.5 * y @ H @ y

    once.defvjp(lambda y: (once(y), y), lambda y, bar: (bar * jax.pure_callback(lambda y: np.asarray(H) @ y, y, y),))
    problem = PROBLEM._replace(inner_loss=lambda x, y, batch: once(y) - y @ (C @ x))
    hypergrad = bx.penalty(problem, OPTIMIZER, 300, multiplier=1e3)
    grad, _, _ = jax.jit(hypergrad.estimate)(None, hypergrad.init(X, jnp.zeros(4)), X, BATCH)
    np.testing.assert_allclose(grad, EXACT, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": -1}, "steps must be an int >= 0; got -1"),
        ({"multiplier": 0.0}, "multiplier must be a finite number > 0; got 0.0"),
        ({"multiplier": lambda: 1.0}, "multiplier must be a function (step)"),
        ({"optimizer": None}, "optimizer must be an optax.GradientTransformation"),
        ({"problem": (outer_loss, inner_loss)}, "problem must be a BilevelProblem; got (<function outer_loss"),
        ({"problem": PROBLEM._replace(inner_loss=1.0)}, "inner_loss must be a function (x, y, batch)"),
        ({"problem": PROBLEM._replace(outer_loss=lambda x: x)}, "outer_loss must be a function (x, y, batch)"),
        ({"sample": 3}, "sample must be a function (key, t, data)"),
        ({"outer_sample": 3}, "outer_sample must be a function (key, t, data)"),
        ({"cross_sample": 3}, "cross_sample must be a function (key, t, data)"),
    ],
)
def test_mistakes(change, says):
    good = {"problem": PROBLEM, "optimizer": OPTIMIZER, "steps": 1, "multiplier": 10.0}
    with pytest.raises(ValueError, match="must be") as caught:
        bx.penalty(**(good | change))
    assert says in str(caught.value)


def test_arguments_that_do_not_fit():
    hypergrad = bx.penalty(PROBLEM, OPTIMIZER, 1, multiplier=10.0)
    state = hypergrad.init(X, jnp.zeros(4))
    with pytest.raises(ValueError, match="x must hold floating-point arrays only"):
        hypergrad.estimate(None, state, jnp.arange(2), BATCH)
    with pytest.raises(ValueError, match="batch must be a Batch"):
        hypergrad.estimate(None, state, X, B)
    with pytest.raises(ValueError, match="state must be a PenaltyState"):
        hypergrad.estimate(None, None, X, BATCH)
    with pytest.raises(ValueError, match="y must hold floating-point arrays only"):
        hypergrad.init(X, jnp.arange(3))
