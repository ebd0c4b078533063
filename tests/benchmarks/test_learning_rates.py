import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from benchmarks.__main__ import main
from benchmarks.data.images import load
from benchmarks.tasks import learning_rates

STEPS = 6
ROWS = {row.name: row for row in learning_rates.ROWS}


@pytest.fixture(scope="module")
def data():
    return load("digits", 0, 60, 40, 0.0)


@pytest.fixture(scope="module")
def estimates(data):
    """The first gradient of some rows for a schedule of six steps, from one key."""
    short = learning_rates.training(learning_rates.EACH)._replace(size=STEPS, steps=STEPS)
    x = jnp.log(jnp.linspace(0.3, 0.8, STEPS))
    settings = {"truncated": {"part": 3}, "forward-blocks-4": {"directions": 5, "blocks": 4}}

    def estimate(name):
        solver = ROWS[name].solver(short, **settings.get(name, {}))
        hypergrad = learning_rates.renewed(bx.hypergradient(learning_rates.outer_loss, solver))
        state = hypergrad.init(x, learning_rates.MODEL.init(jax.random.key(5), 64), data.batch)
        return jax.jit(hypergrad.estimate)(jax.random.key(3), state, x, data.batch)

    return {name: estimate(name) for name in ("reverse", "forward-exact", "forward-blocks-4", "truncated", "implicit")}


def test_forward_mode_along_all_entries_is_the_reverse_gradient(estimates):
    expected, _, info = estimates["reverse"]
    grad, _, same = estimates["forward-exact"]
    np.testing.assert_allclose(info.outer_loss, same.outer_loss, rtol=1e-12)
    np.testing.assert_allclose(grad, expected, rtol=1e-9)
    assert np.abs(expected).min() > 1e-5


def test_blocks_are_exact_for_the_mean_over_each_block(estimates):
    """Six entries in blocks of 2, 1, 2 and 1: whatever the random direction is, the sum over each is that of ∇F."""
    (expected, _, _), (grad, _, info) = estimates["reverse"], estimates["forward-blocks-4"]
    for block in (slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)):
        np.testing.assert_allclose(grad[block].sum(), expected[block].sum(), rtol=1e-9)
    assert 0.5 < info.inner.detail.cosine <= 1


def test_truncation_sees_only_the_last_rates_and_the_implicit_rule_none(estimates):
    (expected, _, _), (late, _, _), (none, _, _) = (estimates[name] for name in ("reverse", "truncated", "implicit"))
    np.testing.assert_array_equal(late[:4], 0)
    np.testing.assert_allclose(late[4:], expected[4:], rtol=1e-9)
    np.testing.assert_array_equal(none, 0)


def test_each_estimate_starts_from_a_network_of_its_own(data):
    seen = []
    hypergrad = learning_rates.renewed(
        bx.problem.Hypergradient(None, lambda key, state, x, batch: seen.append(state.y))
    )
    state = bx.hypergradients.HypergradientState({"weights": 0.0}, (), None)
    for key in jax.random.split(jax.random.key(0), 2):
        hypergrad.estimate(key, state, jnp.zeros(3), data.batch)
    first, second = (y["first"]["weights"] for y in seen)
    assert first.shape == (64, 32)
    assert np.abs(first - second).min() > 0


def test_the_line_of_three_numbers_is_a_decaying_rate_with_momentum():
    x = jnp.array([np.log(0.4), np.log(0.4) - 2, 0.0])
    np.testing.assert_allclose(learning_rates.LINE.rates(x)[::32], [0.4, 0.4 * np.exp(-1)], rtol=1e-12)
    optimizer = learning_rates.LINE.optimizer(x)
    first, state = optimizer.update(jnp.ones(()), optimizer.init(jnp.zeros(())))
    second, _ = optimizer.update(jnp.ones(()), state)
    np.testing.assert_allclose([first, second], [-0.4, -0.4 * np.exp(-2 / 64) * 1.5], rtol=1e-12)


def test_rates_tried_by_hand_include_constant_and_falling_ones():
    constant, cosine = (np.exp(tried) for tried in learning_rates.EACH.tried.values())
    np.testing.assert_allclose(constant, learning_rates.GRID[:, None] * np.ones(64))
    np.testing.assert_allclose(cosine[:, 0], learning_rates.GRID)
    assert (np.diff(cosine, axis=1) < 0).all()
    assert learning_rates.LINE.tried["decaying"].shape == (48, 3)


def test_methods_that_need_more_directions_than_numbers_are_refused():
    line = learning_rates.Config(schedule="line")
    assert [row.name for row in line._fitting()] == ["forward-exact", "reverse", "truncated", "implicit"]
    few = learning_rates.Options(("forward",))
    assert learning_rates.Config(common=few).schedule == "each-step"
    with pytest.raises(ValueError, match="methods must be some of forward-exact, reverse, truncated, implicit"):
        learning_rates.Config(schedule="line", common=few)


def test_a_run_raises_rates_that_are_too_low(tmp_path, monkeypatch, capsys):
    tried = {"constant": learning_rates.EACH.tried["constant"][:2]}
    monkeypatch.setitem(learning_rates.SCHEDULES, "each-step", learning_rates.EACH._replace(tried=tried))
    monkeypatch.setattr(learning_rates, "NETWORKS", 3)
    with jax.enable_x64(False):
        assert main(f"learning-rates --quick --methods forward-blocks-4 --results {tmp_path}".split()) == 0
    assert "fresh networks" in capsys.readouterr().out
    folder = tmp_path / "learning-rates-each-step-quick"
    anchor, learnt = (
        json.loads((folder / f"{name}-seed0.json").read_text()) for name in ("constant", "forward-blocks-4")
    )
    first, last = learnt["curve"]["validation_loss"]
    assert last < first < anchor["metrics"]["validation_loss"] * 1.2
    assert anchor["curve"]["validation_loss"][0] == anchor["curve"]["validation_loss"][1]
    assert learnt["configuration"]["settings"] == {"directions": 8, "blocks": 4}
    assert (folder / f"{folder.name}.png").read_bytes().startswith(b"\x89PNG")
