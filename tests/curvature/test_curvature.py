"""Losses with structure, and Gauss–Newton products against JᵀLJ written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax import curvature

N, C = 7, 5
RANDOM = np.random.default_rng(0)
Y = {name: jnp.asarray(RANDOM.normal(size=shape)) for name, shape in (("hidden", (3, 4)), ("out", (4, C)))}
INPUTS = jnp.asarray(RANDOM.normal(size=(N, 3)))
PROBABILITIES = jnp.asarray(RANDOM.dirichlet(np.ones(C), size=N))
X = jnp.asarray(np.linspace(-1, 1, N))
FLAT, UNRAVEL = ravel_pytree(Y)


def model(y, inputs):
    return jnp.tanh(inputs @ y["hidden"]) @ y["out"]


def pair(x, batch):
    return batch


def make(loss=curvature.squared_error, **parts):
    return curvature.ModelLoss(model, loss, pair, **parts)


LOSSES = {
    "labels": (curvature.softmax_cross_entropy, jnp.arange(N) % C),
    "probabilities": (curvature.softmax_cross_entropy, PROBABILITIES),
    "mass": (curvature.softmax_cross_entropy, 3 * PROBABILITIES),
    "sigmoid": (curvature.sigmoid_cross_entropy, PROBABILITIES),
    "squared": (curvature.squared_error, PROBABILITIES),
}
over_losses = pytest.mark.parametrize(("loss", "targets"), LOSSES.values(), ids=LOSSES)


def matrix(choice, inner_loss, x, batch):
    """The matrix that the products of a curvature multiply by."""

    @jax.jit
    def multiplied(x, batch):
        product = choice(inner_loss, x, Y, batch)
        return jax.vmap(lambda v: ravel_pytree(product(UNRAVEL(v)))[0])(np.eye(FLAT.size))

    return np.asarray(multiplied(x, batch))


@functools.partial(jax.jit, static_argnums=0)
def output_hessians(loss, targets):
    """Of each example, [N, C, C]."""
    return jax.vmap(jax.hessian(lambda z, t: loss.value(z[None], t[None])[0]))(model(Y, INPUTS), targets)


@functools.partial(jax.jit, static_argnums=0)
def written_out(loss, targets, weights):
    """1/N Σ_n w_n J_nᵀ L_n J_n with L_n by jax.hessian."""
    jacobian = jax.jacobian(lambda flat: model(UNRAVEL(flat), INPUTS))(FLAT)
    L = output_hessians(loss, targets)
    return jnp.einsum("nci,ncd,ndj,n->ij", jacobian, L, jacobian, weights / N)


@over_losses
def test_gauss_newton_is_the_matrix_written_out(loss, targets):
    inner_loss = make(loss, weights=lambda x, batch: jnp.exp(x), l2=0.3)
    expected = written_out(loss, targets, np.exp(X)) + 0.3 * np.eye(FLAT.size)
    np.testing.assert_allclose(matrix(curvature.gauss_newton, inner_loss, X, (INPUTS, targets)), expected, atol=1e-10)


@over_losses
def test_it_is_the_hessian_of_a_linear_model(loss, targets):
    linear = curvature.ModelLoss(lambda y, inputs: inputs @ y["hidden"] @ Y["out"] + y["out"].sum(), loss, pair, l2=0.1)
    found, hessian = (matrix(c, linear, None, (INPUTS, targets)) for c in (curvature.gauss_newton, curvature.hessian))
    np.testing.assert_allclose(found, hessian, atol=1e-10)


@over_losses
def test_the_root_of_an_output_loss(loss, targets):
    s = np.sin(np.arange(N * C)).reshape(N, C)
    found = jax.jit(lambda targets, s: loss.product(model(Y, INPUTS), targets, s))(targets, s)
    np.testing.assert_allclose(found, np.einsum("ncd,nd->nc", output_hessians(loss, targets), s), atol=1e-12)


def test_the_loss_is_that_of_its_formula():
    center = jax.tree.map(jnp.ones_like, Y)
    inner_loss = make(weights=lambda x, batch: jnp.exp(x), l2=lambda x: jnp.sum(x**2), center=lambda x: center)
    errors = 0.5 * jnp.sum((model(Y, INPUTS) - PROBABILITIES) ** 2, axis=1)
    expected = jnp.mean(jnp.exp(X) * errors) + 0.5 * jnp.sum(X**2) * jnp.sum((FLAT - 1) ** 2)
    np.testing.assert_allclose(inner_loss(X, Y, (INPUTS, PROBABILITIES)), expected, rtol=1e-12)


def test_sigmoid_equals_a_softmax_of_two_classes():
    z = jnp.linspace(-3, 3, 6)[:, None]
    labels = jnp.arange(6) % 2
    one = curvature.sigmoid_cross_entropy.value(z, labels[:, None])
    two = curvature.softmax_cross_entropy.value(jnp.concatenate([jnp.zeros_like(z), z], axis=1), labels)
    np.testing.assert_allclose(one, two, rtol=1e-12)


def test_decay_of_each_parameter():
    rates = {"hidden": jnp.arange(12.0).reshape(3, 4), "out": 2.0}
    inner_loss = make(l2=lambda x: rates)
    batch = (INPUTS, PROBABILITIES)
    plain, decayed = (matrix(curvature.gauss_newton, loss, None, batch) for loss in (make(), inner_loss))
    decay = np.concatenate([np.arange(12.0), np.full(20, 2.0)])
    np.testing.assert_allclose(decayed, plain + np.diag(decay), atol=1e-12)


def test_masked_positions_do_not_count():
    """A sequence model [N, T, C]: positions without a mask are as if they were not there."""
    inputs = np.stack([INPUTS, 10 * np.asarray(INPUTS)], axis=1)
    targets = np.stack([np.arange(N) % C, np.zeros(N, int)], axis=1)
    mask = np.broadcast_to(np.array([1.0, 0.0]), (N, 2))
    masked = curvature.ModelLoss(
        model, curvature.softmax_cross_entropy, lambda x, batch: batch[:2], mask=lambda batch: batch[2]
    )
    plain = make(curvature.softmax_cross_entropy)
    long, short = (inputs, targets, mask), (INPUTS, targets[:, 0])
    value = jax.jit(lambda loss, batch: loss(None, Y, batch), static_argnums=0)
    np.testing.assert_allclose(value(masked, long), value(plain, short), rtol=1e-12)
    found, expected = (matrix(curvature.gauss_newton, *pair) for pair in ((masked, None, long), (plain, None, short)))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_x_may_make_the_inputs():
    """Data condensation: the cross derivative runs through `split`."""
    inner_loss = curvature.ModelLoss(model, curvature.squared_error, lambda x, batch: (x, batch), l2=0.1)
    v = jax.tree.map(jnp.cos, Y)
    by_parts = jax.grad(lambda x: optax.tree.vdot(jax.grad(inner_loss, 1)(x, Y, PROBABILITIES), v))
    crossed = lambda x: curvature.cross(inner_loss, x, Y, PROBABILITIES)(v)  # noqa: E731
    np.testing.assert_allclose(jax.jit(crossed)(INPUTS), jax.jit(by_parts)(INPUTS), rtol=1e-12)


def test_conjugate_gradients_take_it_where_the_hessian_is_indefinite():
    batch = (INPUTS, PROBABILITIES * 4)
    inner_loss = make(l2=0.01)
    assert np.linalg.eigvalsh(matrix(curvature.hessian, inner_loss, None, batch))[0] < -0.1
    b = jax.tree.map(np.sin, Y)

    def solve(choice):
        prepare = bx.ihvp.cg(maxiter=100, tol=1e-12, curvature=choice).prepare
        return jax.jit(lambda b: prepare(None, (), inner_loss, (None, Y, batch))[0](b))(b)

    v, info = solve(curvature.gauss_newton)
    G = matrix(curvature.gauss_newton, inner_loss, None, batch)
    assert not info.breakdown
    np.testing.assert_allclose(ravel_pytree(v)[0], np.linalg.solve(G, ravel_pytree(b)[0]), rtol=1e-8)
    assert solve(curvature.hessian)[1].breakdown


def test_negative_weights_are_reported_by_the_solver():
    inner_loss = make(weights=lambda x, batch: jnp.full(N, -1.0))
    ihvp = bx.ihvp.cg(maxiter=10, curvature=curvature.gauss_newton)
    point = (None, Y, (INPUTS, PROBABILITIES))
    assert jax.jit(lambda b: ihvp.prepare(None, (), inner_loss, point)[0](b)[1].breakdown)(Y)


def test_half_precision_model_in_float32():
    half = curvature.ModelLoss(
        lambda y, inputs: model(optax.tree.cast(y, jnp.bfloat16), inputs.astype(jnp.bfloat16)),
        curvature.squared_error,
        pair,
        l2=0.1,
    )
    y, batch = optax.tree.cast((Y, (INPUTS, PROBABILITIES)), jnp.float32)
    v = jax.tree.map(np.cos, y)
    product = jax.jit(lambda loss, v: curvature.gauss_newton(loss, None, y, batch)(v), static_argnums=0)
    got, expected = product(half, v), product(make(l2=0.1), v)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    got, expected = (ravel_pytree(tree)[0] for tree in (got, expected))
    assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: curvature.ModelLoss(3, curvature.squared_error, pair), ["model must be a function (y, inputs)"]),
        (lambda: make(optax.l2_loss), ["loss must be an OutputLoss", "softmax_cross_entropy"]),
        (lambda: curvature.ModelLoss(model, curvature.squared_error, None), ["split must be a function (x, batch)"]),
        (lambda: make(weights=1.0), ["weights must be a function (x, batch)"]),
        (lambda: make(center=Y), ["center must be a function (x)"]),
        (lambda: make(mask=1.0), ["mask must be a function (batch)"]),
        (lambda: make(l2=-1.0), ["l2 must be a finite number >= 0; got -1.0"]),
        (lambda: make(l2=lambda: 1.0), ["l2 must be a function (x)"]),
        (lambda: make(l2=lambda x: {"a": 1.0})(X, Y, (INPUTS, PROBABILITIES)), ["l2 must be, or return", "like y"]),
        (lambda: make(weights=lambda x, b: x[:2])(X, Y, (INPUTS, PROBABILITIES)), ["weights", "(2,)", "(7,)"]),
        (lambda: make(mask=lambda b: X[:2])(X, Y, (INPUTS, PROBABILITIES)), ["mask", "(2,)", "(7,)"]),
        (lambda: make(center=lambda x: x)(X, Y, (INPUTS, PROBABILITIES)), ["center", "like y"]),
        (
            lambda: curvature.ModelLoss(lambda y, i: i @ y, curvature.squared_error, pair)(X, X[:3], (INPUTS, X)),
            ["model must return outputs of shape [N, ..., C]; got (7,)", "outputs[:, None]"],
        ),
        (lambda: make()(X, Y, (INPUTS, PROBABILITIES, X)), ["split must return (inputs, targets); got (", "batch[0]"]),
        (lambda: make()(X, Y, (INPUTS, X)), ["targets must have the shape of the outputs, (7, 5); got (7,)"]),
        (
            lambda: make(curvature.softmax_cross_entropy)(X, Y, (INPUTS, X)),
            ["targets must be integer labels of shape (7,) or probabilities of shape (7, 5)", "(7,) of float64"],
        ),
    ],
)
def test_parts_that_do_not_fit(call, says):
    with pytest.raises(ValueError, match="must") as caught:
        call()
    assert [part for part in says if part not in str(caught.value)] == []


def test_a_bare_function_has_no_parts():
    with pytest.raises(TypeError, match=r"must be a bx.curvature.ModelLoss(.|\n)*split = lambda x, batch: batch"):
        curvature.gauss_newton(lambda x, y, batch: 0.0, X, Y, None)
