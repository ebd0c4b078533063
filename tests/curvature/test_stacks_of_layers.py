"""Axes of a leaf that count layers: experts, members of an ensemble, heads, groups of a convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import assert_same, block, captured, gauss_newton, kfac, make

from bilevax import curvature

N, E, D, F, C = 4, 3, 2, 4, 3
X = jnp.linspace(-0.5, 0.5, N)
LABELS = jnp.array([0, 2, 1, 1])


def normal(seed, **shapes):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(0, 0.7, size=shape)) for name, shape in shapes.items()}


SAME = jnp.tile(normal(0, a=(1, D))["a"], (N, 1))
IMAGES = jnp.tile(normal(1, a=(1, 3, 3, 4))["a"], (N, 1, 1, 1))


def experts(y, a):
    h = jnp.tanh(jnp.einsum("nd,edf->nef", a, y["up"]) + y["b"][None])
    return jnp.einsum("nef,efc->nec", h, y["down"]).sum(1)


def ensemble(y, a):
    def member(y):
        return jnp.tanh(a @ y["up"] + y["b"][None]) @ y["down"]

    return jax.vmap(member)(y).mean(0)


def with_bias(weight, bias):
    return np.concatenate([weight, bias[:, None]], 1)


def depthwise(y, a):
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 4}
    z = jax.lax.conv_general_dilated(a, y["filter"], (1, 1), "VALID", **options)
    return jnp.tanh(z + y["b"][None, None, None])[:, 0, 0] @ y["head"]


def grouped(y, a):
    """Channels first, two groups of two channels, three filters for each."""
    options = {"dimension_numbers": ("NCHW", "OIHW", "NCHW"), "feature_group_count": 2}
    a = a.transpose(0, 3, 1, 2)
    return jnp.tanh(jax.lax.conv_general_dilated(a, y["filter"], (1, 1), "VALID", **options))[:, :, 0, 0] @ y["head"]


def scanned(y, a):
    """Two layers of three heads each, one after the other."""

    def layer(h, w):
        return jnp.tanh(jnp.einsum("ned,edf->nef", h, w)), None

    h = jnp.tile(a[:, None], (1, E, 1))
    return jax.lax.scan(layer, h, y["deep"])[0].reshape(N, -1) @ y["head"]


UP = {"up": (E, D, F), "b": (E, F)}
STACKS = {
    "experts": (experts, UP | {"down": (E, F, C)}, SAME),
    "ensemble": (ensemble, UP | {"down": (E, F, C)}, SAME),
    "depthwise": (depthwise, {"filter": (3, 3, 1, 4), "b": (4,), "head": (4, C)}, IMAGES),
    "grouped": (grouped, {"filter": (6, 2, 3, 3), "head": (6, C)}, IMAGES),
    "scanned": (scanned, {"deep": (2, E, D, D), "head": (E * D, C)}, SAME),
}


def matrices(name, y):
    """The matrices [layers, inputs, outputs] of each weight, arranged by hand."""
    if name in ("experts", "ensemble"):
        return {"up": with_bias(y["up"], y["b"]), "down": y["down"]}
    if name == "scanned":
        return {"deep": y["deep"].reshape(-1, D, D), "head": y["head"][None]}
    if name == "depthwise":
        filters = y["filter"].reshape(9, 4).T[..., None]
        return {"filter": with_bias(filters, y["b"][:, None]), "head": y["head"][None]}
    return {"filter": y["filter"].reshape(2, 3, 18).swapaxes(1, 2), "head": y["head"][None]}


@pytest.mark.parametrize("name", STACKS)
def test_each_layer_has_the_dense_gauss_newton_block(name):
    """All examples are the same and each weight is used once: A ⊗ B of a layer is the block itself."""
    model, shapes, inputs = STACKS[name]
    y, batch = normal(2, **shapes), (inputs, LABELS)
    factors, G = captured(model, X, y, batch), gauss_newton(model, X, y, batch)
    arranged = matrices(name, y)
    assert set(factors) == set(arranged)
    for leaf, layers in arranged.items():
        A, B = (factor.reshape(len(layers), *factor.shape[-2:]) for factor in (factors[leaf].A, factors[leaf].B))
        for k in range(len(layers)):
            exact = block(G, y, lambda y, leaf=leaf, k=k: matrices(name, y)[leaf][k])
            np.testing.assert_allclose(np.kron(A[k], B[k]), exact, rtol=0, atol=1e-12, err_msg=f"{leaf} {k}")


def test_experts_equal_layers_of_their_own():
    """Other examples, weights of examples and a solve: a stack is what separate leaves are."""
    inputs = normal(3, a=(N, D))["a"]
    y = normal(2, **STACKS["experts"][1])

    def apart(y, a):
        return sum(jnp.tanh(a @ y["up"][e] + y["b"][e][None]) @ y["down"][e] for e in range(E))

    leaves = {name: [leaf[e] for e in range(E)] for name, leaf in y.items()}
    stacked, single = captured(experts, X, y, (inputs, LABELS)), captured(apart, X, leaves, (inputs, LABELS))
    for name in ("up", "down"):
        for e in range(E):
            assert_same(single[f"{name}/{e}"], stacked[name].A[e], stacked[name].B[e])
    b = jax.tree.map(jnp.sin, y)
    v, _ = kfac(experts, X, y, b, (inputs, LABELS))
    alone, _ = kfac(apart, X, leaves, {name: [leaf[e] for e in range(E)] for name, leaf in b.items()}, (inputs, LABELS))
    for name, leaf in v.items():
        np.testing.assert_allclose(leaf, jnp.stack(alone[name]), rtol=1e-9)


def test_the_table_names_the_layers():
    y = normal(2, **STACKS["experts"][1])
    rows = curvature.describe(make(experts), X, y, (SAME, LABELS)).rows
    assert [(row.leaves, row.sizes) for row in rows] == [
        (("down",), f"3 layers of {[E, F, C]}: A {[F, F]}, B {[C, C]}"),
        (("up", "b"), f"3 layers of {[E, D, F]}: A {[D + 1, D + 1]}, B {[F, F]}"),
    ]
