"""What Kronecker-factored curvature refuses or reports, beyond layers that no rule covers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax.curvature import capture, kronecker

EXACT = bx.curvature.fisher.exact
INPUTS, LABELS = jax.random.normal(jax.random.key(0), (6, 3)), jnp.arange(6) % 2
Y = {"w": jnp.arange(6.0).reshape(3, 2) / 7, "s": jnp.array([0.5, 2.0])}


def model(y, inputs):
    return inputs @ y["w"] * y["s"][None]


def make_loss(model=model, loss=bx.curvature.softmax_cross_entropy, **options):
    return bx.curvature.ModelLoss(model, loss, lambda x, batch: batch, **options)


def factors(loss=None, y=Y, **options):
    find = lambda y, batch: kronecker.factors(None, loss or make_loss(), 0.0, y, batch, fisher=EXACT, **options)  # noqa: E731
    return jax.jit(find)(y, (INPUTS, LABELS))


def prepared(ihvp, state=(), loss=None):
    return ihvp.prepare(jax.random.key(0), state, loss or make_loss(), (0.0, Y, (INPUTS, LABELS)))


def test_leaves_whose_paths_read_alike_keep_factors_of_their_own():
    y = {"a": {"b": jnp.ones((3, 2))}, "a/b": jnp.ones((2, 2))}
    found = factors(make_loss(lambda y, inputs: jnp.tanh(inputs @ y["a"]["b"]) @ y["a/b"]), y)
    assert sorted(block.A.shape for block in found.values()) == [(2, 2), (3, 3)]


MIXED = {
    "cumsum": lambda y, inputs: jnp.cumsum(inputs @ y["w"], axis=0) * y["s"][None],
    "shift": lambda y, inputs: jax.lax.pad(inputs @ y["w"], 0.0, ((1, -1, 0), (0, 0, 0))) * y["s"][None],
    "sort": lambda y, inputs: jnp.sort(inputs @ y["w"], axis=0) * y["s"][None],
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_examples_is_not_followed(name):
    """The message names the equation that lost them, its shapes and its line, and a way out."""
    primitive = {"shift": "pad"}.get(name, name)
    where = (
        rf"got s \(mul: examples axis is lost: {primitive} \[6, 2\] -> \[6, 2\] at test_curvature_input.py:\d+.*; \w+"
    )
    with pytest.raises(ValueError, match=where):
        factors(make_loss(MIXED[name]))


def test_outputs_must_keep_the_order_of_the_examples():
    with pytest.raises(ValueError, match=r"model must return outputs \[N, ..., C\] whose row n belongs to example n"):
        factors(make_loss(lambda y, inputs: jnp.flip(model(y, inputs), 0)))
    with pytest.raises(ValueError, match=r"inputs must hold the examples.*no array with 12 rows.*one row for each"):
        factors(make_loss(lambda y, inputs: jnp.repeat(model(y, inputs), 2, axis=0)))
    with pytest.raises(
        ValueError, match=r"model must return one array of outputs \[N, ..., C\]; got shapes \[\(6,\)\]"
    ):
        factors(make_loss(lambda y, inputs: model(y, inputs)[:, 0]))


def test_kinds_of_loss_that_do_not_fit():
    one = make_loss(lambda y, inputs: model(y, inputs)[:, :1])
    with pytest.raises(
        ValueError, match=r"C >= 2 classes for softmax_cross_entropy; got shape \(6, 1\). Use .*sigmoid"
    ):
        factors(one)
    elementwise = bx.curvature.convex(lambda outputs, targets: outputs**2)
    with pytest.raises(
        ValueError, match=r"value must return one number.*\(6,\); got shape \(6, 2\). Sum over the last"
    ):
        factors(make_loss(loss=elementwise))


def test_decay_that_differs_between_a_weight_and_its_bias_is_told():
    def affine(y, inputs):
        return inputs @ y["w"] + y["s"][None]

    loss = make_loss(affine, l2=lambda x: {"w": 1.0, "s": 0.0})
    assert "l2 varies inside w + s: its mean" in str(bx.curvature.describe(loss, 0.0, Y, (INPUTS, LABELS)))
    same = make_loss(affine, l2=lambda x: {"w": 1.0, "s": 1.0})
    assert "l2" not in str(bx.curvature.describe(same, 0.0, Y, (INPUTS, LABELS)))


def test_options_of_factors():
    with pytest.raises(ValueError, match="sharing must be a function"):
        factors(sharing="expand")
    with pytest.raises(ValueError, match=r"sharing must be a Sharing; got None.*Return bx.curvature.expand"):
        factors(sharing=lambda name: None)
    with pytest.raises(ValueError, match="fisher must be a function"):
        kronecker.factors(None, make_loss(), 0.0, Y, (INPUTS, LABELS), fisher="exact")
    with pytest.raises(ValueError, match="y must hold at least one floating-point array"):
        factors(make_loss(lambda y, inputs: inputs), {})


@pytest.mark.parametrize("answer", [{}, {"w": "mine"}, None], ids=["empty", "string", "none"])
def test_treatments_of_ones_own_must_be_treatments(answer):
    unused = make_loss(lambda y, inputs: inputs[:, :2] * y["s"][None])
    with pytest.raises(
        ValueError, match=r"unsupported must return a dict with a Treatment for each leaf.*for w. Return"
    ):
        factors(unused, unsupported=lambda leaves: answer)


def test_damping_below_zero():
    with pytest.raises(ValueError, match=r"damping must be a finite number >= 0; got -1.0"):
        bx.curvature.inverted(factors(), make_loss(), 0.0, Y, (INPUTS, LABELS), damping=-1.0)
    solve = jax.jit(lambda b: prepared(bx.ihvp.kfac(damping=lambda eigenvalues: -1.0))[0](b))
    assert solve(Y)[1].breakdown


def test_what_is_solved_for_must_be_like_y():
    for wrong in ({"w": Y["w"]}, {"w": Y["w"].T, "s": Y["s"]}):
        with pytest.raises(ValueError, match=r"b must be a pytree like y, with leaves \[\(2,\), \(3, 2\)\]; got"):
            jax.eval_shape(lambda b: prepared(bx.ihvp.kfac())[0](b), wrong)


@pytest.mark.parametrize("answer", [None, 1.0, [True]], ids=["none", "number", "vector"])
def test_schedules_must_say_yes_or_no(answer):
    schedule = lambda step: answer if answer != [True] else jnp.array(answer)  # noqa: E731
    with pytest.raises(ValueError, match="inverse_every must return one bool for a step; got"):
        prepared(
            bx.ihvp.kfac(inverse_every=schedule), bx.ihvp.kfac(ema=0.5).init(0.0, Y, (INPUTS, LABELS), make_loss())
        )


def test_states_and_averages():
    with pytest.raises(ValueError, match=r"state must be a KFACState; got \(\).*ihvp.init"):
        prepared(bx.ihvp.kfac(ema=0.9), ())
    with pytest.raises(ValueError, match="ema must be one number; got"):
        bx.ihvp.kfac(ema="x")


def test_a_tap_must_see_the_same_positions():
    def wrong(y, inputs):
        outputs = inputs @ y["w"] * y["s"][None]
        return bx.curvature.observe(outputs, jnp.stack([inputs, inputs], axis=1), y["w"])

    with pytest.raises(
        ValueError, match=r"inputs of observe must have the positions of its outputs, 1 for each.*got 2"
    ):
        factors(make_loss(wrong))


def test_a_tap_inside_vmap_is_one_outside():
    def one(y, a):
        return bx.curvature.observe(a @ y["w"], a, y["w"]) * y["s"]

    def whole(y, inputs):
        return bx.curvature.observe(inputs @ y["w"], inputs, y["w"]) * y["s"][None]

    inside = factors(make_loss(lambda y, inputs: jax.vmap(lambda a: one(y, a))(inputs)))
    jax.tree.map(np.testing.assert_array_equal, inside, factors(make_loss(whole)))
    captured = capture.trace(whole, Y, INPUTS)
    assert [block.rule for block in captured.blocks] == ["elementwise", "observed"]


def test_factors_are_measured_only_where_they_are_used():
    ihvp, loss = bx.ihvp.kfac(inverse_every=3), make_loss()
    state, spent = ihvp.init(0.0, Y, (INPUTS, LABELS), loss), []

    @jax.jit
    def step(key, state):
        apply, state = ihvp.prepare(key, state, loss, (0.0, Y, (INPUTS, LABELS)))
        return state, apply(Y)[1].setup_gradients

    for key in jax.random.split(jax.random.key(1), 7):
        state, gradients = step(key, state)
        spent.append(int(gradients))
    assert spent == [1, 0, 0, 1, 0, 0, 1]
