"""Small models, one row each: what captures of them are compared with, above all the dense Gauss–Newton matrix.

`MODELS` is the table of `test_dense_matrix.py`: a model that the capture learns to see is one row more.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blocks import untapped

from bilevax import curvature

N, T, D, C = 4, 3, 2, 3
X = jnp.asarray(np.linspace(-0.5, 0.5, N))
LABELS = jnp.asarray(np.array([0, 2, 1, 1]))


def normal(seed, **shapes):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape)) for name, shape in shapes.items()}


INPUTS, SEQUENCES = normal(1, inputs=(N, D), sequences=(N, T, D)).values()
IMAGES = normal(2, images=(N, 5, 5, 2))["images"]
TOKENS = jnp.asarray(np.array([[0, 3, 1], [2, 2, 1], [3, 0, 3], [1, 2, 0]]))
LABELS_OF_TOKENS = jnp.asarray(np.array([[0, 1, 2], [2, 2, 0], [1, 0, 1], [1, 1, 2]]))


def dense(layer, a, observe=untapped):
    """A dense layer over the last axis of a, whose kernel may have several output axes."""
    kernel = layer["kernel"]
    z = jnp.tensordot(a, kernel, (-1, 0)) + jnp.expand_dims(layer["bias"], tuple(range(a.ndim - 1)))
    return observe(z, a, kernel, layer["bias"])


def layer(seed, *shape, inputs=1):
    """Numbers of a dense layer or of a convolution."""
    return normal(seed, kernel=shape, bias=shape[inputs:])


Y = {"hidden": normal(3, kernel=(D, 5), bias=(5,)), "out": normal(4, kernel=(5, C), bias=(C,))}


def mlp(y, a, observe=untapped, activation=jnp.tanh):
    return dense(y["out"], activation(dense(y["hidden"], a, observe)), observe)


# The same, written in other ways


def features_first(y, a):
    a = jnp.tanh(y["hidden"]["kernel"].T @ a.T + y["hidden"]["bias"][:, None])
    return (y["out"]["kernel"].T @ a + y["out"]["bias"][:, None]).T


def with_views(y, a):
    """Kernels that are flattened, squeezed, transposed and cast on their way."""
    kernel = y["hidden"]["kernel"].reshape(-1).reshape(1, D, 5).squeeze(0).T
    z = jnp.einsum("nd,ed->ne", a, kernel) + jnp.broadcast_to(y["hidden"]["bias"], (N, 5))
    out = jnp.asarray(y["out"]["kernel"][None], jnp.float64).squeeze(0).astype(float)
    return jnp.tanh(z) @ out + jax.lax.expand_dims(y["out"]["bias"], (0,))


# Outputs for each token


def each_token(y, a):
    """Outputs [N, T, C]; each sees all tokens up to its own."""
    hidden = jnp.tanh(dense(y["hidden"], a))
    return dense(y["out"], hidden + jnp.cumsum(hidden**2, axis=1))


# Convolutions with a group norm


NHWC = ("NHWC", "HWIO", "NHWC")


def convolution(layer, a, strides, padding, dilation, observe):
    """A convolution beside its patches, whose features stand in the order (kh, kw, c_in) of the kernel."""
    kernel, bias = layer["kernel"], layer.get("bias")
    window = {"padding": padding, "rhs_dilation": dilation, "dimension_numbers": NHWC}
    z = jax.lax.conv_general_dilated(a, kernel, strides, **window)
    patches = jax.lax.conv_general_dilated_patches(a, kernel.shape[:2], strides, **window)
    z = z if bias is None else z + bias[None, None, None]
    patches = patches.reshape(*z.shape[:3], kernel.shape[2], -1).swapaxes(3, 4).reshape(*z.shape[:3], -1)
    return observe(z, patches, kernel.reshape(-1, kernel.shape[-1]), bias)


def plain_conv(y, a, observe=untapped):
    a = convolution(y["conv"], a, (2, 2), "SAME", (1, 1), observe)
    groups = a.reshape(*a.shape[:3], 2, -1)
    mean, var = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
    a = ((groups - mean) / jnp.sqrt(var + 1e-6)).reshape(a.shape)
    a = jax.nn.relu(a * y["norm"]["scale"][None, None, None] + y["norm"]["bias"][None, None, None])
    a = convolution(y["last"], a, (1, 1), "VALID", (2, 2), observe)
    return dense(y["head"], a.mean((1, 2)), observe)


CONVOLUTIONS = {
    "conv": layer(20, 3, 3, 2, 4, inputs=3),
    "head": layer(21, 3, C),
    "last": normal(22, kernel=(2, 2, 4, 3)),
    "norm": normal(23, scale=(4,), bias=(4,)),
}


# An attention block


def plain_attention(y, tokens, observe=untapped):
    table = y["embed"]["embedding"]
    h = observe(table[tokens], jax.nn.one_hot(tokens, len(table)), table)
    norm, heads = y["norm"], y["attention"]
    a = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
    a = a * norm["scale"][None, None] + norm["bias"][None, None]
    query, key, value = (dense(heads[name], a, observe) for name in ("query", "key", "value"))
    scores = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", query / np.sqrt(query.shape[-1]), key))
    mixed = jnp.einsum("nhqk,nkhd->nqhd", scores, value).reshape(*h.shape)
    out = heads["out"]
    h = h + dense({"kernel": out["kernel"].reshape(4, 4), "bias": out["bias"]}, mixed, observe)
    return dense(y["head"], jax.nn.gelu(dense(y["hidden"], h, observe)).mean(1), observe)


ATTENTION = {
    "attention": {
        **{name: layer(24 + k, 4, 2, 2) for k, name in enumerate(("query", "key", "value"))},
        "out": normal(27, kernel=(2, 2, 4), bias=(4,)),
    },
    "embed": normal(28, embedding=(5, 4)),
    "head": layer(29, 5, C),
    "hidden": layer(30, 4, 5),
    "norm": normal(31, scale=(4,), bias=(4,)),
}
ATTENTION = jax.tree.map(lambda leaf: leaf / 2, ATTENTION)  # attention does not saturate


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


def recurrent_untied(y, sequences):
    """The cell with weights of its own at each time."""
    h = 0 * sequences[:, 0]
    for t in range(T):
        cell = jax.tree.map(lambda leaf, t=t: leaf[t], y["cell"])
        h = jnp.tanh(sequences[:, t] @ y["inputs"][t] + dense(cell, h))
    return dense(y["out"], h)


STEPS = {"cell": T, "inputs": T}
CELL = {"cell": LAYERS[0], "inputs": LAYERS[1]["kernel"], "out": HEAD}


def twice(y, a, observe=untapped):
    return dense(y["out"], jnp.tanh(dense(y["twice"], jnp.tanh(dense(y["twice"], a, observe)), observe)), observe)


def twice_untied(y, a):
    first, second = (jax.tree.map(lambda leaf, k=k: leaf[k], y["twice"]) for k in range(2))
    return dense(y["out"], jnp.tanh(dense(second, jnp.tanh(dense(first, a)))))


TWICE = {"twice": LAYERS[0], "out": HEAD}


def twice_in_two_ways(y, a, observe=untapped):
    """The kernel of a convolution, and then of a layer; in `untied` form where it is given twice."""
    first, second = y["twice"] if y["twice"].ndim == 4 else (y["twice"], y["twice"])
    z = jax.lax.conv_general_dilated(a, first, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    a = jnp.tanh(observe(z, a, first)).mean(1)
    z = jax.lax.dot_general(a[:, :, None], second, (((1, 2), (1, 0)), ((), ())))
    return dense(y["out"], jnp.tanh(observe(z, a, second)), observe)


TWO_WAYS = normal(12, twice=(1, D, D)) | {"out": normal(13, kernel=(D, C), bias=(C,))}


# Experts, and other stacks of layers


E = 2
SWITCH = normal(40, router=(D, E), up=(E, D, 5), bias=(E, 5), down=(E, 5, C))


def chosen_expert(y, a):
    gate = jax.nn.softmax(a @ y["router"])
    return gate, gate.argmax(-1)


def by_slots(y, a):
    """Dispatch by a tensor of zeros and ones [N, E, slots]."""
    gate, expert = chosen_expert(y, a)
    chosen = jax.nn.one_hot(expert, E)
    place = ((jnp.cumsum(chosen, 0) * chosen).max(-1)).astype(int) - 1
    send = chosen[..., None] * jax.nn.one_hot(place, N)[:, None]
    h = jnp.tanh(jnp.einsum("ecd,edf->ecf", jnp.einsum("sec,sd->ecd", send, a), y["up"]) + y["bias"][:, None])
    return jnp.einsum("sec,ecd->sd", send, jnp.einsum("ecf,efd->ecd", h, y["down"])) * gate.max(-1)[:, None]


def depthwise(y, a):
    window = {"feature_group_count": 2, "dimension_numbers": NHWC}
    z = jax.lax.conv_general_dilated(a, y["filter"], (2, 2), "VALID", **window)
    return jnp.tanh(z + y["bias"][None, None, None]).mean((1, 2)) @ y["head"]


DEPTHWISE = normal(44, filter=(3, 3, 1, 4), bias=(4,), head=(4, C))


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


def element_by_element(y, a):
    for name, (_, layer) in ELEMENTWISE.items():
        a = jnp.sin(layer(y[name], a))
    return a.mean(1) @ MIX


ELEMENTS = normal(10, **{name: shape for name, (shape, _) in ELEMENTWISE.items()})
FEATURE_SEQUENCES = jax.random.normal(jax.random.key(11), (N, T, FEATURES))


# Axes that count layers; parts and functions of leaves


def experts(y, a):
    """Three of them, whose outputs a softmax of the gate weighs."""
    said = jnp.tanh(jnp.einsum("nd,edf->nef", a, y["up"]) + y["bias"][None])
    return jnp.einsum("ne,nec->nc", jax.nn.softmax(a @ y["gate"]), jnp.einsum("nef,efc->nec", said, y["down"]))


def in_groups(y, a):
    """A convolution by depth, and one in two groups of channels."""
    for name, groups in (("depth", 2), ("groups", 2)):
        window = {"feature_group_count": groups, "dimension_numbers": NHWC}
        a = jnp.tanh(jax.lax.conv_general_dilated(a, y[name], (2, 2), "SAME", **window))
    return a.mean((1, 2)) @ y["head"]


def in_parts(y, a):
    """Slices of a stacked and of a fused leaf, kernels that are joined, a number times one."""
    for k in (0, 2):
        a = jnp.tanh(a @ y["stacked"][k] + y["biases"][k][None])
    query, key = jnp.split(y["fused"], 2, axis=1)
    a = jnp.concatenate([a @ query, 0.5 * jnp.tanh(a @ key)], 1)
    z = a @ jnp.concatenate([y["first"], y["second"]], axis=1)
    return jnp.tanh(z) @ (y["out"] / 3)


def of_functions(y, a):
    """A merged update of low rank, weight norm, and a mask."""
    a = jnp.tanh(a @ (y["frozen"] + y["a"] @ y["b"]))
    a = jnp.tanh(a @ (y["g"][None] * y["v"] / jnp.linalg.norm(y["v"], axis=0, keepdims=True)))
    return a @ (y["masked"] * jnp.asarray(np.arange(4 * C).reshape(4, C) % 2, float))


EXPERTS = normal(50, up=(3, D, 4), bias=(3, 4), down=(3, 4, C), gate=(D, 3))
GROUPS = normal(51, depth=(3, 3, 1, 4), groups=(2, 2, 2, 4), head=(4, C))
PARTS = normal(52, stacked=(3, D, D), biases=(3, D), fused=(D, 6), first=(6, 2), second=(6, 3), out=(5, C))
FUNCTIONS = normal(53, frozen=(D, 4), a=(D, 1), b=(1, 4), v=(4, 4), g=(4,), masked=(4, C))


# The table


class Row(NamedTuple):
    """A model whose curvature is known.

    Attributes:
      model: (y, inputs) -> outputs [N, ..., C].
      y: its leaves.
      inputs: N examples.
      labels: like the outputs.
      x: logarithms of the weights, of examples or of single outputs.
      uses: entry of y -> how often the model uses it, where that is not once.
      untied: the same model of a y whose entries in `uses` have an axis of their uses in front.
    """

    model: Callable[..., Any]
    y: Any
    inputs: Any
    labels: Any = LABELS
    x: Any = X
    uses: Mapping[str, int] = {}
    untied: Callable[..., Any] | None = None


MODELS = {
    "mlp": Row(mlp, Y, INPUTS),
    "features first": Row(features_first, Y, INPUTS),
    "kernels through views": Row(with_views, Y, INPUTS),
    "observed layers": Row(functools.partial(mlp, observe=curvature.observe), Y, INPUTS),
    "one example, under vmap": Row(lambda y, a: jax.vmap(lambda a: mlp(y, a))(a), Y, INPUTS),
    "layers on each token": Row(lambda y, a: mlp(y, a).mean(1), Y, SEQUENCES),
    "outputs for each token": Row(each_token, Y, SEQUENCES, LABELS_OF_TOKENS),
    "weights for each token": Row(each_token, Y, SEQUENCES, LABELS_OF_TOKENS, X[:, None] * jnp.arange(3.0)[None]),
    "convolutions, group norm": Row(plain_conv, CONVOLUTIONS, IMAGES),
    "attention, embedding, layer norm": Row(plain_attention, ATTENTION, TOKENS),
    "layers in a scan": Row(residual_scan, STACKED, INPUTS),
    "element by element": Row(element_by_element, ELEMENTS, FEATURE_SEQUENCES),
    "recurrent cell": Row(recurrent, CELL, SEQUENCES, uses=STEPS, untied=recurrent_untied),
    "recurrent cell in a scan": Row(recurrent_scan, CELL, SEQUENCES, uses=STEPS, untied=recurrent_untied),
    "layer used twice": Row(twice, TWICE, INPUTS, uses={"twice": 2}, untied=twice_untied),
    "experts": Row(experts, EXPERTS, INPUTS),
    "convolutions in groups": Row(in_groups, GROUPS, IMAGES),
    "parts of leaves": Row(in_parts, PARTS, INPUTS),
    "functions of leaves": Row(of_functions, FUNCTIONS, INPUTS),
    "experts that see their own": Row(by_slots, SWITCH, INPUTS),
    "depthwise convolution": Row(depthwise, DEPTHWISE, IMAGES),
    "one example after the other": Row(lambda y, a: jax.lax.map(lambda a: mlp(y, a[None])[0], a), Y, INPUTS),
    "convolution that is also a layer": Row(
        twice_in_two_ways, TWO_WAYS, SEQUENCES, uses={"twice": 2}, untied=twice_in_two_ways
    ),
}
