"""Losses with structure, and Gauss–Newton products against JᵀLJ written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax import curvature

N, C = 7, 5
KEYS = jax.random.split(jax.random.key(0), 4)
Y = {"hidden": jax.random.normal(KEYS[0], (3, 4)), "out": jax.random.normal(KEYS[1], (4, C))}
INPUTS = jax.random.normal(KEYS[2], (N, 3))
PROBABILITIES = jax.nn.softmax(jax.random.normal(KEYS[3], (N, C)))
X = jnp.linspace(-1, 1, N)
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


def matrix(product):
    return jax.vmap(lambda v: ravel_pytree(product(UNRAVEL(v)))[0])(jnp.eye(FLAT.size))


def written_out(loss, targets, weights):
    """1/N Σ_n w_n J_nᵀ L_n J_n with L_n by jax.hessian."""
    jacobian = jax.jacobian(lambda flat: model(UNRAVEL(flat), INPUTS))(FLAT)
    outputs = model(Y, INPUTS)
    L = jax.vmap(jax.hessian(lambda z, t: loss.value(z[None], t[None])[0]))(outputs, targets)
    return jnp.einsum("nci,ncd,ndj,n->ij", jacobian, L, jacobian, weights / N)


@over_losses
def test_gauss_newton_is_the_matrix_written_out(loss, targets):
    inner_loss = make(loss, weights=lambda x, batch: jnp.exp(x), l2=0.3)
    product = curvature.gauss_newton(inner_loss, X, Y, (INPUTS, targets))
    expected = written_out(loss, targets, jnp.exp(X)) + 0.3 * jnp.eye(FLAT.size)
    np.testing.assert_allclose(matrix(product), expected, atol=1e-10)


@over_losses
def test_it_is_the_hessian_of_a_linear_model(loss, targets):
    linear = curvature.ModelLoss(lambda y, inputs: inputs @ y["hidden"] @ Y["out"] + y["out"].sum(), loss, pair, l2=0.1)
    batch = (INPUTS, targets)
    product = curvature.gauss_newton(linear, None, Y, batch)
    np.testing.assert_allclose(matrix(product), matrix(curvature.hessian(linear, None, Y, batch)), atol=1e-10)


@over_losses
def test_the_root_of_an_output_loss(loss, targets):
    outputs = model(Y, INPUTS)
    L = jax.vmap(jax.hessian(lambda z, t: loss.value(z[None], t[None])[0]))(outputs, targets)
    s = jnp.sin(jnp.arange(N * C)).reshape(N, C)
    np.testing.assert_allclose(loss.product(outputs, targets, s), jnp.einsum("ncd,nd->nc", L, s), atol=1e-12)


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
    plain = matrix(curvature.gauss_newton(make(), None, Y, batch))
    decay = jnp.concatenate([jnp.arange(12.0), jnp.full(20, 2.0)])
    np.testing.assert_allclose(
        matrix(curvature.gauss_newton(inner_loss, None, Y, batch)), plain + jnp.diag(decay), atol=1e-12
    )


def test_masked_positions_do_not_count():
    """A sequence model [N, T, C]: positions without a mask are as if they were not there."""
    inputs = jnp.stack([INPUTS, 10 * INPUTS], axis=1)
    targets = jnp.stack([jnp.arange(N) % C, jnp.zeros(N, int)], axis=1)
    mask = jnp.broadcast_to(jnp.array([1.0, 0.0]), (N, 2))
    masked = curvature.ModelLoss(
        model, curvature.softmax_cross_entropy, lambda x, batch: batch[:2], mask=lambda batch: batch[2]
    )
    plain = make(curvature.softmax_cross_entropy)
    long, short = (inputs, targets, mask), (INPUTS, targets[:, 0])
    np.testing.assert_allclose(masked(None, Y, long), plain(None, Y, short), rtol=1e-12)
    products = [curvature.gauss_newton(loss, None, Y, batch) for loss, batch in ((masked, long), (plain, short))]
    np.testing.assert_allclose(matrix(products[0]), matrix(products[1]), atol=1e-12)


def test_x_may_make_the_inputs():
    """Data condensation: the cross derivative runs through `split`."""
    inner_loss = curvature.ModelLoss(model, curvature.squared_error, lambda x, batch: (x, batch), l2=0.1)
    v = jax.tree.map(jnp.cos, Y)
    by_parts = jax.grad(lambda x: optax.tree.vdot(jax.grad(inner_loss, 1)(x, Y, PROBABILITIES), v))(INPUTS)
    np.testing.assert_allclose(curvature.cross(inner_loss, INPUTS, Y, PROBABILITIES)(v), by_parts, rtol=1e-12)


def test_conjugate_gradients_take_it_where_the_hessian_is_indefinite():
    batch = (INPUTS, PROBABILITIES * 4)
    inner_loss = make(l2=0.01)
    assert jnp.linalg.eigvalsh(matrix(curvature.hessian(inner_loss, None, Y, batch)))[0] < -0.1
    b = jax.tree.map(jnp.sin, Y)

    def solve(choice):
        apply, _ = bx.ihvp.cg(100, 1e-12, curvature=choice).prepare(None, (), inner_loss, (None, Y, batch))
        return apply(b)

    v, info = solve(curvature.gauss_newton)
    G = matrix(curvature.gauss_newton(inner_loss, None, Y, batch))
    assert not info.breakdown
    np.testing.assert_allclose(ravel_pytree(v)[0], jnp.linalg.solve(G, ravel_pytree(b)[0]), rtol=1e-8)
    assert solve(curvature.hessian)[1].breakdown


def test_negative_weights_are_reported_by_the_solver():
    inner_loss = make(weights=lambda x, batch: jnp.full(N, -1.0))
    ihvp = bx.ihvp.cg(10, curvature=curvature.gauss_newton)
    apply, _ = ihvp.prepare(None, (), inner_loss, (None, Y, (INPUTS, PROBABILITIES)))
    assert apply(Y)[1].breakdown


def test_half_precision_model_in_float32():
    half = curvature.ModelLoss(
        lambda y, inputs: model(optax.tree.cast(y, jnp.bfloat16), inputs.astype(jnp.bfloat16)),
        curvature.squared_error,
        pair,
        l2=0.1,
    )
    y, batch = optax.tree.cast((Y, (INPUTS, PROBABILITIES)), jnp.float32)
    v = jax.tree.map(jnp.cos, y)
    got = curvature.gauss_newton(half, None, y, batch)(v)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    expected = curvature.gauss_newton(make(l2=0.1), None, y, batch)(v)
    distance = optax.tree.norm(optax.tree.sub(got, expected)) / optax.tree.norm(expected)
    assert distance < 0.02


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
