"""An unroll whose first part is replaced by a tail, on quadratics whose hypergradient is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import curvature

STEP_SIZE, SIZE = 0.5, 6
RANDOM = np.random.default_rng(0)
ORTHOGONAL, _ = np.linalg.qr(RANDOM.normal(size=(SIZE, SIZE)))
H = jnp.asarray(ORTHOGONAL @ np.diag(np.geomspace(0.1, 2.0, SIZE)) @ ORTHOGONAL.T)
B, X, Y, SLOPE = (jnp.asarray(RANDOM.normal(size=shape)) for shape in ((SIZE, 3), 3, SIZE, SIZE))
TRUTH = B.T @ jnp.linalg.solve(H, SLOPE)


def quadratic(x, y, batch):
    return 0.5 * y @ H @ y - y @ (B @ x)


def linear(x, y, batch):
    return SLOPE @ y


def estimate(solver, outer_loss=linear, x=X, y=Y, batch=None):
    hypergrad = bx.hypergradient(outer_loss, solver)
    both = bx.Batch(None, batch)
    return jax.jit(hypergrad.estimate)(jax.random.key(0), hypergrad.init(x, y, both), x, both)


def inverse_of_diagonal(damping):
    """v = b / diag(H), a poor inverse whose error is known; the damping is left out."""

    def prepare(key, state, inner_loss, point):
        return lambda b, v0=None: (b / jnp.diag(H), bx.problem.IHVPInfo(0, 0, 0, None, None, False)), state

    return bx.ihvp.identity()._replace(prepare=prepare)


def error(grad):
    return float(jnp.linalg.norm(grad - TRUTH))


@pytest.mark.parametrize("unrolled", [1, 3, 20])
def test_with_the_true_inverse_it_is_exact_however_short(unrolled):
    solver = bx.inner.unroll_with_tail(
        quadratic, STEP_SIZE, 20, unrolled=unrolled, ihvp=lambda damping: bx.ihvp.exact()
    )
    grad, state, info = estimate(solver)
    np.testing.assert_allclose(grad, TRUTH, rtol=0, atol=1e-10)
    power = jnp.linalg.matrix_power(jnp.eye(SIZE) - STEP_SIZE * H, 20)
    solution = jnp.linalg.solve(H, B @ X)
    np.testing.assert_allclose(state.y, solution + power @ (Y - solution), atol=1e-12)
    assert not info.inner.breakdown


def test_a_poor_inverse_is_wrong_by_what_the_unroll_leaves_of_it():
    lengths, inverse, errors = (1, 3, 10, 30, 100), jnp.diag(1 / jnp.diag(H)), []
    for unrolled in lengths:
        solver = bx.inner.unroll_with_tail(quadratic, STEP_SIZE, 100, unrolled=unrolled, ihvp=inverse_of_diagonal)
        grad, _, _ = estimate(solver)
        left = jnp.linalg.matrix_power(jnp.eye(SIZE) - STEP_SIZE * H, unrolled) @ SLOPE
        np.testing.assert_allclose(grad - TRUTH, B.T @ (inverse @ left - jnp.linalg.solve(H, left)), atol=1e-10)
        errors.append(error(grad))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]
    unroll_alone = bx.inner.chain(
        bx.inner.no_gradient(quadratic, optax.sgd(STEP_SIZE), 90), bx.inner.reverse(quadratic, optax.sgd(STEP_SIZE), 10)
    )
    tail_alone = bx.inner.implicit(quadratic, ihvp=inverse_of_diagonal(0.0))
    assert errors[lengths.index(10)] < min(error(estimate(part)[0]) for part in (unroll_alone, tail_alone))


def test_it_is_the_chain_that_it_stands_for():
    """On a loss that is not quadratic, with the damping 1 / (step size · unrolled) in the tail."""
    model = lambda y, inputs: jnp.tanh(inputs @ y)  # noqa: E731
    inner_loss = curvature.ModelLoss(
        model, curvature.squared_error, lambda x, batch: batch, weights=lambda x, batch: jax.nn.sigmoid(x), l2=0.01
    )
    inputs = jnp.sin(jnp.arange(15.0)).reshape(5, 3)
    batch, x, y = (inputs, jnp.sign(inputs[:, :2])), jnp.linspace(-1.0, 1.0, 5), jnp.zeros((3, 2))
    outer_loss = lambda x, y, batch: jnp.sum(jnp.cos(y))  # noqa: E731
    sgd, ihvp = optax.sgd(0.2), lambda damping: bx.ihvp.kfac(damping=damping, fisher=curvature.fisher.exact)
    by_hand = bx.inner.chain(
        bx.inner.implicit(inner_loss, sgd, 6, ihvp=ihvp(1 / (0.2 * 4))), bx.inner.reverse(inner_loss, sgd, 4)
    )
    solvers = bx.inner.unroll_with_tail(inner_loss, 0.2, 10, unrolled=4, ihvp=ihvp), by_hand
    got, expected = (estimate(solver, outer_loss, x, y, batch) for solver in solvers)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(got[1].y, expected[1].y, rtol=1e-12)
    default, _, info = estimate(bx.inner.unroll_with_tail(inner_loss, 0.2, 10, unrolled=4), outer_loss, x, y, batch)
    assert not info.inner.breakdown
    assert default @ expected[0] > 0.9 * jnp.linalg.norm(default) * jnp.linalg.norm(expected[0])


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)], ids=["momentum", "adam"])
def test_a_tail_behind_momentum_or_adam_is_refused(optimizer):
    with pytest.raises(ValueError, match="step_size must be"):
        bx.inner.unroll_with_tail(quadratic, optimizer, 20, unrolled=10)
    solver = bx.inner.chain(
        bx.inner.implicit(quadratic, optimizer, 10, ihvp=bx.ihvp.exact()), bx.inner.reverse(quadratic, optimizer, 10)
    )
    with pytest.raises(ValueError, match=r"must keep no momentum(.|\n)*Use optax.sgd without momentum"):
        estimate(solver)


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((0.0, 20), {"unrolled": 10}, "step_size must be"),
        ((0.5, 20), {"unrolled": 0}, "unrolled must be"),
        ((0.5, 20), {"unrolled": 21}, "unrolled must be|steps must be"),
        ((0.5, 20), {"unrolled": 10, "ihvp": bx.ihvp.exact()}, r"ihvp must be a function \(damping=\)"),
    ],
    ids=["step_size", "none_unrolled", "all_unrolled", "ihvp"],
)
def test_arguments_that_do_not_fit(arguments, options, says):
    with pytest.raises(ValueError, match=says):
        bx.inner.unroll_with_tail(quadratic, *arguments, **options)
