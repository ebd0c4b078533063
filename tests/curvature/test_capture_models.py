"""linen, nnx, equinox, plain functions and explicit taps: one network, one set of factors, no model rewritten."""

import functools

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import (
    as_matrix,
    assert_equal_factors,
    assert_same,
    block,
    by_perturbation,
    captured,
    covered,
    gauss_newton,
)
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from models import mlp, plain_attention, plain_conv

from bilevax import curvature

N, C = 4, 3
X = jnp.linspace(-0.5, 0.5, N)
LABELS = jnp.array([0, 2, 1, 1])
RNGS = nnx.Rngs(0)


def parameters_of(module, inputs):
    """Random numbers for a linen module: scales that are not 1 and shifts that are not 0 hide nothing."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(0.2, 0.5, leaf.shape)), shapes)


def linen_form(module):
    return lambda y, inputs: module.apply({"params": y}, inputs)


def nnx_form(module, y):
    """The model of an nnx module, and its own inner variable with the numbers of y."""
    graph, parameters, rest = nnx.split(module, nnx.Param, ...)
    nnx.replace_by_pure_dict(parameters, y)
    return lambda parameters, inputs: nnx.merge(graph, parameters, rest)(inputs), parameters


# A multilayer perceptron


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, a):
        return nn.Dense(C, name="out")(nn.tanh(nn.Dense(5, name="hidden")(a)))


class NnxMLP(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(2, 5, rngs=RNGS, param_dtype=float)
        self.out = nnx.Linear(5, C, rngs=RNGS, param_dtype=float)

    def __call__(self, a):
        return self.out(nnx.tanh(self.hidden(a)))


# Convolutions with a group norm


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, a):
        a = nn.Conv(4, (3, 3), strides=2, name="conv")(a)
        a = nn.relu(nn.GroupNorm(2, name="norm")(a))
        a = nn.Conv(3, (2, 2), padding="VALID", kernel_dilation=2, use_bias=False, name="last")(a)
        return nn.Dense(C, name="head")(a.mean((1, 2)))


class NnxConv(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=RNGS, param_dtype=float)
        self.norm = nnx.GroupNorm(4, 2, rngs=RNGS, param_dtype=float)
        self.last = nnx.Conv(
            4, 3, (2, 2), padding="VALID", kernel_dilation=2, use_bias=False, rngs=RNGS, param_dtype=float
        )
        self.head = nnx.Linear(3, C, rngs=RNGS, param_dtype=float)

    def __call__(self, a):
        a = nnx.relu(self.norm(self.conv(a)))
        return self.head(self.last(a).mean((1, 2)))


# An attention block


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(5, 4, name="embed")(tokens)
        h = h + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(h))
        return nn.Dense(C, name="head")(nn.gelu(nn.Dense(5, name="hidden")(h)).mean(1))


def double_precision(query, key, value, **options):
    """The attention of nnx takes its softmax in float32."""
    return nn.dot_product_attention(query, key, value)


class NnxAttention(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(5, 4, rngs=RNGS, param_dtype=float)
        self.norm = nnx.LayerNorm(4, rngs=RNGS, param_dtype=float)
        self.attention = nnx.MultiHeadAttention(
            2, 4, rngs=RNGS, param_dtype=float, decode=False, attention_fn=double_precision
        )
        self.hidden = nnx.Linear(4, 5, rngs=RNGS, param_dtype=float)
        self.head = nnx.Linear(5, C, rngs=RNGS, param_dtype=float)

    def __call__(self, tokens):
        h = self.embed(tokens)
        h = h + self.attention(self.norm(h))
        return self.head(nnx.gelu(self.hidden(h)).mean(1))


MODELS = {
    "mlp": (LinenMLP(), NnxMLP, mlp, jax.random.normal(jax.random.key(2), (N, 2))),
    "conv": (LinenConv(), NnxConv, plain_conv, jax.random.normal(jax.random.key(3), (N, 5, 5, 2))),
    "attention": (
        LinenAttention(),
        NnxAttention,
        plain_attention,
        jnp.array([[0, 3, 1], [2, 2, 1], [3, 0, 3], [1, 2, 0]]),
    ),
}
ORDER = {
    "mlp": ["hidden", "out"],
    "conv": ["conv", "last", "head"],
    "attention": ["embed", *(f"attention/{name}" for name in ("query", "key", "value", "out")), "hidden", "head"],
}
DIAGONAL = {"mlp": [], "conv": ["norm/scale", "norm/bias"], "attention": ["norm/scale", "norm/bias"]}


@functools.cache
def network(name):
    """Its linen form, inner variable, batch, and the factors of the linen form."""
    module, _, _, inputs = MODELS[name]
    y = parameters_of(module, inputs)
    batch = (inputs, LABELS)
    return linen_form(module), y, batch, captured(linen_form(module), X, y, batch)


over_models = pytest.mark.parametrize("name", MODELS)


def channels_first(A, weight):
    """A of a convolution for features in the order (c_in, kh, kw), from the order (kh, kw, c_in) of its kernel."""
    if weight.ndim < 4:
        return A
    size = weight[..., 0].size
    order = [*np.arange(size).reshape(weight.shape[:3]).transpose(2, 0, 1).ravel(), *range(size, len(A))]
    return A[np.ix_(order, order)]


@pytest.mark.compiles(80)  # three networks, each four times
@over_models
def test_linen_against_shifts_of_each_output(name):
    """Kronecker factors from perturbed outputs, diagonals from JᵀLJ; together they speak for each entry of y once."""
    model, y, batch, factors = network(name)
    expected = by_perturbation(MODELS[name][2], X, y, batch)
    weights = [f"{layer}/{'embedding' if layer == 'embed' else 'kernel'}" for layer in ORDER[name]]
    assert set(factors) == {*weights, *DIAGONAL[name]}
    assert covered(factors) == sum(leaf.size for leaf in jax.tree.leaves(y))
    for weight, (A, B) in zip(weights, expected, strict=True):
        assert_same(factors[weight], channels_first(A, flatten_dict(y, sep="/")[weight]), B)
    G = gauss_newton(model, X, y, batch) if DIAGONAL[name] else None
    for leaf in DIAGONAL[name]:
        expected = np.diag(block(G, y, lambda y, leaf=leaf: flatten_dict(y, sep="/")[leaf]))
        np.testing.assert_allclose(factors[leaf].diagonal, expected, rtol=0, atol=1e-12)


@over_models
def test_nnx_equals_linen(name):
    _, y, batch, factors = network(name)
    model, parameters = nnx_form(MODELS[name][1](), y)
    found = captured(model, X, parameters, batch)
    assert_equal_factors({leaf.removesuffix("/value"): entry for leaf, entry in found.items()}, factors)


@over_models
def test_a_plain_function_equals_linen(name):
    _, y, batch, factors = network(name)
    assert_equal_factors(captured(MODELS[name][2], X, y, batch), factors)


@over_models
def test_explicit_taps_equal_linen(name):
    """Each tap says what its layer is; an embedding says that it is a dense layer on one-hot vectors."""
    _, y, batch, factors = network(name)
    tapped = functools.partial(MODELS[name][2], observe=curvature.observe)
    found = captured(tapped, X, y, batch)
    assert set(found) == set(factors)
    for weight in set(found) - set(DIAGONAL[name]):
        A = channels_first(found[weight].A, flatten_dict(y, sep="/")[weight])
        assert_same(factors[weight], A, found[weight].B)
    for leaf in DIAGONAL[name]:
        np.testing.assert_allclose(found[leaf].diagonal, factors[leaf].diagonal, rtol=0, atol=1e-12)


def test_equinox_equals_linen():
    """An equinox-style model is written for one example and vmapped: W @ a + b with W of shape [d_out, d_in]."""
    _, y, batch, factors = network("mlp")
    module = equinox.nn.MLP(2, C, 5, 1, jnp.tanh, key=jax.random.key(0))
    parameters, static = equinox.partition(module, equinox.is_array)

    def leaves(tree):
        return [leaf for layer in tree.layers for leaf in (layer.weight, layer.bias)]

    values = [leaf for name in ORDER["mlp"] for leaf in (y[name]["kernel"].T, y[name]["bias"])]
    parameters = equinox.tree_at(leaves, parameters, values)
    found = captured(lambda y, inputs: jax.vmap(equinox.combine(y, static))(inputs), X, parameters, batch)
    for entry, expected in zip(found.values(), factors.values(), strict=True):
        assert_same(entry, expected.A, expected.B)
    assert [("layers" in name and "weight" in name) for name in found] == [True, True]


def test_per_example_function_under_vmap():
    """A function of one example, parameters closed over or passed along."""
    _, y, batch, factors = network("mlp")

    def one(y, a):
        a = jnp.tanh(y["hidden"]["kernel"].T @ a + y["hidden"]["bias"])
        return y["out"]["kernel"].T @ a + y["out"]["bias"]

    closed = captured(lambda y, inputs: jax.vmap(lambda a: one(y, a))(inputs), X, y, batch)
    passed = captured(lambda y, inputs: jax.vmap(one, (None, 0))(y, inputs), X, y, batch)
    assert_equal_factors(closed, factors)
    assert_equal_factors(passed, factors)


def test_agents_under_vmap_equal_a_loop():
    """The attention block for three agents, each with parameters, weights and tokens of its own."""
    model, y, batch, factors = network("attention")
    y, x, (tokens, labels) = jax.device_get((y, X, batch))
    ys = jax.tree.map(lambda leaf: np.stack([leaf, 1.1 * leaf, -leaf]), y)
    xs, tokens = np.stack([x, -x, 2 * x]), np.stack([tokens, 4 - tokens, (tokens + 1) % 5])
    labels = np.stack([labels, 2 - labels, labels])
    agents = (jnp.asarray(xs), ys, (jnp.asarray(tokens), jnp.asarray(labels)))
    together = jax.device_get(jax.jit(jax.vmap(functools.partial(captured, model)))(*agents))
    one = jax.tree.map(lambda leaf: leaf[0], together)
    assert_equal_factors(one, factors)
    for agent in (1, 2):
        at = lambda tree, agent=agent: jax.tree.map(lambda leaf: leaf[agent], tree)  # noqa: E731
        assert_equal_factors(at(together), captured(model, *at((xs, ys, (tokens, labels)))))


@pytest.mark.compiles(60)  # three networks
@over_models
def test_one_example_has_the_exact_gauss_newton_blocks(name):
    """With one example and one position (a convolution onto one pixel, a sentence of one token) A ⊗ B is the block."""
    module, _, _, inputs = MODELS[name]
    if name == "conv":
        module = OnePixel()
    inputs = inputs[:1, :1] if name == "attention" else inputs[:1]
    y = parameters_of(module, inputs)
    batch, model = (inputs, LABELS[:1]), linen_form(module)
    factors, G = captured(model, X[:1], y, batch), gauss_newton(model, X[:1], y, batch)
    flat = flatten_dict(y, sep="/")
    checked = 0
    for weight, entry in factors.items():
        if hasattr(entry, "diagonal"):
            continue
        place = functools.partial(rows, weight=weight, with_bias=f"{weight.rpartition('/')[0]}/bias" in flat)
        expected = block(G, y, place)
        np.testing.assert_allclose(np.kron(as_matrix(entry.A), entry.B), expected, rtol=0, atol=1e-12, err_msg=weight)
        checked += np.abs(expected).max() > 1e-3
    assert checked == {"mlp": 2, "conv": 3, "attention": 5}[name]  # one token attends to itself: B = 0 for query, key


class OnePixel(nn.Module):
    """No output of a convolution has more than one pixel."""

    @nn.compact
    def __call__(self, a):
        a = nn.tanh(nn.Conv(4, (5, 5), padding="VALID", name="conv")(a))
        a = nn.relu(nn.GroupNorm(1, name="norm")(a))
        a = nn.Conv(3, (1, 1), use_bias=False, name="last")(a)
        return nn.Dense(C, name="head")(a[:, 0, 0])


def rows(y, weight, with_bias):
    """V of a weight, [d_in (+1), d_out]: convolutions in the order (c_in, kh, kw), attention heads as one axis."""
    flat = flatten_dict(y, sep="/")
    V = flat[weight]
    if weight.startswith(("conv", "last")):
        V = V.transpose(2, 0, 1, 3)
    d_out = V.shape[-1] if not weight.startswith(("attention/q", "attention/k", "attention/v")) else 4
    V = V.reshape(-1, d_out)
    if not with_bias:
        return V
    return jnp.concatenate([V, flat[f"{weight.rpartition('/')[0]}/bias"].reshape(1, -1)])
