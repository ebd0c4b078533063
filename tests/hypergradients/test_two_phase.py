"""Two estimators in time: each exactly as it is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

BATCH = bx.Batch(jnp.arange(3.0), jnp.arange(3.0))


def inner_loss(x, y, batch):
    return jnp.sum((y - jnp.tanh(x) * batch) ** 2) + 0.1 * jnp.sum(jnp.cos(y))


def outer_loss(x, y, batch):
    return jnp.sum((y - 1) ** 2)


CHEAP = bx.hypergradient(outer_loss, bx.inner.implicit(inner_loss, optax.sgd(0.1), 2, ihvp=bx.ihvp.identity(0.3)))
GOOD = bx.hypergradient(outer_loss, bx.inner.reverse(inner_loss, optax.adam(0.1), 5))
START = (jnp.array(0.3), jnp.zeros(3))


def run(hypergrad, state, x, steps):
    estimate, points = jax.jit(hypergrad.estimate), []
    for _ in range(steps):
        grad, state, info = estimate(None, state, x, BATCH)
        points.append((grad, state.y, info))
        x = x - 0.1 * grad
    return points, state, x


@pytest.mark.parametrize("switch_at", [0, 2, 5, 9])
def test_it_is_the_one_and_then_the_other(switch_at):
    x, y = START
    got, state, _ = run(bx.two_phase(switch_at, CHEAP, GOOD), bx.two_phase(switch_at, CHEAP, GOOD).init(x, y), x, 5)
    first, cheap_state, x = run(CHEAP, CHEAP.init(x, y), x, min(switch_at, 5))
    second, _, _ = run(GOOD, GOOD.init(x, cheap_state.y), x, 5 - len(first))
    for k, (ours, theirs) in enumerate(zip(got, first + second, strict=True)):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-12)
        info = ours[2]
        assert info.phase == (k >= switch_at)
        active, idle = (info.second, info.first) if info.phase else (info.first, info.second)
        np.testing.assert_allclose(active.outer_loss, theirs[2].outer_loss, rtol=1e-12)
        assert active.inner.calls == theirs[2].inner.calls
        assert idle.outer_loss == 0
        assert idle.inner.gradient_norm == 0
        assert idle.inner.calls == bx.problem.Calls()
        assert not idle.inner.breakdown
    assert state.step == 5


def test_only_the_active_one_runs():
    runs = []

    def noted(x, y, batch):
        jax.debug.callback(lambda: runs.append(None))
        return inner_loss(x, y, batch)

    costly = bx.hypergradient(outer_loss, bx.inner.no_gradient(noted, optax.sgd(0.1), 3))
    hypergrad = bx.two_phase(1, CHEAP, costly)
    estimate, state = jax.jit(hypergrad.estimate), hypergrad.init(*START)
    _, state, _ = estimate(None, state, START[0], BATCH)
    jax.effects_barrier()
    assert not runs
    estimate(None, state, START[0], BATCH)
    jax.effects_barrier()
    assert runs


def test_the_switch_may_be_traced_and_y_replaced():
    def estimate(switch_at, y):
        hypergrad = bx.two_phase(switch_at, CHEAP, GOOD)
        state = hypergrad.init(*START)._replace(y=y)
        return hypergrad.estimate(None, state, START[0], BATCH)[0]

    y = jnp.ones(3)
    for switch_at, alone in ((0, GOOD), (1, CHEAP)):
        grad, _, _ = jax.jit(alone.estimate)(None, alone.init(START[0], y), START[0], BATCH)
        np.testing.assert_allclose(jax.jit(estimate)(switch_at, y), grad, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((-1, CHEAP, GOOD), "switch_at must be a whole number >= 0; got -1. Pass, say, switch_at=100."),
        ((0.5, CHEAP, GOOD), "switch_at must be a whole number >= 0; got 0.5."),
        ((1, CHEAP, None), "second must be a Hypergradient; got None"),
        ((1, bx.inner.reverse(inner_loss, optax.sgd(0.1), 1), GOOD), "first must be a Hypergradient; got reverse("),
    ],
)
def test_mistakes(arguments, says):
    with pytest.raises(ValueError, match="must be") as caught:
        bx.two_phase(*arguments)
    assert says in str(caught.value)


def test_a_state_without_y():
    nameless = bx.problem.Hypergradient(lambda x, y, batch=None: (), lambda key, state, x, batch: (x, state, ()))
    with pytest.raises(ValueError, match=r"second.init must return a NamedTuple with a field y"):
        bx.two_phase(1, CHEAP, nameless).init(*START)


def test_a_state_of_another_kind():
    with pytest.raises(ValueError, match="state must be a TwoPhaseState; got HypergradientState"):
        bx.two_phase(1, CHEAP, GOOD).estimate(None, CHEAP.init(*START), START[0], BATCH)
