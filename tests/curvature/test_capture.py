"""What the capture sees through, what it takes for a diagonal, and what it refuses or leaves to `unsupported`."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blocks import (
    assert_equal_factors,
    assert_same,
    block,
    by_perturbation,
    captured,
    gauss_newton,
    kfac,
    make,
    untapped,
)
from flax import linen as nn
from flax.traverse_util import flatten_dict
from models import (
    CELL,
    HEAD,
    INPUTS,
    LABELS,
    LAYERS,
    SEQUENCES,
    STACKED,
    TWO_WAYS,
    C,
    D,
    T,
    X,
    Y,
    dense,
    features_first,
    mlp,
    recurrent,
    recurrent_scan,
    residual_scan,
    residual_stack,
    twice,
    twice_in_two_ways,
    with_views,
)

from bilevax import curvature

# One network, written in many ways


@jax.custom_jvp
def custom_tanh(a):
    return jnp.tanh(a)


@custom_tanh.defjvp
def _(primals, tangents):
    z = jnp.tanh(primals[0])
    return z, (1 - z**2) * tangents[0]


@jax.custom_vjp
def custom_layer(layer, a):
    return dense(layer, a)


custom_layer.defvjp(lambda layer, a: jax.vjp(dense, layer, a), lambda pull, u: pull(u))


class Wrapped(nn.Module):
    """Rematerialized, jitted, and with dropout that is switched off."""

    @nn.compact
    def __call__(self, a):
        a = nn.Dropout(0.5, deterministic=True)(nn.tanh(nn.remat(nn.Dense)(5, name="hidden")(a)))
        return nn.jit(nn.Dense)(C, name="out")(a)


WRITTEN = {
    "checkpoint": jax.checkpoint(mlp),
    "checkpoint of a layer": lambda y, a: dense(y["out"], jnp.tanh(jax.checkpoint(dense)(y["hidden"], a))),
    "jit": jax.jit(mlp),
    "jit in jit": jax.jit(lambda y, a: jax.jit(dense)(y["out"], jnp.tanh(jax.jit(dense)(y["hidden"], a)))),
    "custom_jvp": lambda y, a: mlp(y, a, activation=custom_tanh),
    "custom_vjp": lambda y, a: custom_layer(y["out"], jnp.tanh(custom_layer(y["hidden"], a))),
    "features first": features_first,
    "views": with_views,
    "linen": lambda y, a: Wrapped().apply({"params": y}, a),
}
WRITTEN_FOR_SEQUENCES = {
    "merged axes": lambda y, a: mlp(y, a.reshape(-1, D)).reshape(*a.shape[:2], C).mean(1),
    "time major": lambda y, a: mlp(y, a.swapaxes(0, 1)).mean(0),
    "vmap over time": lambda y, a: jax.vmap(mlp, (None, 1), 1)(y, a).mean(1),
    "vmap over examples": lambda y, a: jax.vmap(mlp, (None, 0))(y, a).mean(1),
    "one after the other": lambda y, a: sum(mlp(y, a[:, t]) for t in range(T)) / T,
    "scan over time": lambda y, a: jax.lax.scan(lambda c, a: (c, mlp(y, a)), None, a.swapaxes(0, 1))[1].mean(0),
}


@functools.cache
def expected(sequences):
    if not sequences:
        return captured(mlp, X, Y, (INPUTS, LABELS))
    return captured(lambda y, a: mlp(y, a).mean(1), X, Y, (SEQUENCES, LABELS))


@pytest.mark.parametrize("model", WRITTEN.values(), ids=WRITTEN)
def test_transformations_leave_the_factors_as_they_are(model):
    np.testing.assert_allclose(model(Y, INPUTS), mlp(Y, INPUTS), atol=1e-12)
    assert_equal_factors(captured(model, X, Y, (INPUTS, LABELS)), expected(sequences=False))


@pytest.mark.parametrize("model", WRITTEN_FOR_SEQUENCES.values(), ids=WRITTEN_FOR_SEQUENCES)
def test_layouts_of_sequences_leave_the_factors_as_they_are(model):
    np.testing.assert_allclose(model(Y, SEQUENCES), mlp(Y, SEQUENCES).mean(1), atol=1e-12)
    assert_equal_factors(captured(model, X, Y, (SEQUENCES, LABELS)), expected(sequences=True))


def test_float32_parameters_in_a_float64_model():
    """Casts are views: the factors are those of the numbers that the model computes with."""
    narrow = optax.tree.cast(Y, jnp.float32)
    wide = optax.tree.cast(narrow, jnp.float64)
    found = captured(lambda y, a: mlp(optax.tree.cast(y, jnp.float64), a), X, narrow, (INPUTS, LABELS))
    assert_equal_factors(found, captured(mlp, X, wide, (INPUTS, LABELS)), atol=2e-6)


def test_half_precision_model_with_float32_parameters():
    y, x, inputs = optax.tree.cast((Y, X, INPUTS), jnp.float32)
    half = lambda y, a: mlp(*optax.tree.cast((y, a), jnp.bfloat16))  # noqa: E731
    for name, entry in captured(half, x, y, (inputs, LABELS)).items():
        for found, wide in zip(entry[:2], expected(sequences=False)[name][:2], strict=True):
            assert found.dtype == jnp.float32
            assert np.linalg.norm(found - wide) < 0.03 * np.linalg.norm(wide)


# Layers used again and again


@pytest.mark.parametrize(
    "scanned",
    [residual_scan, jax.checkpoint(residual_scan), jax.jit(residual_scan)],
    ids=["scan", "checkpoint", "jit"],
)
def test_scan_over_stacked_layers_equals_the_loop(scanned):
    found = captured(scanned, X, STACKED, (INPUTS, LABELS))
    *layers, head = by_perturbation(residual_stack, X, {"layers": LAYERS, "out": HEAD}, (INPUTS, LABELS))
    assert set(found) == {"layers/kernel", "out/kernel"}
    assert_same(found["out/kernel"], *head)
    for number, (A, B) in enumerate(layers):
        np.testing.assert_allclose(found["layers/kernel"].A[number], A, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found["layers/kernel"].B[number], B, rtol=0, atol=1e-12)


def test_solution_for_stacked_layers_equals_that_of_the_loop():
    def unstack(tree):
        return {"layers": [jax.tree.map(operator.itemgetter(n), tree["layers"]) for n in range(3)], "out": tree["out"]}

    b = jax.tree.map(jnp.sin, STACKED)
    v, _ = kfac(residual_scan, X, STACKED, b, (INPUTS, LABELS))
    loop, _ = kfac(residual_stack, X, unstack(STACKED), unstack(b), (INPUTS, LABELS))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), unstack(v), loop)


@pytest.mark.parametrize("model", [recurrent, recurrent_scan])
def test_recurrent_cell_adds_up_over_time(model):
    """The steps of a cell are its positions: A is their mean, B their sum."""
    y, batch = CELL, (SEQUENCES, LABELS)
    *steps, head = by_perturbation(recurrent, X, y, batch)
    found = captured(model, X, y, batch)
    assert set(found) == {"cell/kernel", "inputs", "out/kernel"}
    for name, layer in (("inputs", steps[::2]), ("cell/kernel", steps[1::2])):
        assert_same(found[name], sum(A for A, _ in layer) / T, sum(B for _, B in layer))
    assert_same(found["out/kernel"], *head)


def test_tied_dense_layers_count_double():
    tied, y, batch = twice, {"twice": LAYERS[0], "out": HEAD}, (INPUTS, LABELS)
    (A1, B1), (A2, B2), head = by_perturbation(tied, X, y, batch)
    for found in (
        captured(tied, X, y, batch),
        captured(functools.partial(tied, observe=curvature.observe), X, y, batch),
    ):
        assert_same(found["twice/kernel"], (A1 + A2) / 2, B1 + B2)
        assert_same(found["out/kernel"], *head)


def test_a_kernel_of_a_convolution_and_of_a_layer_is_one_matrix():
    """Rules may differ where rows and columns of the matrix are the same: each position is a row of A."""
    tied, y = twice_in_two_ways, TWO_WAYS
    (A1, B1), (A2, B2), head = by_perturbation(tied, X, y, (SEQUENCES, LABELS))
    found = captured(tied, X, y, (SEQUENCES, LABELS))
    assert_same(found["twice"], (T * A1 + A2) / (T + 1), B1 + B2)
    assert_same(found["out/kernel"], *head)


# Leaves with a diagonal block


# Explicit taps


def sum_of_products(y, a, observe=untapped):
    """A dense layer in disguise: for the walk, its kernel is an elementwise factor."""
    z = jnp.sum(a[:, :, None] * y["hidden"]["kernel"][None], 1) + y["hidden"]["bias"][None]
    return dense(y["out"], jnp.tanh(observe(z, a, y["hidden"]["kernel"], y["hidden"]["bias"])), observe)


def test_a_tap_says_what_a_layer_is():
    batch = (INPUTS, LABELS)
    tapped = functools.partial(sum_of_products, observe=curvature.observe)
    assert_equal_factors(captured(tapped, X, Y, batch), expected(sequences=False))
    G = gauss_newton(mlp, X, Y, batch)
    exact = np.diag(block(G, Y, lambda y: y["hidden"]["kernel"]))
    found = captured(sum_of_products, X, Y, batch)["hidden/kernel"]
    np.testing.assert_allclose(found.diagonal.ravel(), exact, rtol=0, atol=1e-12)


def test_a_tap_is_the_identity_for_everybody_else():
    tapped = functools.partial(mlp, observe=curvature.observe)
    direction = jax.tree.map(jnp.sin, Y)

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(model, y, batch):
        loss = lambda y: make(model)(X, y, batch)  # noqa: E731
        value, grad = jax.value_and_grad(loss)(y)
        tangent = jax.jvp(loss, (y,), (direction,))
        hvp = jax.jvp(jax.grad(loss), (y,), (direction,))
        product = curvature.gauss_newton(make(model), X, y, batch)(direction)
        agents = jax.vmap(jax.grad(loss))(jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), y))
        return value, grad, tangent, hvp, product, agents

    batch = (INPUTS, LABELS)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12), all_of(tapped, Y, batch), all_of(mlp, Y, batch)
    )


def test_flat_names_reach_each_leaf():
    """A y that is one array is called "y"; nested containers are joined by slashes."""
    assert set(captured(lambda y, a: a @ y, X, Y["out"]["kernel"][:D], (INPUTS, LABELS))) == {"y"}
    nested = {"a": [Y["hidden"], (Y["out"],)]}
    found = captured(lambda y, a: mlp({"hidden": y["a"][0], "out": y["a"][1][0]}, a), X, nested, (INPUTS, LABELS))
    assert set(found) == {"a/0/kernel", "a/1/0/kernel"}
    assert set(flatten_dict(Y, sep="/")) > set(expected(sequences=False))
