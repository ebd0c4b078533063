"""Inverses by Kronecker factors: dense solves, cases in which they are exact, their symmetries, and refinements."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from kfac_cases import (
    DAMPING,
    INPUTS,
    KEY,
    LABELS,
    SEQUENCES,
    WEIGHTS,
    C,
    D,
    N,
    T,
    Y,
    affine,
    applied,
    block,
    distance,
    factors,
    gauss_newton,
    index,
    inverse,
    kron,
    make,
    network,
    normal,
    rows,
    solve,
    weighted,
)

import bilevax as bx
from bilevax import curvature
from bilevax.curvature import fisher, kronecker

KFAC = bx.ihvp.kfac(damping=DAMPING, fisher=fisher.exact)
EKFAC = bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact)
BATCH = (INPUTS, LABELS)
B = jax.tree.map(np.sin, Y)
FLAT, UNRAVEL = ravel_pytree(Y)


def pooled(y, inputs):
    return network(y, inputs).mean(1)


def linear(y, inputs):
    return inputs @ y


@pytest.fixture(scope="module")
def found():
    return factors(make(weights=weighted), Y, BATCH, WEIGHTS)


def test_both_inverses_are_dense_solves(found):
    inner_loss = make(weights=weighted, l2=0.1)
    exact = inverse(bx.ihvp.kfac(damping=0.2, fisher=fisher.exact), inner_loss, Y, BATCH, WEIGHTS)
    factored = inverse(
        bx.ihvp.kfac(damping=0.2, fisher=fisher.exact, inverse=kronecker.factored), inner_loss, Y, BATCH, WEIGHTS
    )
    blocks = np.zeros_like(exact)
    for name in Y:
        entry = found[f"{name}/kernel"]
        A, B, V = np.asarray(entry.A), np.asarray(entry.B), np.ix_(index(Y, name), index(Y, name))
        identity = np.eye(V[0].size)
        np.testing.assert_allclose(exact[V], np.linalg.inv(np.kron(A, B) + DAMPING * identity), rtol=0, atol=1e-10)
        pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(B) / len(B)))
        parts = A + pi * np.sqrt(DAMPING) * np.eye(len(A)), B + np.sqrt(DAMPING) / pi * np.eye(len(B))
        np.testing.assert_allclose(factored[V], np.linalg.inv(np.kron(*parts)), rtol=0, atol=1e-10)
        blocks[V] = 1
    np.testing.assert_array_equal(exact * (1 - blocks), 0)
    np.testing.assert_array_equal(factored * (1 - blocks), 0)


def test_decay_of_each_layer_is_folded_exactly(found):
    rates = {"hidden": 0.3, "out": 0.05}
    inner_loss = make(weights=weighted, l2=lambda x: {name: dict.fromkeys(Y[name], rates[name]) for name in Y})
    got = inverse(bx.ihvp.kfac(damping=0.0, fisher=fisher.exact), inner_loss, Y, BATCH, WEIGHTS)
    for name, rate in rates.items():
        matrix = kron(found[f"{name}/kernel"])
        np.testing.assert_allclose(block(got, Y, name), np.linalg.inv(matrix + rate * np.eye(len(matrix))), atol=1e-10)


def test_damping_as_a_function_of_the_eigenvalues(found):
    """A tenth of the mean eigenvalue of each layer, which is tr A tr B over the number of entries."""
    ihvp = bx.ihvp.kfac(damping=lambda eigenvalues: 0.1 * jnp.mean(eigenvalues), fisher=fisher.exact)
    got = inverse(ihvp, make(weights=weighted, l2=0.2), Y, BATCH, WEIGHTS)
    for name in Y:
        matrix = kron(found[f"{name}/kernel"])
        delta = 0.2 + 0.1 * np.trace(matrix) / len(matrix)
        np.testing.assert_allclose(block(got, Y, name), np.linalg.inv(matrix + delta * np.eye(len(matrix))), atol=1e-10)


# Cases in which the Kronecker factors are exact.


def test_linear_regression_is_solved_exactly():
    y, batch = jnp.zeros((D, C)), (INPUTS, INPUTS)
    inner_loss = make(linear, curvature.squared_error, weights=weighted)
    G = gauss_newton(inner_loss, y, batch, WEIGHTS)
    np.testing.assert_allclose(kron(factors(inner_loss, y, batch, WEIGHTS)["y"]), G, atol=1e-14)
    expected = np.linalg.inv(G + DAMPING * np.eye(D * C))
    for ihvp in (KFAC, EKFAC):
        np.testing.assert_allclose(inverse(ihvp, inner_loss, y, batch, WEIGHTS), expected, atol=1e-10)


def test_blocks_of_one_sample_and_of_identical_inputs_are_exact():
    for inputs, labels in ((INPUTS[:1], LABELS[:1]), (jnp.tile(INPUTS[:1], (N, 1)), LABELS)):
        inner_loss, batch = make(), (inputs, labels)
        G, found = gauss_newton(inner_loss, Y, batch), factors(inner_loss, Y, batch)
        for name in Y:
            np.testing.assert_allclose(kron(found[f"{name}/kernel"]), block(G, Y, name), atol=1e-14)


def test_whitened_inputs_leave_the_factor_of_the_outputs():
    """A = I, and with equal probabilities everywhere the Hessian is I ⊗ B."""
    inputs, y = jnp.asarray(np.sqrt(8) * np.linalg.qr(normal(7, 8, D))[0]), jnp.zeros((D, C))
    inner_loss, batch = make(linear), (inputs, jnp.arange(8) % C)
    found = factors(inner_loss, y, batch)["y"]
    np.testing.assert_allclose(found.A, np.eye(D), atol=1e-14)
    hessian = jax.jit(jax.hessian(lambda flat: inner_loss(None, flat.reshape(D, C), batch)))(y.ravel())
    np.testing.assert_allclose(kron(found), hessian, atol=1e-14)
    b = normal(8, D, C)
    expected = np.linalg.solve(np.asarray(found.B) + DAMPING * np.eye(C), b.T).T
    np.testing.assert_allclose(solve(KFAC, inner_loss, y, batch, b), expected, rtol=1e-10)


def test_diagonal_blocks_of_a_deep_linear_network_are_exact():
    y = {"a": normal(7, D, 4), "b": jnp.cos(jnp.ones((4, 2))), "c": jnp.ones((2, C))}
    inner_loss = make(lambda y, inputs: inputs @ y["a"] @ y["b"] @ y["c"], curvature.squared_error)
    batch = (INPUTS, INPUTS)
    G, found, start = gauss_newton(inner_loss, y, batch), factors(inner_loss, y, batch), 0
    for name, leaf in y.items():
        own = slice(start, start := start + leaf.size)
        np.testing.assert_allclose(kron(found[name]), G[own, own], atol=1e-12 * np.abs(G).max())
        G[own, own] = 0
    assert np.abs(G).max() > 0.1  # what no block holds


MASK = jnp.asarray(np.arange(T) < np.array([[4], [1], [3], [2], [4]]))


def masked_mean(y, inputs):
    sequences, mask = inputs
    return jnp.sum(mask[:, :, None] * (sequences @ y), 1) / jnp.sum(mask, 1)[:, None]


def test_expand_is_exact_for_a_loss_of_each_position_and_reduce_for_their_mean():
    y, mask = jnp.ones((D, C)), MASK.astype(float)
    each = make(linear, curvature.squared_error, weights=weighted, mask=lambda b: b[2], split=lambda x, b: b[:2])
    mean = make(masked_mean, curvature.squared_error, weights=weighted, split=lambda x, b: ((b[0], b[2]), b[1]))
    for inner_loss, targets, right, wrong in (
        (each, SEQUENCES, curvature.expand, curvature.reduce),
        (mean, INPUTS, curvature.reduce, curvature.expand),
    ):
        batch = (SEQUENCES, targets, mask)
        G = gauss_newton(inner_loss, y, batch, WEIGHTS)
        by_name = lambda name, right=right: {"y": right}[name]  # noqa: E731
        positions = lambda b: b[2]  # noqa: E731
        exact = factors(inner_loss, y, batch, WEIGHTS, sharing=by_name, positions=positions)["y"]
        np.testing.assert_allclose(kron(exact), G, atol=1e-12)
        other = factors(inner_loss, y, batch, WEIGHTS, sharing=wrong, positions=positions)["y"]
        assert distance(kron(other), G) > 0.1
        padded = (jnp.where(MASK[:, :, None], SEQUENCES, 100.0), targets, mask)
        again = factors(inner_loss, y, padded, WEIGHTS, sharing=by_name, positions=positions)["y"]
        np.testing.assert_allclose(again.A, exact.A, atol=1e-12)


# Corrected eigenvalues.


@pytest.mark.parametrize(("model", "inputs"), [(network, INPUTS), (pooled, SEQUENCES)], ids=["examples", "positions"])
def test_corrected_eigenvalues_are_the_diagonal_of_the_block(model, inputs):
    inner_loss, batch = make(model, weights=weighted), (inputs, LABELS)
    G, found = gauss_newton(inner_loss, Y, batch, WEIGHTS), factors(inner_loss, Y, batch, WEIGHTS)
    corrected = inverse(EKFAC, inner_loss, Y, batch, WEIGHTS)
    for name in Y:
        exact, entry = block(G, Y, name), found[f"{name}/kernel"]
        Q = np.kron(np.linalg.eigh(entry.A)[1], np.linalg.eigh(entry.B)[1])
        approximation = Q @ np.diag(np.diag(Q.T @ exact @ Q)) @ Q.T
        got = np.linalg.inv(block(corrected, Y, name)) - DAMPING * np.eye(len(Q))
        np.testing.assert_allclose(got, approximation, atol=1e-10)
        assert 0 < distance(got, exact) < distance(kron(entry), exact)


# Symmetries.


def test_invariances():
    inner_loss = make(weights=weighted)

    @jax.jit
    def matrix(x, damping):
        apply = applied(bx.ihvp.kfac(damping=damping, fisher=fisher.exact), inner_loss, x, Y, BATCH)
        several = jax.vmap(lambda b: ravel_pytree(apply(UNRAVEL(b)))[0])
        return several(jnp.eye(FLAT.size)), several(jnp.stack([FLAT, 2 * FLAT + 1.0]))

    K, (v, mapped) = matrix(WEIGHTS, DAMPING)
    np.testing.assert_allclose(v, FLAT @ K, rtol=1e-10)
    np.testing.assert_allclose(mapped, (2 * FLAT + 1.0) @ K, rtol=1e-10)
    np.testing.assert_allclose(K, K.T, atol=1e-12)
    assert np.linalg.eigvalsh(K)[0] > 0
    np.testing.assert_allclose(matrix(7 * WEIGHTS, 7 * DAMPING)[0], K / 7, atol=1e-12)
    np.testing.assert_allclose(1e8 * matrix(WEIGHTS, 1e8)[0], np.eye(FLAT.size), atol=1e-6)
    np.testing.assert_allclose(matrix(0 * WEIGHTS, DAMPING)[0], np.eye(FLAT.size) / DAMPING, rtol=1e-10)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), (BATCH, WEIGHTS))
    np.testing.assert_allclose(inverse(KFAC, inner_loss, Y, *twice), K, atol=1e-12)


def test_fewer_examples_than_inputs_in_float32():
    """A has rank 2 of 51; without damping only l2 is left."""
    inputs = normal(7, 2, 50).astype(jnp.float32)
    y = {"kernel": jnp.zeros((50, 2), jnp.float32), "bias": jnp.zeros(2, jnp.float32)}
    batch, b = (inputs, jnp.array([0, 1])), jax.tree.map(jnp.ones_like, y)
    v = solve(bx.ihvp.kfac(damping=0.0, fisher=fisher.exact), make(affine, l2=1e-3), y, batch, b)
    assert {leaf.dtype for leaf in jax.tree.leaves(v)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(rows(v), np.full((51, 2), 1e3), rtol=1e-2)  # B annihilates (1, 1)


# Refinements.


def test_conjugate_gradients_with_factors():
    """As many steps as unknowns solve the system, and one step is the rescaled inverse."""
    inner_loss, b = make(weights=weighted), np.asarray(ravel_pytree(B)[0])
    G = gauss_newton(inner_loss, Y, BATCH, WEIGHTS) + DAMPING * np.eye(b.size)
    options = {"tol": 1e-13, "damping": DAMPING, "curvature": curvature.gauss_newton, "preconditioner": KFAC}
    cg = functools.partial(bx.ihvp.cg, **options)
    solvers = KFAC, cg(maxiter=1), bx.ihvp.rescaled(KFAC, damping=DAMPING), cg(maxiter=b.size)

    @jax.jit
    def run(x, y, batch, b):
        return [ravel_pytree(applied(ihvp, inner_loss, x, y, batch)(b))[0] for ihvp in solvers]

    v, once, rescaled, solved = map(np.asarray, run(WEIGHTS, Y, BATCH, B))
    np.testing.assert_allclose(solved, np.linalg.solve(G, b), rtol=0, atol=1e-8)
    np.testing.assert_allclose(rescaled, v * (v @ b) / (v @ G @ v), rtol=1e-10)
    np.testing.assert_allclose(once, rescaled, rtol=1e-10)


@pytest.mark.parametrize("loss", [curvature.softmax_cross_entropy, curvature.squared_error], ids=["softmax", "squared"])
def test_factors_save_iterations(loss):
    """Networks 8-12-5 on 200 inputs whose scales differ a hundredfold, solved as far as hypergradients need it.

    Not so with fewer examples than unknowns, or close to machine precision: there plain iterations are as good.
    """
    seeds, damping, inner_loss = 6, 1e-3, make(loss=loss)
    y = {
        "hidden": {"bias": jnp.zeros((seeds, 12)), "kernel": normal(0, seeds, 8, 12) / 3},
        "out": {"bias": jnp.zeros((seeds, 5)), "kernel": normal(1, seeds, 12, 5) / 3},
    }
    inputs = normal(2, seeds, 200, 8) * jnp.geomspace(10, 0.1, 8)[None, None]
    labels = jnp.tile(jnp.arange(200)[None] % 5, (seeds, 1))
    batch = (inputs, labels if loss is curvature.softmax_cross_entropy else jax.nn.one_hot(labels, 5))
    b = jax.tree.map(lambda leaf: normal(3, *leaf.shape), y)

    @jax.jit
    @jax.vmap
    def run(y, batch, b):
        preconditioners = (None, bx.ihvp.kfac(damping=damping, fisher=fisher.exact))
        solvers = [
            bx.ihvp.cg(maxiter=400, tol=0.1, damping=damping, curvature=curvature.gauss_newton, preconditioner=choice)
            for choice in preconditioners
        ]
        return [ihvp.prepare(KEY, (), inner_loss, (None, y, batch))[0](b)[1] for ihvp in solvers]

    plain, preconditioned = run(y, batch, b)
    assert (preconditioned.iterations < plain.iterations).all()
    assert max(plain.residual.max(), preconditioned.residual.max()) <= 0.1
