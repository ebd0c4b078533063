"""What no rule covers: the error by default, the treatments that `unsupported` chooses, and the table of `describe`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blocks import captured, gauss_newton, kfac, make
from flax import linen as nn

from bilevax import curvature
from bilevax.curvature import capture

N, D, C = 4, 2, 3
RANDOM = np.random.default_rng(0)
X = jnp.asarray(np.linspace(-0.5, 0.5, N))
BATCH = (jnp.asarray(RANDOM.normal(size=(N, D))), jnp.asarray(np.array([0, 2, 1, 1])))
OUT = {"kernel": jnp.asarray(RANDOM.normal(size=(5, C))), "bias": jnp.asarray(RANDOM.normal(size=C))}


def dense(layer, a):
    return a @ layer["kernel"] + layer["bias"][None]


def groups_of_the_batch(y, a):
    images = jnp.broadcast_to(a[:, None], (N, 4, D))
    window = {"batch_group_count": 2, "dimension_numbers": ("NWC", "WIO", "NWC")}
    return jax.lax.conv_general_dilated(images, y["odd"], (1,), "VALID", **window).reshape(N, -1)


def repeated(y, a):
    return jax.lax.fori_loop(0, jnp.asarray(a[0, 0] > 0, int) + 2, lambda _, a: jnp.tanh(a @ y["odd"]), a)


def chosen(y, a):
    return jax.lax.cond(a[0, 0] > 0, lambda: a @ y["odd"], lambda: -a @ y["odd"])


def passed_on(y, a):
    """Examples are mixed from the second iteration on."""

    def step(h, a):
        return jnp.cumsum(h * y["inner"][0, 0], 0) + a, h

    _, past = jax.lax.scan(step, jnp.zeros((N, D)), jnp.broadcast_to(a, (3, N, D)))
    return (past @ y["odd"]).sum(0)


def ridge(y, a):
    return jnp.linalg.solve(y["odd"] @ y["odd"].T + jnp.eye(D), a.T).T


UNSUPPORTED = {
    "unused": ((D, C), lambda y, a: a, "meets no examples"),
    "groups of the batch": ((3, D, 2), groups_of_the_batch, "conv_general_dilated in groups of the batch"),
    "each its own matrix": ((N, D, C), lambda y, a: jnp.einsum("nd,ndc->nc", a, y["odd"]), "dot_general"),
    "one number each": ((N, 1), lambda y, a: a * y["odd"], "mul: other values for other examples"),
    "while": ((D, D), repeated, "while"),
    "cond": ((D, C), chosen, "cond"),
    "passed on": ((D, C), passed_on, "dot_general with data whose examples axis is lost"),
    "solve": ((D, D), ridge, "custom_linear_solve"),
    "scale of some examples": (
        (D,),
        lambda y, a: a + ((a * y["inner"][0, 0])[:3] * y["odd"][None]).sum(),
        "lie in slots",
    ),
}


def followed_by_a_layer(odd):
    """The odd leaf, then a dense layer that every capture sees."""

    def model(y, a):
        z = odd({"odd": y["odd"], "inner": y["out"]["kernel"]}, a)
        return dense(y["out"], jnp.pad(z, ((0, 0), (0, 5)))[:, :5])

    return model


@pytest.mark.parametrize(("shape", "odd", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_a_leaf_without_a_rule_is_named(shape, odd, reason):
    y = {"odd": jnp.asarray(np.random.default_rng(1).normal(size=shape)), "out": OUT}
    with pytest.raises(ValueError, match="odd") as caught:
        captured(followed_by_a_layer(odd), X, y, BATCH)
    named, fix = str(caught.value).split(" Pass unsupported=")
    assert reason in named
    assert fix.startswith("bx.curvature.capture.diagonal")


# Each refusal, and what its message says to do about it

A, SHORT = BATCH[0], {"odd": jnp.ones((D, D)), "out": OUT["kernel"][:D]}
REMEDIES = {
    "a loop of fixed length": (
        lambda y, a: jax.lax.while_loop(lambda a: a[0, 0] > 0, lambda a: jnp.tanh(a @ y["odd"]), a) @ y["out"],
        lambda y, a: jax.lax.scan(lambda a, _: (jnp.tanh(a @ y["odd"]), None), a, length=3)[0] @ y["out"],
    ),
    "choose with jnp.where": (
        lambda y, a: jax.lax.cond(y["out"].sum() > 0, lambda: a @ y["odd"], lambda: -a @ y["odd"]) @ y["out"],
        lambda y, a: jnp.where(a.sum(1, keepdims=True) > 0, a @ y["odd"], -a @ y["odd"]) @ y["out"],
    ),
    "apply the function in its body": (
        lambda y, a: jax.lax.scan(lambda a, w: (a * w[None], None), a, jnp.exp(y["odd"]))[0] @ y["out"],
        lambda y, a: jax.lax.scan(lambda a, w: (a * jnp.exp(w)[None], None), a, y["odd"])[0] @ y["out"],
    ),
    "pick rows by ids": (
        lambda y, a: (a[:D] * y["odd"]) @ y["out"],
        lambda y, a: (a[:D] * y["odd"][jnp.asarray(a[:D, 0] > 0, int)]) @ y["out"],
    ),
    "leave it out of y": (lambda y, a: a @ y["out"], None),
}


@pytest.mark.parametrize("remedy", REMEDIES)
def test_the_message_says_what_helps(remedy):
    model, mended = REMEDIES[remedy]
    inputs = A[:D] if remedy == "pick rows by ids" else A
    with pytest.raises(ValueError, match=f"For odd[^.]*: [^.]*{remedy}"):
        capture.trace(model, SHORT, inputs)
    y = {"out": SHORT["out"]} if mended is None else SHORT
    assert {block.leaf for block in capture.trace(mended or model, y, inputs).blocks} == set(range(len(y)))


def test_a_scan_over_a_part_of_a_leaf_takes_two_leaves():
    def scanned(first, rest, a):
        return jax.lax.scan(lambda a, w: (jnp.tanh(a @ w), None), jnp.tanh(a @ first), rest)[0]

    y = {"odd": jnp.ones((3, D, D))}
    with pytest.raises(
        ValueError, match=r"For odd: make that part a leaf of its own, y = \{'first': ..., 'rest': ...\}"
    ):
        capture.trace(lambda y, a: scanned(y["odd"][0], y["odd"][1:], a), y, A)
    split = {"first": y["odd"][0], "rest": y["odd"][1:]}
    blocks = capture.trace(lambda y, a: scanned(y["first"], y["rest"], a), split, A).blocks
    assert [(block.rule, block.stack) for block in blocks] == [("dense", ()), ("dense", (2,))]


def test_the_choice_that_a_message_names_can_be_pasted():
    y = SHORT | {"spare": jnp.ones(3)}
    model = lambda y, a: (a @ y["odd"]) @ y["out"]  # noqa: E731
    with pytest.raises(ValueError, match=r"blocks=\{'spare': bx.curvature.capture.identity\}"):
        capture.trace(model, y, A)
    assert len(capture.trace(model, y, A, blocks={"spare": capture.identity}).blocks) == 3


def opaque(y, a):
    """A layer that is not seen: whether it is there depends on the examples."""
    return dense(y["out"], jnp.tanh(jax.lax.cond(a[0, 0] < 9, lambda: a @ jnp.exp(y["odd"]), lambda: 0 * a @ y["odd"])))


ODD = {"odd": jnp.asarray(RANDOM.normal(0, 0.5, (D, 5))), "out": OUT}
COTANGENT = jax.tree.map(np.cos, ODD)


def test_zero_leaves_a_leaf_where_it_is():
    def fixed(out, a):
        return opaque({"odd": ODD["odd"], "out": out}, a)

    v, _ = kfac(opaque, X, ODD, COTANGENT, BATCH, unsupported=capture.zero)
    alone, _ = kfac(fixed, X, OUT, COTANGENT["out"], BATCH)
    np.testing.assert_array_equal(v["odd"], 0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), v["out"], alone)


def test_identity_takes_the_mean_eigenvalue_of_the_other_layers():
    v, _ = kfac(opaque, X, ODD, COTANGENT, BATCH, unsupported=capture.identity)
    factors = captured(opaque, X, ODD, BATCH, unsupported=capture.identity)["out/kernel"]
    mean = jnp.trace(factors.A) * jnp.trace(factors.B) / (len(factors.A) * len(factors.B))
    np.testing.assert_allclose(v["odd"], COTANGENT["odd"] / (0.75 + mean), rtol=1e-10)


def test_diagonal_by_random_signs():
    """Exact for one example; unbiased for more, with an error that falls like the root of the number of probes."""
    one = jax.tree.map(lambda leaf: leaf[:1], BATCH)
    v, _ = kfac(opaque, X[:1], ODD, COTANGENT, one, unsupported=capture.diagonal)
    exact = jnp.diag(gauss_newton(opaque, X[:1], ODD, one))[: ODD["odd"].size].reshape(D, 5)
    np.testing.assert_allclose(v["odd"], COTANGENT["odd"] / (exact + 0.75), rtol=1e-10)

    exact = jnp.diag(gauss_newton(opaque, X, ODD, BATCH))[: ODD["odd"].size].reshape(D, 5)
    errors = []
    for probes in (16, 4096):
        treatment = functools.partial(capture.diagonal, probes=probes)
        found = captured(opaque, X, ODD, BATCH, unsupported=treatment)["odd"].diagonal
        errors.append(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 4


# The table

TOKENS = jnp.array([[0, 3, 1], [2, 2, 1]])
TEXT = (TOKENS, jnp.array([0, 1]))


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(7, 4, name="embed")(tokens)
        h = nn.LayerNorm(name="norm")(h)
        odd = self.param("odd", nn.initializers.ones, (4, 4))
        h = jax.lax.cond(h[0, 0, 0] < 9, lambda: h @ odd, lambda: -h @ odd)
        return nn.Dense(2, name="head")(h.mean(1))


def model(y, tokens):
    return Net().apply({"params": y}, tokens)


Y = jax.jit(Net().init)(jax.random.key(0), TOKENS)["params"] | {"spare": jnp.ones(3)}


Y = optax.tree.cast(Y, jnp.float32)


def line(table, leaf):
    (found,) = [line for line in table.splitlines() if leaf in re.split(r"\s+", line)]
    return found


def test_each_leaf_stands_in_one_line_with_its_rule_or_the_reason():
    table = str(curvature.describe(make(model), X[:2], Y, TEXT))
    assert line(table, "head/kernel") == line(table, "head/bias")
    rules = {"embed/embedding": "embedding", "head/kernel": "dense", "norm/scale": "elementwise", "odd": "unsupported"}
    for leaf, rule in rules.items():
        assert rule in line(table, leaf)
    assert "A rows [2, 5], B [2, 2]" in line(table, "head/kernel")
    assert "A [7], B [4, 4]" in line(table, "embed/embedding")
    assert "cond" in line(table, "odd")
    assert "meets no examples" in line(table, "spare")


def test_treatments_stand_in_the_table():
    for treatment, rule in ((capture.zero, "zero"), (capture.identity, "identity"), (capture.diagonal, "estimated")):
        table = str(curvature.describe(make(model), X[:2], Y, TEXT, unsupported=treatment))
        assert rule in line(table, "odd")
        assert rule not in line(table, "head/kernel")


def test_bytes_are_those_of_the_factors():
    """Also of the estimated diagonals; stacked layers are counted as often as they are there."""
    options = {"unsupported": capture.diagonal, "inverse": curvature.kronecker.spectral}
    report = curvature.describe(make(model), X[:2], Y, TEXT, **options)
    inner_loss, x = make(model), X[:2].astype(jnp.float32)

    def measure(y):
        factors = curvature.kronecker.factors(jax.random.key(0), inner_loss, x, y, TEXT, **options)
        return {name: (e.A, e.B) if hasattr(e, "A") else e.diagonal for name, e in factors.items()}

    factors = jax.eval_shape(measure, Y)
    assert {row.leaves[0] for row in report.rows} == set(factors)
    for row in report.rows:
        parts = jax.tree.leaves(factors[row.leaves[0]])
        assert row.bytes == sum(part.size * part.dtype.itemsize for part in parts)


def test_stacked_layers_stand_in_the_table():
    y = {"kernel": jnp.ones((3, D, D)), "bias": jnp.ones((3, D))}

    def scanned(y, a):
        return jax.lax.scan(lambda a, layer: (dense(layer, a), None), a, y)[0]

    (row,) = curvature.describe(make(scanned), X, y, BATCH).rows
    assert row.leaves == ("kernel", "bias")
    assert "3 layers" in row.sizes
    assert row.bytes == 8 * 3 * ((D + 1) ** 2 + D**2)
