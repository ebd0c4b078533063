"""What the capture refuses, and the options and lines of docs/curvature.md that help: each is applied here."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import KEY, gauss_newton, make
from jax.flatten_util import ravel_pytree
from models import INPUTS, LABELS, C, D, N, X, normal

import bilevax as bx
from bilevax import curvature
from bilevax.curvature import capture

BATCH = (INPUTS, LABELS)
HEAD = normal(0, head=(D, C))["head"]
Y = {"head": HEAD, **normal(1, odd=(D, D))}
exact_once = functools.partial(capture.diagonal, probes=1)


def ridge(y, a):
    return jnp.linalg.solve(y["odd"] @ y["odd"].T + jnp.eye(D), a.T).T @ y["head"]


def groups_of_the_batch(y, a):
    images = jnp.concatenate([jnp.broadcast_to(a[:, None], (N, 4, D))] * 2)
    options = {"batch_group_count": 2, "dimension_numbers": ("NWC", "WIO", "NWC")}
    return jax.lax.conv_general_dilated(images, y["odd"], (1,), "VALID", **options).mean(1) @ y["head"]


def of_pairs(y, a):
    """How far each example is from each other one."""
    z = a @ y["odd"]
    return (-((z[:, None] - z[None]) ** 2)).reshape(N * N, D)


def of_each_pair(y, pair):
    """Of rows that are pairs: N² rows, two passes through the layer for each."""
    first, second = (a @ y["odd"] for a in pair)
    return -((first - second) ** 2)


class Refusal(NamedTuple):
    """A model that is refused, what the message says, and what helps.

    Attributes:
      model: is refused with this y.
      says: of the message.
      rule: that the leaf "odd" has with the remedy.
      options: of `kfac`.
      y: inner variable.
    """

    model: Callable[..., Any]
    says: str
    rule: str
    options: tuple[tuple[str, Any], ...] = ()
    y: Any = Y


REFUSALS = {
    "a leaf that is not used": Refusal(
        lambda y, a: a @ y["head"], "meets no examples", "zero", options=(("blocks", {"odd": capture.zero}),)
    ),
    "a matrix for each example": Refusal(
        lambda y, a: jnp.einsum("nd,nde->ne", a, y["odd"]) @ y["head"],
        "another matrix for each example",
        "diagonal, estimated",
        options=(("unsupported", exact_once),),
        y={"head": HEAD, **normal(2, odd=(N, D, D))},
    ),
    "a number for each example": Refusal(
        lambda y, a: a * y["odd"] @ y["head"],
        "other values for other examples",
        "diagonal, estimated",
        options=(("unsupported", exact_once),),
        y={"head": HEAD, **normal(3, odd=(N, 1))},
    ),
    "a solve": Refusal(
        ridge, "custom_linear_solve", "diagonal, estimated", options=(("unsupported", capture.diagonal),)
    ),
    "groups of the batch": Refusal(
        groups_of_the_batch,
        "groups of the batch",
        "identity",
        options=(("unsupported", capture.identity),),
        y={"head": HEAD, **normal(4, odd=(3, D, D))},
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_leaf_is_named_and_the_remedy_helps(name):
    """A diagonal where each example has numbers of its own is exact with one probe."""
    model, says, rule, options, y = REFUSALS[name]
    with pytest.raises(ValueError, match=says) as caught:
        capture.trace(model, y, INPUTS)
    assert "odd (" in str(caught.value)
    inner_loss, options = make(model), dict(options)
    rows = curvature.describe(inner_loss, X, y, BATCH, **options).rows
    assert [row.rule for row in rows if "odd" in row.leaves] == [rule]
    measure = functools.partial(curvature.kronecker.factors, fisher=curvature.fisher.exact, **options)
    found = jax.jit(lambda y: measure(KEY, inner_loss, X, y, BATCH))(y)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    if options.get("unsupported") is exact_once:
        exact = np.diag(gauss_newton(model, X, y, BATCH))[-y["odd"].size :]
        np.testing.assert_allclose(found["odd"].diagonal.ravel(), exact, rtol=1e-9)


def counted(y, a):
    """One example after the other, in a loop that counts them."""
    return jax.lax.scan(lambda n, row: (n + row[0], row @ y["odd"]), 0.0, a)[1]


def time_first(y, a):
    z = jnp.broadcast_to(a[None], (3, N, D)).reshape(3 * N, D) @ y["odd"]
    return z.reshape(3, N, D).mean(0)


def examples_first(y, a):
    z = jnp.broadcast_to(a[:, None], (N, 3, D)).reshape(N * 3, D) @ y["odd"]
    return z.reshape(N, 3, D).mean(1)


WRITTEN_ANEW = {
    "a loop over the examples": (counted, lambda y, a: jax.lax.map(lambda row: row @ y["odd"], a), (D, D)),
    "examples first": (time_first, examples_first, (D, D)),
    "a scale in slots": (
        lambda y, a: ((a @ HEAD)[::-1] * y["odd"][None])[::-1],
        lambda y, a: ((a @ HEAD) * y["odd"][None])[::-1][::-1],
        (C,),
    ),
}


@pytest.mark.parametrize("name", WRITTEN_ANEW)
def test_the_same_model_written_anew_is_covered(name):
    refused, anew, shape = WRITTEN_ANEW[name]
    y = normal(6, odd=shape)
    with pytest.raises(ValueError, match="examples"):
        capture.trace(refused, y, INPUTS)
    (found,) = capture.trace(anew, y, INPUTS).blocks
    assert found.treatment is None
    np.testing.assert_allclose(*jax.jit(lambda y: (refused(y, INPUTS), anew(y, INPUTS)))(y), atol=1e-12)


def test_pairs_are_examples_where_the_loss_is_one_of_pairs():
    y = {"odd": Y["odd"]}
    with pytest.raises(ValueError, match="hold the examples of the outputs"):
        capture.trace(of_pairs, y, INPUTS)
    square = lambda y, a: (a @ y["odd"]) @ (a @ y["odd"]).T  # noqa: E731
    for options in ({}, {"unsupported": capture.diagonal}):
        with pytest.raises(
            ValueError, match=r"each pair of examples has a number there\. Pass the pairs as the examples"
        ):
            capture.trace(square, y, INPUTS, **options)
    pairs = tuple(side.reshape(N * N, D) for side in jnp.broadcast_arrays(INPUTS[:, None], INPUTS[None]))
    rows = curvature.describe(make(of_each_pair), jnp.zeros(N * N), y, (pairs, jnp.zeros(N * N, int))).rows
    assert [(row.leaves, row.rule) for row in rows] == [(("odd",), "dense")]
    np.testing.assert_allclose(of_each_pair(y, pairs), of_pairs(y, INPUTS), atol=1e-12)


def test_products_need_no_examples():
    """Examples that are mixed behind a layer; those of the inputs alone may be, they do not depend on y."""
    y, mix = {"head": HEAD, **normal(5, odd=(C, C))}, functools.partial(jnp.cumsum, axis=0)
    model = lambda y, a: mix(a @ y["head"]) @ y["odd"]  # noqa: E731
    with pytest.raises(ValueError, match=r"odd \(.*examples axis is lost: cumsum"):
        capture.trace(model, y, INPUTS)
    ihvp = bx.ihvp.cg(maxiter=60, tol=1e-12, damping=0.1, curvature=curvature.gauss_newton)
    b, loss = jax.tree.map(jnp.cos, y), make(model)
    v, info = jax.jit(lambda b: ihvp.prepare(None, (), loss, (X, y, BATCH))[0](b))(b)
    G = gauss_newton(model, X, y, BATCH)
    flat = np.linalg.solve(G + 0.1 * np.eye(len(G)), ravel_pytree(b)[0])
    np.testing.assert_allclose(ravel_pytree(v)[0], flat, rtol=1e-8)
    assert not info.breakdown
    rows = curvature.describe(make(lambda y, a: mix(a) @ y["odd"]), X, {"odd": HEAD}, BATCH).rows
    assert [row.rule for row in rows] == ["dense"]
