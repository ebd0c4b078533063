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
    covered,
    gauss_newton,
    kfac,
    make,
    untapped,
)
from flax import linen as nn
from flax.traverse_util import flatten_dict

from bilevax import curvature

N, T, D, C = 4, 3, 2, 3
X = jnp.asarray(np.linspace(-0.5, 0.5, N))
LABELS = jnp.asarray(np.array([0, 2, 1, 1]))


def normal(seed, **shapes):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}


INPUTS, SEQUENCES = normal(1, inputs=(N, D), sequences=(N, T, D)).values()


Y = {"hidden": normal(3, kernel=(D, 5), bias=(5,)), "out": normal(4, kernel=(5, C), bias=(C,))}


def dense(layer, a, observe=untapped):
    z = a @ layer["kernel"] + jnp.expand_dims(layer["bias"], tuple(range(a.ndim - 1)))
    return observe(z, a, layer["kernel"], layer["bias"])


def mlp(y, a, activation=jnp.tanh, observe=untapped):
    return dense(y["out"], activation(dense(y["hidden"], a, observe)), observe)


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


def features_first(y, a):
    a = jnp.tanh(y["hidden"]["kernel"].T @ a.T + y["hidden"]["bias"][:, None])
    return (y["out"]["kernel"].T @ a + y["out"]["bias"][:, None]).T


def with_views(y, a):
    """Kernels that are flattened, squeezed, transposed and cast on their way."""
    kernel = y["hidden"]["kernel"].reshape(-1).reshape(1, D, 5).squeeze(0).T
    z = jnp.einsum("nd,ed->ne", a, kernel) + jnp.broadcast_to(y["hidden"]["bias"], (N, 5))
    out = jnp.asarray(y["out"]["kernel"][None], jnp.float64).squeeze(0).astype(float)
    return jnp.tanh(z) @ out + jax.lax.expand_dims(y["out"]["bias"], (0,))


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
    "custom_jvp": lambda y, a: mlp(y, a, custom_tanh),
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


def residual_stack(y, a, observe=untapped):
    for layer in y["layers"]:
        a = a + jnp.tanh(dense(layer, a, observe))
    return dense(y["out"], a, observe)


def residual_scan(y, a):
    a, _ = jax.lax.scan(lambda a, layer: (a + jnp.tanh(dense(layer, a)), None), a, y["layers"])
    return dense(y["out"], a)


LAYERS = [normal(seed, kernel=(D, D), bias=(D,)) for seed in (5, 6, 7)]
HEAD = normal(8, kernel=(D, C), bias=(C,))
STACKED = {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *LAYERS), "out": HEAD}


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


def recurrent(y, sequences, observe=untapped):
    h = 0 * sequences[:, 0]
    for t in range(T):
        a = sequences[:, t]
        h = jnp.tanh(observe(a @ y["inputs"], a, y["inputs"]) + dense(y["cell"], h, observe))
    return dense(y["out"], h, observe)


def recurrent_scan(y, sequences):
    def step(h, a):
        return jnp.tanh(a @ y["inputs"] + dense(y["cell"], h)), None

    h, _ = jax.lax.scan(step, jnp.zeros((len(sequences), 2)), sequences.swapaxes(0, 1))
    return dense(y["out"], h)


@pytest.mark.parametrize("model", [recurrent, recurrent_scan])
def test_recurrent_cell_adds_up_over_time(model):
    """The steps of a cell are its positions: A is their mean, B their sum."""
    y = {"cell": LAYERS[0], "inputs": LAYERS[1]["kernel"], "out": HEAD}
    batch = (SEQUENCES, LABELS)
    *steps, head = by_perturbation(recurrent, X, y, batch)
    found = captured(model, X, y, batch)
    assert set(found) == {"cell/kernel", "inputs", "out/kernel"}
    for name, layer in (("inputs", steps[::2]), ("cell/kernel", steps[1::2])):
        assert_same(found[name], sum(A for A, _ in layer) / T, sum(B for _, B in layer))
    assert_same(found["out/kernel"], *head)


def test_tied_dense_layers_count_double():
    def tied(y, a, observe=untapped):
        return dense(y["out"], jnp.tanh(dense(y["twice"], jnp.tanh(dense(y["twice"], a, observe)), observe)), observe)

    y, batch = {"twice": LAYERS[0], "out": HEAD}, (INPUTS, LABELS)
    (A1, B1), (A2, B2), head = by_perturbation(tied, X, y, batch)
    for found in (
        captured(tied, X, y, batch),
        captured(functools.partial(tied, observe=curvature.observe), X, y, batch),
    ):
        assert_same(found["twice/kernel"], (A1 + A2) / 2, B1 + B2)
        assert_same(found["out/kernel"], *head)


def test_a_kernel_of_a_convolution_and_of_a_layer_is_one_matrix():
    """Rules may differ where rows and columns of the matrix are the same: each position is a row of A."""

    def tied(y, a, observe=untapped):
        z = jax.lax.conv_general_dilated(a, y["twice"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        a = jnp.tanh(observe(z, a, y["twice"])).mean(1)
        z = jax.lax.dot_general(a[:, :, None], y["twice"], (((1, 2), (1, 0)), ((), ())))
        return dense(y["out"], jnp.tanh(observe(z, a, y["twice"])), observe)

    y = normal(12, twice=(1, D, D)) | {"out": normal(13, kernel=(D, C), bias=(C,))}
    (A1, B1), (A2, B2), head = by_perturbation(tied, X, y, (SEQUENCES, LABELS))
    found = captured(tied, X, y, (SEQUENCES, LABELS))
    assert_same(found["twice"], (T * A1 + A2) / (T + 1), B1 + B2)
    assert_same(found["out/kernel"], *head)


# Leaves with a diagonal block


@jax.custom_jvp
def straight_through(p):
    return jnp.round(p)


straight_through.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))
FEATURES = 4
ELEMENTWISE = {
    "scale": ((FEATURES,), lambda p, a: a * p[None, None]),
    "shift": ((FEATURES,), lambda p, a: p[None, None] + a),
    "minus": ((FEATURES,), lambda p, a: a - p[None, None]),
    "one_plus": ((FEATURES,), lambda p, a: a * (1 + p)[None, None]),
    "softplus": ((FEATURES,), lambda p, a: jax.nn.softplus(p)[None, None] * a),
    "sorted": ((FEATURES,), lambda p, a: a * jnp.sort(p)[None, None]),
    "divisor": ((FEATURES,), lambda p, a: a / (1 + p**2)[None, None]),
    "slope": ((FEATURES,), lambda p, a: jnp.where(a > 0, a, p[None, None] * a)),
    "mask": ((FEATURES,), lambda p, a: jnp.where((jnp.arange(T) == 1)[None, :, None], p[None, None], a)),
    "rounded": ((FEATURES,), lambda p, a: a * (1 + straight_through(p))[None, None]),
    "number": ((), lambda p, a: a * p),
    "position": ((T, FEATURES), lambda p, a: a + p[None]),
    "gain_of_position": ((T, 1), lambda p, a: a * p[None]),
    "row_of_a_table": ((T + 2, FEATURES), lambda p, a: a + p[jnp.arange(T)][None]),
    "both": ((FEATURES,), lambda p, a: a * p[None, None] + p[None, None]),
    "tile": ((FEATURES,), lambda p, a: jnp.concatenate([jnp.tile(p[None, None], (len(a), 1, 1)), a[:, 1:]], 1)),
    "token": ((1, FEATURES), lambda p, a: jnp.concatenate([jnp.broadcast_to(p[None], (len(a), 1, FEATURES)), a], 1)),
}
MIX = jax.random.normal(jax.random.key(9), (FEATURES, C))


def elementwise(y, a):
    for name, (_, layer) in ELEMENTWISE.items():
        a = jnp.sin(layer(y[name], a))
    return a.mean(1) @ MIX


def test_diagonals_are_exact_for_any_number_of_examples():
    y = normal(10, **{name: shape for name, (shape, _) in ELEMENTWISE.items()})
    batch = (jax.random.normal(jax.random.key(11), (N, T, FEATURES)), LABELS)
    found, G = captured(elementwise, X, y, batch), gauss_newton(elementwise, X, y, batch)
    assert set(found) == set(y)
    assert covered(found) == len(G)
    for name, leaf in y.items():
        assert found[name].diagonal.shape == leaf.shape
        exact = np.diag(block(G, y, lambda y, name=name: y[name]))
        np.testing.assert_allclose(found[name].diagonal.ravel(), exact, rtol=1e-9, atol=1e-15, err_msg=name)
        assert exact.max() > 1e-8


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
