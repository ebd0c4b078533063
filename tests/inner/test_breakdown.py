"""`info.inner.breakdown` of steps that diverge: True for every solver, and False where they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

CURVATURES = jnp.asarray([0.1, 1.0, 4.0])
STEPS = 12
sgd = optax.sgd


def g(x, y, batch):
    return 0.5 * jnp.sum(CURVATURES * y**2) - jnp.sum(x * y) + jnp.sum(x**2)


def f(x, y, batch):
    return jnp.sum((y - 1) ** 2)


def descend(rate):
    return lambda x, y, batch: jax.lax.fori_loop(0, STEPS, lambda _, y: y - rate * jax.grad(g, 1)(x, y, batch), y)


def chained(rate):
    return bx.inner.chain(bx.inner.no_gradient(g, sgd(rate), STEPS - 2), bx.inner.reverse(g, sgd(rate), 2))


def two_level(rate):
    return bx.inner.reverse(g, sgd(rate), STEPS, checkpoint=bx.inner.two_level)


def tail(damping):
    return bx.ihvp.cg(damping=damping)


SOLVERS = {
    "implicit": lambda rate: bx.inner.implicit(g, sgd(rate), STEPS),
    "implicit_solve": lambda rate: bx.inner.implicit(g, solve=descend(rate)),
    "reverse": lambda rate: bx.inner.reverse(g, sgd(rate), STEPS),
    "two_level": two_level,
    "no_gradient": lambda rate: bx.inner.no_gradient(g, sgd(rate), STEPS),
    "forward_gradient": lambda rate: bx.inner.forward_gradient(g, sgd(rate), STEPS, directions=2),
    "chunks": lambda rate: bx.inner.forward_gradient(g, sgd(rate), STEPS, directions=2, chunk=1),
    "zeroth_order": lambda rate: bx.inner.zeroth_order(descend(rate), directions=1, inner_loss=g),
    "chain": chained,
    "unroll_with_tail": lambda rate: bx.inner.unroll_with_tail(g, rate, STEPS, 2, ihvp=tail),
    "penalty": None,
}


def estimated(name, rate, x, y):
    """The breakdown and y of one estimate, of a solver with this learning rate."""
    if name == "penalty":
        hypergrad = bx.penalty(bx.BilevelProblem(f, g), sgd(rate), STEPS, multiplier=1e4)
    else:
        hypergrad = bx.hypergradient(f, SOLVERS[name](rate))
    _, state, info = hypergrad.estimate(jax.random.key(0), hypergrad.init(x, y), x, bx.Batch(None, None))
    return info.inner.breakdown, state.y


VARIANTS = ("two_level", "no_gradient", "chunks")  # the same steps as others


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in SOLVERS]
)
def test_steps_that_diverge_break_down_and_no_others_do(name):
    """Below 2 / L, far above, far below; from the solution in float32, where g changes by rounding alone."""
    x = jnp.asarray([0.3, -1.0, 2.0], jnp.float32)
    solution = (x / CURVATURES).astype(x.dtype)
    rates = jnp.asarray([0.45, 0.8, 1e-3, 0.45], x.dtype)
    starts = jnp.stack([jnp.ones_like(x)] * 3 + [solution])
    breakdown, y = jax.jit(jax.vmap(lambda rate, y: estimated(name, rate, x, y)))(rates, starts)
    assert np.isfinite(y).all()
    assert breakdown.tolist() == [False, True, False, False]


def test_the_first_step_of_a_warm_optimizer_is_the_one_that_counts():
    """A t that is not 0 at the start, and a batch for each step: step 5 saw g at z_5."""
    steps = bx.inner._optimizer_steps
    run = steps.optimizer_steps(lambda x, y, batch: batch * y**2, sgd(0.1), None, bx.sampling.per_step)
    z = run.start(1.0, jnp.asarray(3.0))._replace(t=jnp.asarray(5))
    end, begin = steps.run_watched(run.watched_step, None, jnp.arange(10.0), 1.0, z, 3)
    assert [bool(begin.known), float(begin.loss), float(begin.gradient_norm)] == [True, 45.0, 30.0]
    assert int(end.t) == 8
    assert not steps.run_watched(run.watched_step, None, jnp.arange(10.0), 1.0, z, 0)[1].known
