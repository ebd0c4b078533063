import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from benchmarks.__main__ import main
from benchmarks.data import download
from benchmarks.tasks import layer_rates


def test_each_layer_has_its_rate_and_decay_and_one_schedule():
    problem = layer_rates.make_problem(8, 20)
    y = problem.start(0)
    x = layer_rates.first_x(0.1)
    x = {"rate": x["rate"] | {"head": jnp.log(0.3)}, "decay": x["decay"] | {"second": jnp.log(0.5)}}
    optimizer, slope = problem.optimizer(x), jax.tree.map(jnp.ones_like, y.params)

    @jax.jit
    def moves(params):
        first, state = optimizer.update(slope, optimizer.init(params), params)
        return first, optimizer.update(slope, state, params)[0]

    first, second = moves(y.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first)), "the warmup starts at 0"
    kernels = {layer: second[layer]["kernel"][...] for layer in ("first", "second", "head")}
    np.testing.assert_allclose(kernels["head"] / kernels["first"].mean(), 3.0, rtol=1e-3)
    weights = y.params["second"]["kernel"][...]
    np.testing.assert_allclose(kernels["second"], -0.05 * (1 + 0.5 * weights), rtol=1e-4)


def test_the_validation_images_are_trained_on_where_they_have_no_other_use():
    part = np.zeros((2, 4)), np.zeros(2, int)
    data = layer_rates.Data(0, bx.Batch(outer=part, inner=part), part, part[1])
    batch = layer_rates.everything(data)
    assert [len(leaf) for leaf in jax.tree.leaves((batch.outer, batch.inner))] == [2, 2, 4, 4]


@pytest.mark.compiles(80)  # a whole run of a command
def test_a_run_moves_the_rates_of_reverse_alone(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (60, 28, 28), np.uint8), random.integers(0, 10, 60).astype(np.uint8)
    parts = {"train": (images, labels), "t10k": (images[:20], labels[:20])}
    monkeypatch.setattr(download, "images", lambda name, part: parts[part])
    small = {
        "SPLIT": {"train": 40, "validation": 20},
        "STEPS": 3,
        "GRID": (1e-3, 1e-2),
        "EPOCHS": bx.sampling.epochs(10),
    }
    for name, value in small.items():
        monkeypatch.setattr(layer_rates, name, value)
    with jax.enable_x64(False):
        assert main(f"layer-rates --quick --outer-steps 2 --side 7 --results {tmp_path}".split()) == 0
    assert "untuned-all" in capsys.readouterr().out
    folder = tmp_path / "layer-rates-quick"
    names = (*layer_rates.ANCHORS, *layer_rates.ROWS)
    found = {name: json.loads((folder / f"{name}-seed0.json").read_text()) for name in names}
    assert found["reverse"]["metrics"]["breakdowns"] == 0
    assert found["grid"]["configuration"]["step_sizes"]["rate"] in layer_rates.GRID
    losses = {name: record["metrics"]["test_loss"] for name, record in found.items()}
    assert len({losses[name] for name in ("untuned", "untuned-all", "reverse")}) == 3
    assert all(0 < record["metrics"]["inner_gradients"] < 20 for record in found.values())


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"side must be 28, 14 or 7; got 9. Pass --side 14"):
        layer_rates.Config(side=9)
    with pytest.raises(ValueError, match=r"methods must be some of reverse"):
        layer_rates.Config(common=layer_rates.Common(("forward",)))
    assert isinstance(layer_rates.make_problem(8, 20).optimizer(layer_rates.first_x()), optax.GradientTransformation)
