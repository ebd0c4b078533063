"""The name of a rule is for reports alone, and a traced model keeps nothing of later traces."""

import jax
import jax.numpy as jnp
import numpy as np
from blocks import KEY, make

import bilevax as bx
from bilevax import curvature
from bilevax.curvature import capture
from bilevax.curvature.capture import _observe, layers, uses

N, T, D, C, VOCABULARY = 4, 3, 4, 2, 7
X = jnp.linspace(-0.5, 0.5, N)
BATCH = (jnp.array([[0, 3, 0], [2, 2, 1], [6, 5, 4], [1, 1, 1]]), jnp.array([0, 1, 1, 0]))
SHAPES = {"bias": (D,), "head": (D, C), "kernel": (D, D), "odd": (D, D), "scale": (D,), "table": (VOCABULARY, D)}
Y = {name: jnp.asarray(np.random.default_rng(k).normal(0, 0.5, SHAPES[name])) for k, name in enumerate(SHAPES)}


def model(y, tokens):
    """A use of every kind: a table, a scale, a layer that is marked and seen besides, one without a rule, one seen."""
    a = y["table"][tokens] * y["scale"][None, None]
    z = a @ y["kernel"] + y["bias"][None, None]
    a = jnp.tanh(curvature.observe(z, a, y["kernel"], y["bias"]))
    return (a @ jnp.exp(y["odd"])).mean(1) @ y["head"]


def measured():
    """The factors, what EKFAC makes of them, and the rows of the table."""
    inner_loss = make(model)
    choices = {"fisher": curvature.fisher.exact, "unsupported": capture.diagonal}
    ihvp = bx.ihvp.ekfac(damping=0.5, **choices)

    @jax.jit
    def numbers(x, y, batch):
        apply, _ = ihvp.prepare(KEY, ihvp.init(x, y, batch, inner_loss), inner_loss, (x, y, batch))
        return curvature.kronecker.factors(KEY, inner_loss, x, y, batch, **choices), apply(y)[0]

    return numbers(X, Y, BATCH), curvature.describe(inner_loss, X, Y, BATCH, unsupported=capture.diagonal).rows


def test_renaming_every_rule_changes_nothing_but_the_report(monkeypatch):
    numbers, rows = measured()
    named = {row.leaves: row.rule for row in rows}
    assert named == {
        ("head",): "dense",
        ("kernel", "bias"): "observed",
        ("odd",): "diagonal",
        ("scale",): "elementwise",
        ("table",): "embedding",
    }
    assert numbers[0]["table"].A.shape == (VOCABULARY,)

    plain = uses.Use
    for module in (uses, layers, _observe):
        monkeypatch.setattr(module, "Use", lambda rule, *rest, **more: plain("any", *rest, **more))
    renamed, others = measured()
    jax.tree.map(np.testing.assert_array_equal, renamed, numbers)
    assert [row._replace(rule="") for row in others] == [row._replace(rule="") for row in rows]
    assert {row.rule for row in others} == {"any", "diagonal"}


# What is kept


def kept(function):
    """How many things lie in the containers that a function, and the functions that it calls, close over."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    things = sum(len(cell) for cell in cells if isinstance(cell, list | dict | set))
    return things + sum(kept(cell) for cell in cells if hasattr(cell, "__closure__"))


def test_a_model_that_is_traced_again_keeps_no_more():
    captured = capture.trace(model, Y, BATCH[0], unsupported=capture.zero)
    seen = []
    visitor = uses.Visitor(
        {},
        lambda slot, use, rows, outputs, inputs: seen.append(use) or outputs,
        lambda slot, use, leaf: None,
        lambda use: None,
    )
    before = kept(captured.run)
    for _ in range(10):
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(Y)]
        outputs = jax.eval_shape(lambda leaves: captured.run(visitor, leaves), leaves)
        assert outputs.shape == (N, C)
    assert len(seen) == 10 * 4  # of the table, the marked layer, its product and the head
    assert kept(captured.run) == before
