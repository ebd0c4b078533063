"""Kronecker factors against numbers known by hand and against sums over examples and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from kfac_cases import (
    DAMPING,
    IMAGES,
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
    curved,
    factors,
    inverse,
    make,
    normal,
    rows,
    solve,
    weighted,
)

import bilevax as bx
from bilevax import curvature
from bilevax.curvature import fisher, kronecker

IDS = jnp.array([[0, 0, 1], [2, 1, 0]])
LOSS = make(weights=weighted)


def mixed(y, inputs):
    """Outputs [N, T, C] of which each depends on all positions."""
    hidden = jnp.tanh(affine(y["hidden"], inputs))
    return affine(y["out"], hidden + jnp.cumsum(hidden**2, axis=1))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_weighted_ridge_regression(dtype):
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-5
    inner_loss = make(lambda y, inputs: inputs @ y, curvature.squared_error, weights=weighted, l2=0.5)
    y, batch, x = jnp.full((1, 1), 0.5, dtype), (jnp.array([[1], [2]], dtype), jnp.ones((2, 1), dtype)), [1, 0.5]
    found = factors(inner_loss, y, batch, jnp.array(x, dtype))["y"]
    np.testing.assert_allclose((found.A[0, 0], found.B[0, 0]), (2.0, 0.75), rtol=tolerance)
    solver = bx.inner.implicit(inner_loss, ihvp=bx.ihvp.kfac(damping=0.0, fisher=fisher.exact))
    hypergrad = bx.hypergradient(lambda x, y, batch: 0.5 * jnp.sum(y**2), solver)
    x = jnp.array(x, dtype)
    grad, state, info = jax.jit(hypergrad.estimate)(KEY, hypergrad.init(x, y), x, bx.Batch(None, batch))
    np.testing.assert_allclose(state.solver.v, [[0.25]], rtol=tolerance)
    np.testing.assert_allclose(grad, [1 / 16, 0.0], atol=tolerance)
    assert grad.dtype == state.solver.v.dtype == dtype
    assert not info.inner.breakdown


def test_proximal_term():
    inner_loss = make(lambda y, inputs: inputs @ y, curvature.squared_error, l2=0.5, center=lambda x: x)
    solver = bx.inner.implicit(inner_loss, ihvp=bx.ihvp.kfac(damping=0.0, fisher=fisher.exact))
    hypergrad = bx.hypergradient(lambda x, y, batch: 0.5 * jnp.sum((y - 1) ** 2), solver)
    x, y, batch = jnp.zeros((1, 1)), jnp.full((1, 1), 0.5), (jnp.array([[1.0], [2.0]]), jnp.ones((2, 1)))
    grad, state, _ = jax.jit(hypergrad.estimate)(KEY, hypergrad.init(x, y), x, bx.Batch(None, batch))
    np.testing.assert_allclose(state.solver.v, [[-1 / 6]], rtol=1e-12)
    np.testing.assert_allclose(grad, [[-1 / 12]], rtol=1e-12)


def softmax_at_zero(dtype=jnp.float64):
    y = {"kernel": jnp.zeros((1, 2), dtype), "bias": jnp.zeros(2, dtype)}
    b = {"kernel": jnp.array([[1, -1]], dtype), "bias": jnp.array([1, 0], dtype)}
    return make(affine), y, (jnp.array([[1], [2]], dtype), jnp.array([0, 1])), b


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_softmax_with_both_kinds_of_damping(dtype):
    tolerance = 1e-8 if dtype == jnp.float64 else 1e-5  # eight digits of the factored solve are given below
    inner_loss, y, batch, b = softmax_at_zero(dtype)
    found = factors(inner_loss, y, batch)["kernel"]
    np.testing.assert_allclose(found.A, [[2.5, 1.5], [1.5, 1.0]], rtol=tolerance)
    np.testing.assert_allclose(found.B, np.array([[1, -1], [-1, 1]]) / 4, rtol=tolerance)
    v = solve(bx.ihvp.kfac(damping=0.25, fisher=fisher.exact), inner_loss, y, batch, b)
    np.testing.assert_allclose(rows(v), [[2 / 3, -2 / 3], [2.0, 2.0]], rtol=tolerance)
    factored = bx.ihvp.kfac(damping=0.25, fisher=fisher.exact, inverse=kronecker.factored)
    v = solve(factored, inner_loss, y, batch, b)
    expected = [[-0.25425539, -0.94290545], [1.61560198, 1.43546270]]
    np.testing.assert_allclose(rows(v), expected, rtol=0, atol=tolerance)
    assert v["bias"].dtype == dtype


@pytest.mark.compiles(250)  # operation by operation
def test_softmax_at_zero_is_the_hessian_and_jit_changes_nothing():
    inner_loss, y, batch, b = softmax_at_zero()
    ihvp = bx.ihvp.kfac(damping=0.25, fisher=fisher.exact)
    flat, unravel = ravel_pytree(y)
    hessian = jax.jit(jax.hessian(lambda flat: inner_loss(None, unravel(flat), batch)))(flat)
    expected = np.linalg.solve(hessian + 0.25 * np.eye(4), ravel_pytree(b)[0])
    np.testing.assert_allclose(ravel_pytree(solve(ihvp, inner_loss, y, batch, b))[0], expected, rtol=1e-10)
    apply, _ = ihvp.prepare(KEY, ihvp.init(None, y, batch, inner_loss), inner_loss, (None, y, batch))
    v, info = apply(b)
    np.testing.assert_allclose(ravel_pytree(v)[0], expected, rtol=1e-10)
    assert not info.breakdown


def test_exact_empirical_and_sampled_pseudo_gradients():
    y = {"kernel": jnp.zeros((1, 2)), "bias": jnp.log(jnp.array([4.0, 1.0]))}
    batch, sign = (jnp.array([[1.0], [3.0]]), jnp.array([0, 1])), np.array([[1, -1], [-1, 1]])
    np.testing.assert_allclose(factors(make(affine), y, batch)["kernel"].B, 0.16 * sign, rtol=1e-12)
    empirical = factors(make(affine), y, batch, fisher=fisher.empirical)["kernel"].B
    np.testing.assert_allclose(empirical, 0.34 * sign, rtol=1e-12)
    draw = lambda key: kronecker.factors(key, make(affine), None, y, batch)["kernel"].B[0, 0]  # noqa: E731
    draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 4000)))
    values = np.array([0.04, 0.34, 0.64])
    nearest = values[np.abs(draws[:, None] - values).argmin(1)]
    np.testing.assert_allclose(draws, nearest, rtol=1e-10)
    assert set(nearest) == set(values)
    np.testing.assert_allclose(draws.mean(), 0.16, atol=5 * 0.17 / np.sqrt(4000))


def test_eigenvalue_corrected_factors_of_orthogonal_inputs():
    inner_loss, y = make(lambda y, inputs: inputs @ y, weights=weighted), jnp.zeros((2, 2))
    batch, x = (jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([0, 1])), jnp.array([1.0, 3.0])
    found = factors(inner_loss, y, batch, x)["y"]
    np.testing.assert_allclose(found.A, np.diag([0.25, 3.0]), atol=1e-12)
    np.testing.assert_allclose(found.B, np.array([[1, -1], [-1, 1]]) / 2, rtol=1e-12)
    v = solve(
        bx.ihvp.ekfac(damping=0.25, fisher=fisher.exact), inner_loss, y, batch, jnp.array([[1.0, -1.0], [3.0, 1.0]]), x
    )
    # E = [[0, 1/4], [0, 3]] in the basis (1, 1), (1, −1) of the classes.
    np.testing.assert_allclose(v, [[2.0, -2.0], [8 + 1 / 3.25, 8 - 1 / 3.25]], rtol=1e-10)


def convolution(y, inputs, strides=(1, 1), padding="VALID"):
    return jax.lax.conv_general_dilated(inputs, y, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_convolution_of_one_pixel():
    image, kernel = jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None], jnp.zeros((1, 1, 1, 1))
    each = make(convolution, curvature.squared_error)
    mean = make(lambda y, inputs: convolution(y, inputs).mean((1, 2)), curvature.squared_error)
    batch, pooled = (image, image), (image, jnp.zeros((1, 1)))
    for inner_loss, data, sharing, expected in [
        (each, batch, curvature.expand, (7.5, 4.0)),
        (mean, pooled, curvature.reduce, (6.25, 1.0)),
        (mean, pooled, curvature.expand, (7.5, 0.25)),
    ]:
        found = factors(inner_loss, kernel, data, sharing=sharing)["y"]
        np.testing.assert_allclose((found.A[0, 0], found.B[0, 0]), expected, rtol=1e-12)


def test_embedding_is_a_dense_layer_of_one_hot_inputs():
    gathered = make(lambda y, ids: y[ids], curvature.squared_error)
    dense = make(lambda y, ids: jax.nn.one_hot(ids, 3, dtype=y.dtype) @ y, curvature.squared_error)
    batch = (IDS, jnp.zeros((2, 3, 1)))
    table = jnp.array([[1.0], [2.0], [3.0]])
    found, reference = (factors(inner_loss, table, batch)["y"] for inner_loss in (gathered, dense))
    np.testing.assert_allclose(found.A, [1 / 2, 1 / 3, 1 / 6], rtol=1e-12)
    np.testing.assert_allclose(found.B, [[3.0]], rtol=1e-12)
    np.testing.assert_allclose(reference.A, np.diag(found.A), rtol=1e-12)
    for ihvp in (
        bx.ihvp.kfac(damping=DAMPING, fisher=fisher.exact),
        bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact),
    ):
        got, expected = (inverse(ihvp, inner_loss, table, batch) for inner_loss in (gathered, dense))
        np.testing.assert_allclose(got, expected, rtol=1e-10)


# Factors as sums over examples and positions.

LOSSES = {
    "softmax": (curvature.softmax_cross_entropy, LABELS),
    "sigmoid": (curvature.sigmoid_cross_entropy, jax.nn.sigmoid(INPUTS)),
    "squared": (curvature.squared_error, INPUTS),
    "convex": (
        curvature.convex(lambda z, t: jnp.sum(jnp.logaddexp(z - t, t - z), -1) + jnp.sum(z, -1) ** 2),
        INPUTS,
    ),
}


def shifted(model_name):
    """The network with a shift of each pre-activation, whose derivative is the pseudo-gradients' Jacobian."""

    def model(shift, inputs):
        before = affine(Y["hidden"], inputs) + shift["hidden"]
        hidden = jnp.tanh(before)
        hidden = hidden + jnp.cumsum(hidden**2, axis=1) if model_name == "mixed" else hidden
        return affine(Y["out"], hidden) + shift["out"], {"hidden": inputs, "out": hidden}

    return model


def brute_force(inner_loss, batch, x, model_name="network"):
    """A = Σ q a aᵀ over all positions, and B = 1/N Σ w uuᵀ, with u through the Jacobian at each position alone."""
    lead, model = batch[0].shape[:-1], shifted(model_name)
    zero = {"hidden": jnp.zeros((*lead, 4)), "out": jnp.zeros((*lead, C))}

    @jax.jit
    def sums(x, batch):
        outputs, activations = model(zero, batch[0])
        jacobian = jax.jacobian(lambda shift: model(shift, batch[0])[0])(zero)
        by_position = {k: J.reshape(*outputs.shape, -1, J.shape[-1]) for k, J in jacobian.items()}
        return activations, {k: curved(inner_loss, J, outputs, batch[1], x, batch) for k, J in by_position.items()}

    activations, B = sums(x, batch)
    weight, found = np.repeat(np.asarray(x), int(np.prod(lead[1:]))), {}
    for name, act in activations.items():
        a = np.append(np.asarray(act).reshape(-1, act.shape[-1]), np.ones((weight.size, 1)), axis=1)
        A = sum(w * np.outer(row, row) for w, row in zip(weight, a, strict=True)) / weight.sum()
        found[f"{name}/kernel"] = A, B[name]
    return found


@pytest.mark.parametrize("kind", LOSSES)
def test_factors_are_sums_over_weighted_examples(kind):
    loss, targets = LOSSES[kind]
    inner_loss, batch = make(loss=loss, weights=weighted), (INPUTS, targets)
    found = factors(inner_loss, Y, batch, WEIGHTS)
    expected = brute_force(inner_loss, batch, WEIGHTS)
    assert set(found) == set(expected)
    for name, (A, B) in expected.items():
        np.testing.assert_allclose(found[name].A, A, atol=1e-12)
        np.testing.assert_allclose(found[name].B, B, atol=1e-12)


def test_factors_are_sums_over_positions_that_see_each_other():
    batch = (SEQUENCES, jnp.arange(N * T).reshape(N, T) % C)
    inner_loss = make(mixed, weights=weighted)
    found = factors(inner_loss, Y, batch, WEIGHTS)
    for name, (A, B) in brute_force(inner_loss, batch, WEIGHTS, "mixed").items():
        np.testing.assert_allclose(found[name].A, A, atol=1e-12)
        np.testing.assert_allclose(found[name].B, B, atol=1e-12)


def test_a_convolution_is_a_dense_layer_of_patches():
    strides, padding = (2, 1), ((1, 0), (0, 1))

    def convolved(y, inputs):
        z = convolution(y["kernel"], inputs, strides, padding) + y["bias"].reshape(1, 1, 1, -1)
        return jnp.tanh(z).mean((1, 2))

    def dense(y, patches):
        return jnp.tanh(affine(y, patches)).mean(1)

    padded = np.pad(IMAGES, ((0, 0), *padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 2), axis=(1, 2))[:, ::2]  # [2, 2, 3, c_in, kh, kw]
    patches = jnp.asarray(windows.reshape(2, -1, 2 * 3 * 2))
    y = {"kernel": jnp.cos(jnp.arange(36.0)).reshape(3, 2, 2, 3), "bias": jnp.arange(3.0)}
    flat = {"kernel": y["kernel"].transpose(2, 0, 1, 3).reshape(-1, 3), "bias": y["bias"]}
    losses, data = (make(convolved), make(dense)), ((IMAGES, LABELS[:2]), (patches, LABELS[:2]))
    got, expected = (factors(*each)["kernel"] for each in zip(losses, (y, flat), data, strict=True))
    a = np.append(patches.reshape(-1, 12), np.ones((12, 1)), axis=1)
    np.testing.assert_allclose(got.A, a.T @ a / 12, atol=1e-12)
    np.testing.assert_allclose(expected.A, a.T @ a / 12, atol=1e-12)
    np.testing.assert_allclose(got.B, expected.B, atol=1e-12)
    b = jax.tree.map(jnp.sin, y)
    flat_b = {"kernel": b["kernel"].transpose(2, 0, 1, 3).reshape(-1, 3), "bias": b["bias"]}
    for ihvp in (
        bx.ihvp.kfac(damping=DAMPING, fisher=fisher.exact),
        bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact),
    ):
        v = solve(ihvp, losses[0], y, data[0], b)
        reference = solve(ihvp, losses[1], flat, data[1], flat_b)
        np.testing.assert_allclose(v["kernel"].transpose(2, 0, 1, 3).reshape(-1, 3), reference["kernel"], rtol=1e-9)
        np.testing.assert_allclose(v["bias"], reference["bias"], rtol=1e-9)


def test_weights_are_repeated_examples():
    x, repeated = jnp.array([1.0, 0.0, 3.0, 0.0, 1.0]), jnp.array([0, 2, 2, 2, 4])
    again, ihvp = (INPUTS[repeated], LABELS[repeated]), bx.ihvp.ekfac(damping=DAMPING, fisher=fisher.exact)
    got, expected = factors(LOSS, Y, (INPUTS, LABELS), x), factors(make(), Y, again)
    for name in expected:
        np.testing.assert_allclose(got[name].A, expected[name].A, atol=1e-12)
        np.testing.assert_allclose(got[name].B, expected[name].B, atol=1e-12)
    corrected = inverse(ihvp, LOSS, Y, (INPUTS, LABELS), x), inverse(ihvp, make(), Y, again)
    np.testing.assert_allclose(*corrected, atol=1e-10)


def test_sums_of_agents_average_to_those_of_all_data():
    """What a gossip of factors relies on; every agent has weights of its own."""
    inputs, x = normal(7, 3, N, D), jnp.linspace(0.1, 3.0, 3 * N)
    labels = jnp.tile(LABELS[None], (3, 1))
    parts = jax.jit(jax.vmap(lambda x, batch: kronecker.factors(None, LOSS, x, Y, batch, fisher=fisher.exact)))
    mean = jax.tree.map(lambda leaf: leaf.mean(0), parts(x.reshape(3, N), (inputs, labels)))
    together = factors(LOSS, Y, (inputs.reshape(-1, D), labels.reshape(-1)), x)
    for name, entry in together.items():
        np.testing.assert_allclose(mean[name].A, entry.A, rtol=1e-10)
        np.testing.assert_allclose(mean[name].B, entry.B, rtol=1e-10, atol=1e-14)


def test_samples_converge_to_the_exact_factors():
    """E‖B_sampled − B‖² = 1/(N² samples) Σ_n (Σ_c p_c |e_c − p|⁴ − ‖L_n‖²)."""
    inputs, y = normal(7, 12, D), normal(8, D, C)
    inner_loss, batch = make(lambda y, inputs: inputs @ y), (inputs, jnp.zeros(12, int))
    p = np.asarray(jax.nn.softmax(inputs @ y))
    L = np.einsum("nc,cd->ncd", p, np.eye(C)) - np.einsum("nc,nd->ncd", p, p)
    fourth = np.sum(p * np.sum((np.eye(C)[None] - p[:, None]) ** 2, axis=2) ** 2, axis=1)
    variance = np.sum(fourth - np.sum(L**2, axis=(1, 2))) / 12**2

    def mean_square_error(samples):
        choice = fisher.sampled(samples)
        draw = lambda key: kronecker.factors(key, inner_loss, None, y, batch, fisher=choice)["y"].B  # noqa: E731
        drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 20)))
        return np.sum((drawn - L.mean(0)[None]) ** 2) / 20

    for samples in (1, 10, 1000):
        np.testing.assert_allclose(mean_square_error(samples), variance / samples, rtol=0.5)
