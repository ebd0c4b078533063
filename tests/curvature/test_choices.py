"""`blocks=`: another treatment than the rules' for single leaves, by path, by pattern or by a function of the path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import KEY, block, captured, gauss_newton, kfac, make
from models import (
    CELL,
    CONVOLUTIONS,
    IMAGES,
    INPUTS,
    LABELS,
    SEQUENCES,
    STACKED,
    C,
    D,
    N,
    X,
    Y,
    mlp,
    normal,
    plain_conv,
    recurrent,
    residual_scan,
)

import bilevax as bx
from bilevax import curvature
from bilevax.curvature import capture, kronecker

BATCH = (INPUTS, LABELS)
B = jax.tree.map(jnp.sin, Y)


def described(blocks, model=mlp, y=Y, batch=BATCH):
    rows = curvature.describe(make(model), X, y, batch, blocks=blocks).rows
    return {" + ".join(row.leaves): row.rule for row in rows}


def test_a_path_a_pattern_and_a_function_choose_the_same():
    expected = {"hidden/bias": "elementwise", "hidden/kernel": "zero", "out/kernel + out/bias": "dense"}
    for blocks in (
        {"hidden/kernel": capture.zero},
        {"hidden/k*": capture.zero},
        {"hidden/kernel": capture.zero, "*/kernel": 64},  # the first that fits counts
        lambda path: capture.zero if path == "hidden/kernel" else None,
    ):
        assert described(blocks) == expected
    assert described({"*/bias": capture.identity}) == {
        "hidden/bias": "identity",
        "hidden/kernel": "dense",
        "out/bias": "identity",
        "out/kernel": "dense",
    }


def test_what_is_chosen_is_solved_for_and_the_others_are_as_if_it_were_fixed():
    blocks = {"hidden/kernel": capture.identity, "hidden/bias": capture.zero}
    v, _ = kfac(mlp, X, Y, B, BATCH, blocks=blocks)
    head, _ = kfac(lambda out, a: mlp({**Y, "out": out}, a), X, Y["out"], B["out"], BATCH)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), v["out"], head)
    np.testing.assert_array_equal(v["hidden"]["bias"], 0)
    mean = captured(mlp, X, Y, BATCH)["out/kernel"].mean_eigenvalue
    np.testing.assert_allclose(v["hidden"]["kernel"], B["hidden"]["kernel"] / (0.75 + mean), rtol=1e-10)


def table(y, ids):
    return jnp.tanh(y["table"][ids]).mean(1) @ y["head"]


LAYERS = {
    "one row for each example": (mlp, Y, BATCH, "hidden/kernel"),
    "tokens": (lambda y, a: mlp(y, a).mean(1), Y, (SEQUENCES, LABELS), "hidden/kernel"),
    "convolution": (plain_conv, CONVOLUTIONS, (IMAGES, LABELS), "conv/kernel"),
    "layers in a scan": (residual_scan, STACKED, BATCH, "layers/kernel"),
    "table": (table, normal(40, table=(5, D), head=(D, C)), (jnp.arange(2 * N).reshape(N, 2) % 5, LABELS), "table"),
    "observed": (functools.partial(mlp, observe=curvature.observe), Y, BATCH, "hidden/kernel"),
    "element by element": (
        lambda y, a: a * y["scale"][None] @ Y["out"]["kernel"][:D],
        normal(41, scale=(D,)),
        BATCH,
        "scale",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_diagonal_of_a_layer_is_exact(name):
    """With that of its bias; in KFAC, in EKFAC, and in factors that are inverted later."""
    model, y, batch, leaf = LAYERS[name]
    pick = lambda tree: jnp.concatenate([jnp.ravel(part) for part in jax.tree.leaves(tree[leaf.split("/")[0]])])  # noqa: E731
    choices = {"fisher": curvature.fisher.exact, "blocks": {leaf: capture.diagonal}}
    inner_loss, point = make(model, l2=0.25), (X, y, batch)

    @jax.jit
    def solved(b):
        found = kronecker.factors(KEY, inner_loss, *point, **choices)
        vs = [curvature.inverted(found, inner_loss, *point, damping=0.5, blocks=choices["blocks"])(b)]
        for ihvp in (bx.ihvp.kfac(damping=0.5, **choices), bx.ihvp.ekfac(damping=0.5, **choices)):
            vs.append(ihvp.prepare(KEY, (), inner_loss, point)[0](b)[0])
        return vs

    b = jax.tree.map(jnp.cos, y)
    expected = pick(b) / (np.diag(block(gauss_newton(model, *point), y, pick)) + 0.75)
    for v in solved(b):
        np.testing.assert_allclose(pick(v), expected, rtol=1e-9)


def test_that_of_a_layer_that_is_used_again_and_again_too():
    """A leaf for each example makes it exact."""
    batch, blocks = (SEQUENCES, LABELS), {"cell/kernel": capture.diagonal}
    assert described(blocks, recurrent, CELL, batch)["cell/kernel"] == "diagonal"
    exact = np.diag(block(gauss_newton(recurrent, X, CELL, batch), CELL, lambda y: y["cell"]["kernel"]))
    found = captured(recurrent, X, CELL, batch, blocks=lambda path: blocks.get(path))["cell/kernel"].diagonal
    np.testing.assert_allclose(found.ravel(), exact, rtol=1e-9)


def test_or_it_is_estimated_where_that_is_too_much():
    """A leaf of 2²² numbers in several places, for more than four examples; in one place it is exact still."""
    y = {"twice": jax.ShapeDtypeStruct((2**11, 2**11), jnp.float32)}
    inputs, probes = jax.ShapeDtypeStruct((5, 2**11), jnp.float32), functools.partial(capture.diagonal, probes=7)

    def found(model):
        blocks = []
        trace = functools.partial(capture.trace, model, blocks={"twice": probes})
        jax.eval_shape(lambda y, inputs: blocks.extend(trace(y, inputs).blocks), y, inputs)
        return blocks[0]

    once, again = found(lambda y, a: a @ y["twice"]), found(lambda y, a: a @ y["twice"] @ y["twice"])
    assert (once.rule, once.diagonal, once.treatment) == ("diagonal", True, None)
    assert (again.rule, again.diagonal, again.treatment.probes) == ("diagonal, estimated", False, 7)


def test_a_rank_keeps_sketches_as_an_inverse_of_that_rank_does():
    y = normal(42, hidden=(D, 9), out=(9, C))
    model = lambda y, a: jnp.tanh(a @ y["hidden"]) @ y["out"]  # noqa: E731
    b = jax.tree.map(jnp.sin, y)
    own, _ = kfac(model, X, y, b, BATCH, ema=0.5, blocks={"*": 2}, fisher=curvature.fisher.exact)
    whole, _ = kfac(model, X, y, b, BATCH, ema=0.5, inverse=kronecker.low_rank(2))
    dense_ones, _ = kfac(model, X, y, b, BATCH, ema=0.5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), own, whole)
    assert np.abs(own["out"] - dense_ones["out"]).max() > 1e-4
    rows = curvature.describe(make(model), X, y, BATCH, blocks={"out": 1}, inverse=kronecker.spectral).rows
    assert ["sketch" in row.sizes for row in rows] == [False, True]
    with pytest.raises(ValueError, match=r"inverse must know eigenvalues where blocks gives a leaf a rank.*by_shape"):
        kfac(model, X, y, b, BATCH, ema=0.5, blocks={"out": 2}, inverse=kronecker.factored)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        (
            {"hiden/*": capture.zero},
            r"blocks must name leaves of y.*'hiden/\*', which fits none of hidden/bias, .*describe",
        ),
        ({"out/kernel": "diagonal"}, r"capture.diagonal, identity or zero.* rank >= 1; got 'diagonal' for out/kernel"),
        ({"out/kernel": 0}, r"rank >= 1; got 0 for out/kernel"),
        (lambda path: True, r"rank >= 1; got True for hidden/bias"),
        ({"out/kernel": lambda leaves: {}}, r"must return a dict with a Treatment for each leaf.*for out/kernel"),
        (
            3,
            r"blocks must be a dict from paths .* or a function of the path; got 3\. Pass, say, blocks=\{'hidden/bias'",
        ),
        ("w", r"blocks must be a dict from paths .* got 'w'"),
        ({0: 4}, r"by path or pattern, which are strings; got 0\. Pass, say, blocks=\{'hidden/bias': 64\}"),
    ],
)
def test_choices_that_cannot_be(blocks, says):
    with pytest.raises(ValueError, match=says):
        described(blocks)
