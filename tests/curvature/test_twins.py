"""A leaf that is used as a matrix and as its transpose: a table that is the output layer too, an autoencoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import KEY, captured, corrected, gauss_newton, kfac, make

from bilevax import curvature
from bilevax.curvature import kronecker

N, V, D = 6, 5, 3
X, LABELS = jnp.linspace(-0.5, 0.5, N), jnp.arange(N) % V
TOKENS, ROWS = jnp.minimum(jnp.arange(N), 2), jax.random.normal(jax.random.key(0), (N, V))
DRAWN = np.random.default_rng(0).normal(0, 0.7, (V * D + D * D,))
Y = {"twice": jnp.asarray(DRAWN[: V * D].reshape(V, D)), "mix": jnp.asarray(DRAWN[V * D :].reshape(D, D))}


def read(table, mix, head, tokens):
    return jnp.tanh(table[tokens] @ mix) @ head.T


def encode(w, mix, other, a):
    return jnp.tanh(jnp.tanh(a @ w) @ mix) @ other.T


CASES = {"table": (read, TOKENS), "autoencoder": (encode, ROWS)}


def both(name):
    """The model, the same with a leaf of its own for each use, and their inner variables."""
    model, inputs = CASES[name]
    tied = lambda y, a: model(y["twice"], y["mix"], y["twice"], a)  # noqa: E731
    untied = lambda y, a: model(y["first"], y["mix"], y["other"], a)  # noqa: E731
    return tied, untied, {"first": Y["twice"], "mix": Y["mix"], "other": Y["twice"]}, (inputs, LABELS)


def joint_basis(found):
    """Eigenvectors of the sums of both factors on the left, and on the right, each times the mean of its partner."""
    A, B, other_A, other_B = (np.asarray(found[name][k]) for name in ("twice", "twice.T") for k in (0, 1))
    mean = lambda M: (M if M.ndim == 1 else np.diag(M)).mean()  # noqa: E731
    left = None if A.ndim == 1 else np.linalg.eigh(A * mean(B) + other_B * mean(other_A))[1]
    right = np.linalg.eigh(B * mean(A) + other_A * mean(other_B))[1]
    ql = np.eye(len(A)) if left is None else left
    diagonal = lambda Q, M: M if M.ndim == 1 else np.einsum("ij,ik,kj->j", Q, M, Q)  # noqa: E731
    values = np.outer(diagonal(ql, A), diagonal(right, B)) + np.outer(diagonal(ql, other_B), diagonal(right, other_A))
    return ql, right, values


@pytest.mark.parametrize("name", CASES)
def test_both_uses_are_inverted_together(name):
    tied, untied, apart, batch = both(name)
    found, expected = captured(tied, X, Y, batch), captured(untied, X, apart, batch)
    assert set(found) == {"mix", "twice", "twice.T"}
    np.testing.assert_allclose(found["twice"].A, expected["first"].A, rtol=1e-10)
    np.testing.assert_allclose(found["twice"].B, expected["first"].B, rtol=1e-10)
    np.testing.assert_allclose(found["twice.T"].A, expected["other"].A, rtol=1e-10)
    B = np.asarray(expected["other"].B)
    np.testing.assert_allclose(found["twice.T"].B, np.diag(B) if name == "table" else B, rtol=1e-10)

    pairs = {name: (entry.A, entry.B) for name, entry in found.items()}
    left, right, values = joint_basis(pairs)
    b = jax.tree.map(jnp.cos, Y)
    v, _ = kfac(tied, X, Y, b, batch)
    expected = left @ ((left.T @ np.asarray(b["twice"]) @ right) / (values + 0.75)) @ right.T
    np.testing.assert_allclose(v["twice"], expected, rtol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_corrected_eigenvalues_are_the_diagonal_of_the_dense_matrix(name):
    """In the joint basis; each use counts as a leaf of its own."""
    tied, untied, apart, batch = both(name)

    @jax.jit
    def eigenvalues(x, y, batch):
        found = kronecker.factors(KEY, make(tied), x, y, batch, fisher=curvature.fisher.exact)
        bases = {"twice": curvature.inverse.joint(found["twice"], found["twice.T"])}
        bases["mix"] = kronecker.spectral.decompose(found["mix"].A, found["mix"].B, 0.0)
        return bases["twice"], corrected(KEY, make(tied), x, y, batch, bases)["twice"]

    basis, found = jax.device_get(eigenvalues(X, Y, batch))
    G, size = np.asarray(gauss_newton(untied, X, apart, batch)), V * D
    both_uses = (G[:size, :size] + G[-size:, -size:]).reshape(V, D, V, D)
    ql = np.eye(V) if basis.qa is None else basis.qa
    expected = np.einsum("ai,bj,abcd,ci,dj->ij", ql, basis.qb, both_uses, ql, basis.qb, optimize=True)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_table_that_is_the_output_layer_is_closer_than_its_diagonal():
    tied, _, _, batch = both("table")
    G = np.asarray(gauss_newton(tied, X, Y, batch))[-V * D :, -V * D :] + 0.75 * np.eye(V * D)
    b = jax.device_get(jax.jit(jax.grad(lambda y: make(tied)(X, y, (TOKENS[::-1], LABELS))))(Y))
    exact = np.linalg.solve(G, np.ravel(b["twice"]))
    v, _ = kfac(tied, X, Y, b, batch)

    def cosine(a):
        return np.ravel(a) @ exact / np.linalg.norm(a) / np.linalg.norm(exact)

    assert cosine(v["twice"]) > cosine(np.ravel(b["twice"]) / np.diag(G)) > 0.5
