"""The answers of `bilevax.testing.problems`, against finite differences, and methods against the answers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.testing import problems

PROBLEMS = {
    "twice_identity": problems.twice_identity,
    "ridge": problems.ridge,
    "logistic": problems.logistic,
    "network": problems.network,
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_answers_are_those_of_finite_differences(name):
    known, h = PROBLEMS[name](), 1e-5

    @jax.jit
    def evaluate(x, y):
        gradient = jax.grad(known.problem.inner_loss, 1)(x, y, known.batch.inner)
        return known.problem.outer_loss(x, y, known.batch.outer), optax.tree.norm(gradient)

    F = lambda x: evaluate(x, known.solution(x))  # noqa: E731
    direction = np.cos(np.arange(known.x.size)).reshape(known.x.shape)
    slope = (F(known.x + h * direction)[0] - F(known.x - h * direction)[0]) / (2 * h)
    assert F(known.x)[1] < 1e-12
    np.testing.assert_allclose(np.vdot(known.hypergradient(known.x), direction), slope, rtol=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_methods_reach_the_answers(name):
    known = PROBLEMS[name]()
    outer_loss, inner_loss = known.problem
    rate = optax.sgd(0.2)
    solver = bx.inner.implicit(inner_loss, rate, steps=2000, ihvp=bx.ihvp.cg(maxiter=30, tol=1e-10))
    hypergrad = bx.hypergradient(outer_loss, solver)
    x, y, batch = jax.tree.map(jnp.asarray, (known.x, known.y, known.batch))
    grad, state, info = jax.jit(hypergrad.estimate)(None, hypergrad.init(x, y), x, batch)
    np.testing.assert_allclose(grad, known.hypergradient(known.x), rtol=1e-5, atol=1e-8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.y, known.solution(known.x))
    assert not info.inner.breakdown
