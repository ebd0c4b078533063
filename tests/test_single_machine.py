"""The methods of one machine besides those of the engine: limits, contracts, costs and bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from compiled import executed_dots
from networks import numbers

import bilevax as bx

DATA = networks.quadratic(5, n=12)  # its leading axis counts examples here
MEAN = DATA.mean
EXACT = networks.solution(DATA)
START = jnp.array([0.3, -0.2]), jnp.array([0.1, 0.4, -0.5])
STEPS = (0.05, 0.2, 0.3)
FULL, SMALL = bx.inner.full, bx.inner.minibatch(4)
KEY = jax.random.key(0)


def over_examples(loss):
    return lambda x, y, batch: jnp.mean(jax.vmap(loss, (None, None, 0))(x, y, batch))


PROBLEM = bx.BilevelProblem(over_examples(networks.outer_loss), over_examples(networks.inner_loss))
A = bx.algorithms
MANY = 25  # terms of a series that leave nothing: the eigenvalues of I − 0.3 ∇²_yy g are below 0.4
METHODS = {  # exact limits
    "srba": A.srba(PROBLEM, STEPS, SMALL, period=3),
    "fsla": A.fsla(PROBLEM, STEPS, FULL),
    "mrbo": A.mrbo(PROBLEM, STEPS, FULL, terms=MANY),
    "vrbo": A.vrbo(PROBLEM, STEPS, FULL, period=5, steps=2, terms=MANY),
    "vrbo_minibatch": A.vrbo(PROBLEM, STEPS, SMALL, period=1, steps=2, terms=MANY),
    "stocbio": A.stocbio(PROBLEM, STEPS, FULL, steps=3, terms=MANY),
    "amigo": A.amigo(PROBLEM, STEPS, FULL, steps=3),
    "amigo_adam": A.amigo(PROBLEM, (optax.adam(A.decay(0.3, 0.7)), 0.2, 0.3), FULL, steps=3, v_steps=2),
    "descent": A.descent(
        bx.hypergradient(
            PROBLEM.outer_loss, bx.inner.implicit(PROBLEM.inner_loss, optax.sgd(0.3), 40, bx.ihvp.exact())
        ),
        optax.sgd(0.1, momentum=0.5),
    ),
}
ITERATIONS = 600


@functools.cache
def run(method, iterations=ITERATIONS):
    """(x, y, info) of all iterations."""

    def step(state, key):
        state, info = method.step(key, state, DATA.batch)
        return state, (state.x, state.y, info)

    @jax.jit
    def scan(x, y):
        return jax.lax.scan(step, method.init(x, y, DATA.batch), jax.random.split(networks.KEY, iterations))[1]

    return numbers(scan(*START))


@pytest.mark.parametrize("name", METHODS)
def test_limits(name):
    x, y, info = run(METHODS[name])
    tolerance = 1e-3 if name == "vrbo_minibatch" else 1e-4 if name == "amigo_adam" else 1e-9
    np.testing.assert_allclose(x[-1], EXACT[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(y[-1], EXACT[1], rtol=0, atol=tolerance)
    assert not np.any(info.breakdown)
