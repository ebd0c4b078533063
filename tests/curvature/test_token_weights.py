"""Weights for each position of each example, which depend on x: the loss, its curvature, and derivatives by x."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import KEY, assert_same, corrected
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax import curvature
from bilevax.curvature import kronecker
from bilevax.curvature.fisher import exact

N, T, V, D = 4, 3, 5, 2
RANDOM = np.random.default_rng(0)
Y = {
    "author": jnp.asarray(RANDOM.normal(size=(3, D))),
    "head": jnp.asarray(RANDOM.normal(size=(D, V))),
    "table": jnp.asarray(RANDOM.normal(size=(V, D))),
}
X = jnp.asarray(RANDOM.normal(size=(N, T)))
WEIGHTS = np.asarray(jax.nn.sigmoid(X))
TOKENS, TARGETS = (jnp.asarray(RANDOM.integers(0, V, (N, T))) for _ in range(2))
AUTHORS = jnp.asarray(RANDOM.normal(size=(N, 3)))
BATCH = ((TOKENS, AUTHORS), TARGETS)
MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 1, 1]])


def model(y, inputs):
    """A table and a head on each token, and one layer with one row for each example."""
    tokens, authors = inputs
    return jnp.tanh(y["table"][tokens] + (authors @ y["author"])[:, None]) @ y["head"]


def make(model=model, **parts):
    split = lambda x, batch: batch  # noqa: E731
    parts = {"weights": lambda x, batch: jax.nn.sigmoid(x), **parts}
    return curvature.ModelLoss(model, curvature.softmax_cross_entropy, split, **parts)


def test_the_value_is_the_weighted_sum_over_tokens():
    logp = np.asarray(jax.jit(lambda y: jax.nn.log_softmax(model(y, BATCH[0])))(Y))
    each = -np.take_along_axis(logp, np.asarray(TARGETS)[..., None], -1)[..., 0]
    for loss, counts in ((make(), 1), (make(mask=lambda batch: MASK), MASK)):
        np.testing.assert_allclose(jax.jit(loss)(X, Y, BATCH), np.sum(counts * WEIGHTS * each) / N, rtol=1e-12)


def test_gauss_newton_is_the_matrix_written_out():
    flat, unravel = ravel_pytree(Y)

    @jax.jit
    def both(x, flat):
        product = curvature.gauss_newton(make(), x, unravel(flat), BATCH)
        found = jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0])(jnp.eye(flat.size))
        J = jax.jacobian(lambda flat: model(unravel(flat), BATCH[0]))(flat)
        p = jax.nn.softmax(model(unravel(flat), BATCH[0]))
        L = p[..., None] * jnp.eye(V)[None, None] - p[..., None] * p[..., None, :]
        return found, jnp.einsum("ntci,ntcd,ntdj,nt->ij", J, L, J, WEIGHTS / N)

    np.testing.assert_allclose(*both(X, flat), atol=1e-12)


def as_examples(y, inputs):
    """The same tokens, each an example of its own."""
    return model(y, (inputs[0][:, None], inputs[1]))[:, 0]


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_factors_are_those_of_as_many_examples(mask):
    """Tokens that do not see each other are T times as many examples, with weights of their own."""
    counts = np.ones((N, T)) if mask is None else mask
    long = make(mask=None if mask is None else lambda batch: mask)
    short = make(as_examples, weights=lambda x, batch: jax.nn.sigmoid(x) * counts.ravel())
    tokens = ((TOKENS.reshape(-1), jnp.repeat(AUTHORS, T, axis=0)), TARGETS.reshape(-1))

    @jax.jit
    def measured(loss_x_batch):
        loss, x, batch = long if loss_x_batch[0].ndim > 1 else short, *loss_x_batch
        found = kronecker.factors(KEY, loss, x, Y, batch, fisher=exact)
        bases = {name: kronecker.spectral.decompose(jnp.eye(len(f.A)), f.B, 0.0) for name, f in found.items()}
        bases["table"] = kronecker.spectral.decompose(jnp.ones(V), found["table"].B, 0.0)
        return found, corrected(KEY, loss, x, Y, batch, bases)

    (found, squares), (expected, of_examples) = measured((X, BATCH)), measured((X.ravel(), tokens))
    for name in ("head", "table"):
        assert_same(found[name], expected[name].A, T * expected[name].B)
        np.testing.assert_allclose(found[name].mass, T * expected[name].mass, rtol=1e-12)
        np.testing.assert_allclose(found[name].mass, np.sum(counts * WEIGHTS) / N, rtol=1e-12)
        np.testing.assert_allclose(squares[name], T * of_examples[name], atol=1e-12)
    np.testing.assert_allclose(found["author"].B, T * expected["author"].B, atol=1e-12)
    mean = np.sum(counts * WEIGHTS, axis=1) / counts.sum(1)  # one row for each example: the mean over its tokens
    A = np.einsum("n,ni,nj->ij", mean / mean.sum(), AUTHORS, AUTHORS)
    np.testing.assert_allclose(found["author"].A, A, atol=1e-12)
    np.testing.assert_allclose(found["author"].mass, mean.sum() / N, rtol=1e-12)


@pytest.mark.parametrize("sharing", [curvature.expand, curvature.reduce])
def test_equal_weights_are_those_of_examples(sharing):
    each, one = make(), make(weights=lambda x, batch: jax.nn.sigmoid(x[:, 0]))
    x = jnp.repeat(X[:, :1], T, axis=1).at[0].set(-jnp.inf)  # and the first example counts nothing
    factors = jax.jit(
        lambda loss: kronecker.factors(KEY, loss, x, Y, BATCH, fisher=exact, sharing=sharing), static_argnums=0
    )
    found, expected = factors(each), factors(one)
    for name, entry in expected.items():
        assert_same(found[name], entry.A, entry.B)


def test_derivatives_by_x():
    """The cross term by central differences, and the hypergradient by a dense solve with it."""
    loss, (flat, unravel) = make(l2=0.1), ravel_pytree(Y)
    outer = lambda x, y, batch: 0.5 * jnp.sum(y["head"] ** 2)  # noqa: E731
    ihvp = bx.ihvp.cg(
        preconditioner=bx.ihvp.kfac(fisher=exact), curvature=curvature.gauss_newton, maxiter=60, tol=1e-12
    )
    hypergrad = bx.hypergradient(outer, bx.inner.implicit(loss, ihvp=ihvp))

    @jax.jit
    def both(x):
        found, _, _ = hypergrad.estimate(KEY, hypergrad.init(x, Y), x, bx.Batch(None, BATCH))
        product = curvature.gauss_newton(loss, x, Y, BATCH)
        G = jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0])(jnp.eye(flat.size))
        v = jnp.linalg.solve(G, ravel_pytree(jax.grad(outer, 1)(x, Y, None))[0])
        return found, -curvature.cross(loss, x, Y, BATCH)(unravel(v)), v

    found, expected, v = both(X)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    along = jax.jit(lambda x: -v @ ravel_pytree(jax.grad(loss, 1)(x, Y, BATCH))[0])
    for place in ((0, 1), (3, 2)):
        step = jnp.zeros((N, T)).at[place].set(1e-5)
        np.testing.assert_allclose(found[place], (along(X + step) - along(X - step)) / 2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(N + 1,), (N, T + 1), (N, 1), (N, T, 1), ()])
def test_other_shapes_are_refused(shape):
    loss = make(weights=lambda x, batch: jnp.ones(shape))
    expected = r"for each of the 4 examples, or for each value of the output loss; got shape .*expected \(4,\) or \(4, "
    with pytest.raises(ValueError, match=expected):
        jax.eval_shape(loss, X, Y, BATCH)
    with pytest.raises(ValueError, match=expected):
        jax.eval_shape(lambda x: kronecker.factors(KEY, loss, x, Y, BATCH, fisher=exact), X)
