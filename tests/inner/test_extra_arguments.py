"""Optimizers of optax that ask for more than a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

H = jnp.array([[2.0, 0.3], [0.3, 1.0]])
X, Y = jnp.array([0.5, 1.5]), jnp.array([1.0, -0.4])
sam = optax.contrib.sam
OPTIMIZERS = {
    "hutchinson_sophia": optax.contrib.sophia(0.1, update_interval=2),
    "lbfgs": optax.lbfgs(0.1, linesearch=None),
    "multi_steps": optax.MultiSteps(optax.sgd(0.1), 2),
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    "polyak": optax.polyak_sgd(0.5),
    "sam_opaque": sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True),
    "sam_transparent": sam(optax.sgd(0.1), optax.sgd(0.05)),
}


def inner_loss(x, y, batch):
    return 0.5 * y @ H @ y + jnp.sum(jnp.cos(x * y)) + 3


def outer_loss(x, y, batch):
    return jnp.sum((y - 1) ** 2)


DAILY = ("hutchinson_sophia", "multi_steps", "polyak", "sam_opaque")  # one for each argument


@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)
def test_what_update_takes_is_offered(name):
    optimizer = OPTIMIZERS[name]

    def run(x):
        def value(y, _=None):
            return inner_loss(x, y, None)

        given = {
            "hutchinson_sophia": lambda y: {"obj_fn": value},
            "plateau": lambda y: {"value": value(y)},
            "polyak": lambda y: {"value": value(y)},
            "sam_opaque": lambda y: {"grad_fn": jax.grad(value)},
        }.get(name, lambda y: {})
        y, state = Y, optimizer.init(Y)
        for _ in range(4):
            updates, state = optimizer.update(jax.grad(value)(y), state, y, **given(y))
            y = optax.apply_updates(y, updates)
        return outer_loss(x, y, None)

    hypergrad = bx.hypergradient(outer_loss, bx.inner.reverse(inner_loss, optimizer, 4))
    state, batch = hypergrad.init(X, Y), bx.Batch(None, None)
    expected = jax.jit(jax.grad(run))(X)
    np.testing.assert_allclose(jax.jit(hypergrad.estimate)(None, state, X, batch)[0], expected, rtol=1e-10)


def test_a_line_search_is_for_solvers_that_do_not_reverse_it():
    lbfgs = optax.lbfgs()
    implicit = bx.differentiable(bx.inner.implicit(inner_loss, lbfgs, 8, ihvp=bx.ihvp.exact()))
    grad = jax.jit(jax.grad(lambda x: outer_loss(x, implicit(x, Y, None), None)))(X)
    assert np.isfinite(grad).all()
    reverse = bx.differentiable(bx.inner.reverse(inner_loss, lbfgs, 2))
    with pytest.raises(ValueError, match=r"lbfgs.*inner\.implicit or inner\.forward_gradient.*linesearch=None"):
        jax.grad(lambda x: outer_loss(x, reverse(x, Y, None), None))(X)


def test_lookahead_is_refused():
    solver = bx.inner.reverse(inner_loss, optax.lookahead(optax.sgd(0.1), 2, 0.5), 2)
    with pytest.raises(ValueError, match=r"optimizer must move y itself; got optax\.lookahead"):
        solver.start(X, Y)


def test_an_outer_optimizer_is_offered_the_value():
    hypergrad = bx.hypergradient(outer_loss, bx.inner.reverse(inner_loss, optax.sgd(0.1), 2))
    method = bx.algorithms.descent(hypergrad, optax.polyak_sgd(1e6))
    state, info = jax.jit(method.step)(None, method.init(X, Y), bx.Batch(None, None))
    grad, _, _ = jax.jit(hypergrad.estimate)(None, hypergrad.init(X, Y), X, bx.Batch(None, None))
    np.testing.assert_allclose(state.x, X - info.outer_loss / (grad @ grad) * grad, rtol=1e-12)
