"""What a model does to a leaf before it meets the examples: slices, numbers, sums and joins, any function of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import KEY, captured, gauss_newton, kfac, make
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilevax as bx
from bilevax import curvature
from bilevax.curvature import capture

N, D, C = 4, 4, 3
X, LABELS = jnp.zeros(N), jnp.array([0, 2, 1, 1])
SAME = jnp.tile(jnp.array([0.5, -1.0, 2.0, 0.3]), (N, 1))  # all examples alike: A ⊗ B is the block itself
MASK = jnp.asarray(np.random.default_rng(1).integers(0, 2, (D, C)), float)
SHARDING = NamedSharding(jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,)), PartitionSpec())
CHANNELS = ("NWC", "WIO", "NWC")


def chain(layers, a):
    for w in layers:
        a = jnp.tanh(a @ w)
    return a[:, :C]


def fused(y, a):
    q, k, v = jnp.split(y["w"], 3, axis=1)
    b, c, d = jnp.split(y["b"], 3)
    return jnp.tanh(a @ q + b[None]) * (a @ k + c[None]) + a @ v + d[None]


def heads(y, a):
    """Queries, keys and values of each head side by side."""
    w = y["w"].reshape(D, 2, 3, C)
    return sum(jnp.tanh(jnp.einsum("nd,dhe->nhe", a, w[:, :, k])).sum(1) * (k + 1) for k in range(3))


def flat(y, a):
    """One vector that holds all parameters of a network, and more."""
    t = y["t"]
    a = jnp.tanh(a @ t[:16].reshape(D, D) + t[16:20][None])
    return a * t[20:24][None] @ t[24:36].reshape(D, C)


def observed(y, a):
    z = [curvature.observe(a @ y["w"][k], a, y["w"][k]) for k in range(3)]
    return jnp.tanh(z[0]) * z[1] + z[2]


def scanned(y, a):
    def step(a, layer):
        (q, k), (b, c) = jnp.split(layer["w"], 2, 1), jnp.split(layer["b"], 2)
        return jnp.tanh(a @ q + b[None]) * (a @ k + c[None]), None

    return jax.lax.scan(step, a, y)[0][:, :C]


def chain_of_scan(stack, a):
    return jax.lax.scan(lambda a, w: (jnp.tanh(a @ w), None), a, stack)[0][:, :C]


def loop_over_time(h, scale, a):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h * scale[None] + a[:, :C]), None), h, None, length=3)[0]


def joined(y, a):
    kernel = jnp.concatenate([y["w"], y["u"]], axis=1)
    return jnp.tanh(a @ kernel + jnp.concatenate([y["b"], y["c"]])[None])


def channels(y, a):
    kernel = jnp.concatenate([y["w"], y["u"]], axis=2)
    return jax.lax.conv_general_dilated(a[:, :, None], kernel, (1,), "VALID", dimension_numbers=CHANNELS)[:, 0]


def weight_norm(y, a):
    return a @ (y["g"][None] * y["w"] / jnp.linalg.norm(y["w"], axis=0, keepdims=True)) + y["b"][None]


def standardised(y, a):
    w = y["w"] - y["w"].mean(0, keepdims=True)
    w = w / jnp.sqrt((w**2).mean(0, keepdims=True) + 1e-5)
    return jax.lax.conv_general_dilated(a[:, :, None], w, (1,), "VALID", dimension_numbers=CHANNELS)[:, 0]


@jax.custom_vjp
def tripled(kernel):
    """The identity, for everything but its gradient."""
    return kernel


tripled.defvjp(lambda kernel: (kernel, None), lambda _, u: (3 * u,))


def orthogonal(w):
    """Ten Newton–Schulz steps, each of which reads the last one three times."""
    for _ in range(10):
        w = 1.5 * w - 0.5 * w @ (w.T @ w)
    return w


# Name: shapes of the leaves, model, and the names and rules of the blocks
DENSE, DIAGONAL, UNUSED = "dense", "diagonal", "no curvature"
CASES = {
    "layers": ({"w": (3, D, D)}, lambda y, a: chain(y["w"], a), {"w[0]": DENSE, "w[1]": DENSE, "w[2]": DENSE}),
    "unstacked": ({"w": (2, D, D)}, lambda y, a: chain(jnp.unstack(y["w"]), a), {"w[0]": DENSE, "w[1]": DENSE}),
    "by index": (
        {"w": (2, D, D)},
        lambda y, a: chain([jnp.take(y["w"], 1, 0), jax.lax.dynamic_index_in_dim(y["w"], 0, keepdims=False)], a),
        {"w[1]": DENSE, "w[0]": DENSE},
    ),
    "some of them": (
        {"w": (D, 3, D)},
        lambda y, a: chain([y["w"][:, 2], y["w"][:, 0]], a),
        {"w[:, 2]": DENSE, "w[:, 0]": DENSE, "w (unused part)": UNUSED},
    ),
    "fused": (
        {"w": (D, 9), "b": (9,)},
        fused,
        {"b[6:9]": "elementwise", "w[:, 0:3]": DENSE, "w[:, 3:6]": DENSE, "w[:, 6:9]": DENSE},
    ),
    "heads": ({"w": (D, 18)}, heads, {f"w[:, {k}:{k + 3} of every 9]": DENSE for k in (0, 3, 6)}),
    "one vector": (
        {"t": (40,)},
        flat,
        {"t[0:16]": DENSE, "t[20:24]": "elementwise", "t[24:36]": DENSE, "t (unused part)": UNUSED},
    ),
    "observed": ({"w": (3, D, C)}, observed, {f"w[{k}]": "observed" for k in range(3)}),
    "scanned": ({"w": (2, D, 2 * D), "b": (2, 2 * D)}, scanned, {"w[:, 0:4]": DENSE, "w[:, 4:8]": DENSE}),
    "scaled and scanned": (
        {"w": (2, D, C + 1)},
        lambda y, a: chain_of_scan(y["w"] / 4 + 1, a),
        {"w": DENSE},
    ),
    "learnt first state": (
        {"h": (C,), "s": (C,)},
        lambda y, a: loop_over_time(jnp.broadcast_to(y["h"][None], (N, C)), y["s"], a),
        {"h": "elementwise", "s": "elementwise"},
    ),
    "number": (
        {"w": (D, D), "u": (D, C), "v": (C, C)},
        lambda y, a: jnp.tanh(a @ (y["w"] / 4)) @ (-y["u"]) @ (y["v"] * jnp.sqrt(jnp.float64(2))),
        {"u": DENSE, "v": DENSE, "w": DENSE},
    ),
    "learnt number": ({"w": (D, C), "g": ()}, lambda y, a: a @ (y["g"] * y["w"]), {"g": DIAGONAL, "w": DENSE}),
    "constraint": (
        {"w": (D, C)},
        lambda y, a: a @ jax.lax.with_sharding_constraint(y["w"], SHARDING),
        {"w": DENSE},
    ),
    "barrier": (
        {"w": (D, D), "u": (D, C)},
        lambda y, a: chain(jax.lax.optimization_barrier([y["w"], y["u"]]), a),
        {"u": DENSE, "w": DENSE},
    ),
    "rounded": ({"w": (D, C)}, lambda y, a: a @ jax.lax.reduce_precision(y["w"], 8, 40), {"w": DENSE}),
    "joined": ({"w": (D, 1), "u": (D, 2), "b": (1,), "c": (2,)}, joined, {"u": DENSE, "w": DENSE}),
    "joined rows": (
        {"w": (1, C), "u": (3, C)},
        lambda y, a: a @ jnp.concatenate([y["w"], y["u"]]),
        {"u": DENSE, "w": DENSE},
    ),
    "stacked": (
        {"w": (D, C), "u": (D, C)},
        lambda y, a: jnp.tanh(jnp.einsum("nd,kde->nke", a, jnp.stack([y["w"], y["u"]]))).sum(1),
        {"u": DENSE, "w": DENSE},
    ),
    "padded": ({"w": (D, 2)}, lambda y, a: jnp.tanh(a @ jnp.pad(y["w"], ((0, 0), (1, 0)))), {"w": DENSE}),
    "channels": ({"w": (D, 1, 2), "u": (D, 1, 1)}, channels, {"u": "conv", "w": "conv"}),
    "low rank": (
        {"w": (D, C), "u": (D, 2), "v": (2, C), "b": (C,)},
        lambda y, a: jnp.tanh(a @ (y["w"] + 0.5 * y["u"] @ y["v"]) + y["b"][None]),
        {"u": DIAGONAL, "v": DIAGONAL, "w": DENSE},
    ),
    "masked": ({"w": (D, C)}, lambda y, a: a @ (y["w"] * MASK), {"w": DIAGONAL}),
    "weight norm": (
        {"w": (D, C), "g": (C,), "b": (C,)},
        weight_norm,
        {"b": "elementwise", "g": DIAGONAL, "w": DIAGONAL},
    ),
    "standardised": ({"w": (D, 1, C)}, standardised, {"w": DIAGONAL}),
    "product": (
        {"u": (D,), "v": (C,)},
        lambda y, a: a @ (y["u"][:, None] * y["v"][None]),
        {"u": DIAGONAL, "v": DIAGONAL},
    ),
    "product of scales": (
        {"u": (D,), "v": (D,)},
        lambda y, a: (a * (y["u"] * y["v"])[None])[:, :C],
        {"u": "elementwise", "v": "elementwise"},
    ),
    "with itself": ({"w": (D, D)}, lambda y, a: (a @ (y["w"] @ y["w"] + y["w"].T))[:, :C], {"w": DIAGONAL}),
    "orthogonal": ({"w": (D, D)}, lambda y, a: (a @ orthogonal(y["w"]))[:, :C], {"w": DIAGONAL}),
    "own gradient": ({"w": (D, C)}, lambda y, a: a @ tripled(y["w"]), {"w": DIAGONAL}),
    "layer and scale": ({"w": (D, D)}, lambda y, a: (jnp.tanh(a @ y["w"]) * y["w"][0][None])[:, :C], {"w": DIAGONAL}),
    "overlap": ({"w": (3, D, D)}, lambda y, a: chain([y["w"][0], y["w"][0:2].sum(0)], a), {"w": DIAGONAL}),
    "columns of a table": ({"w": (C, 5)}, lambda y, a: y["w"][:, jnp.asarray(a[:, 0] > 0, int)].T, {"w": DIAGONAL}),
}


def drawn(shapes):
    random = np.random.default_rng(0)
    return {name: jnp.asarray(random.normal(0, 0.5, shape)) for name, shape in shapes.items()}


def together(y, a):
    """All cases in one program; what one leaf has for a block does not depend on the others."""
    return sum(model(y[name], a) for name, (_, model, _) in CASES.items())


@functools.cache
def solved():
    """v of all cases, what the dense blocks say, and the blocks of each case."""
    random = np.random.default_rng(0)
    y = {
        name: {k: jnp.asarray(random.normal(0, 0.5, s)) for k, s in leaves.items()}
        for name, (leaves, _, _) in CASES.items()
    }
    flat, unravel = ravel_pytree(y)
    b = np.cos(np.arange(flat.size))
    v, _ = kfac(together, X, y, unravel(jnp.asarray(b)), (SAME, LABELS))
    G = np.asarray(gauss_newton(together, X, y, (SAME, LABELS))) + 0.75 * np.eye(flat.size)
    blocks = capture.trace(together, y, SAME).blocks

    @jax.jit
    def numbered(flat):
        """The elements of y in each block, counted from 1: a row for each matrix, or for each number of a diagonal."""
        leaves = dict(enumerate(jax.tree.leaves(unravel(flat))))
        return [
            block.take(leaves[block.leaf]).reshape(-1, 1)
            if block.matrix is None
            else block.pack(leaves).reshape(-1, block.rows * block.outputs)
            for block in blocks
        ]

    expected, rules = np.full(flat.size, np.nan), {name: {} for name in CASES}
    for block, rows in zip(blocks, jax.device_get(numbered(np.arange(1.0, flat.size + 1))), strict=True):
        case, _, leaf = block.name.partition("/")
        rules[case][leaf] = block.rule
        for at in rows[rows[:, 0] > 0].astype(int) - 1:
            assert np.isnan(expected[at]).all()  # no element has two blocks
            expected[at] = np.linalg.solve(G[np.ix_(at, at)], b[at])
    return jax.device_get((unravel(jnp.asarray(expected)), v, rules))


@pytest.mark.compiles(80)  # leaves of all shapes
@pytest.mark.parametrize("name", CASES)
def test_blocks_are_those_of_the_dense_matrix(name):
    expected, v, rules = solved()
    assert rules[name] == CASES[name][2]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), v[name], expected[name])


def test_diagonals_of_different_examples_are_exact():
    """Each example has a kernel of its own, also where it has several positions."""

    def model(y, a):
        z = jnp.tanh(a @ (y["w"] * MASK[:, :2]) @ y["v"])  # [N, 3, D]
        return (z @ jnp.exp(y["w"]) @ y["u"]).mean(1)

    random = np.random.default_rng(2)
    y = {
        name: jnp.asarray(random.normal(0, 0.5, shape))
        for name, shape in {"u": (2, C), "v": (2, D), "w": (D, 2)}.items()
    }
    batch = (jnp.asarray(random.normal(size=(N, 3, D))), LABELS)
    found = captured(model, X, y, batch)["w"].diagonal
    exact = np.diag(gauss_newton(model, X, y, batch))[-found.size :].reshape(found.shape)
    np.testing.assert_allclose(found, exact, rtol=1e-10)


def test_large_leaves_have_an_estimated_diagonal():
    """Small ones are exact as long as there is room for all of them."""
    y = {"a": jnp.ones((3, D, D)), "large": jnp.ones((2048, 2048)), "small": jnp.ones((D, 2048))}

    def model(y, a):
        return a @ y["a"].sum(0) @ jnp.exp(y["small"]) @ jnp.exp(y["large"])

    rows = {row.leaves[0]: row for row in curvature.describe(make(model), X, y, (SAME, LABELS)).rows}
    assert {name: row.rule for name, row in rows.items()} == {
        "a": DIAGONAL,
        "large": "diagonal, estimated",
        "small": DIAGONAL,
    }


def test_parts_stand_in_the_table():
    y = {"w": jnp.ones((2, D, 2 * D)), "b": jnp.ones((2, 2 * D))}
    rows = curvature.describe(make(scanned), X, y, (SAME, LABELS)).rows
    assert [(row.leaves, row.sizes) for row in rows] == [
        (("w[:, 0:4]", "b[0:4]"), "2 layers of [2, 4, 4]: A [5, 5], B [4, 4]"),
        (("w[:, 4:8]", "b[4:8]"), "2 layers of [2, 4, 4]: A [5, 5], B [4, 4]"),
    ]


def test_weight_decay_of_a_part_is_that_of_its_elements():
    """Three layers in one leaf, each with a decay of its own."""
    rates = {"w": jnp.broadcast_to(jnp.array([0.1, 0.2, 0.7])[:, None, None], (3, D, C))}
    loss = make(observed, l2=lambda x: rates)
    ihvp = bx.ihvp.kfac(damping=0.5, fisher=curvature.fisher.exact)

    @jax.jit
    def solve(y, b):
        return ihvp.prepare(KEY, (), loss, (X, y, (SAME, LABELS)))[0](b)[0]

    y = drawn({"w": (3, D, C)})
    b = jax.tree.map(jnp.cos, y)
    v = solve(y, b)["w"]
    G = np.asarray(gauss_newton(observed, X, y, (SAME, LABELS))).reshape(3, D * C, 3, D * C)
    for k, rate in enumerate((0.1, 0.2, 0.7)):
        expected = np.linalg.solve(G[k, :, k] + (rate + 0.5) * np.eye(D * C), np.ravel(b["w"][k]))
        np.testing.assert_allclose(np.ravel(v[k]), expected, rtol=1e-9)
