import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from benchmarks.data.images import Data
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Run
from benchmarks.harness.runner import Options
from benchmarks.networks.condensation_network import network
from benchmarks.networks.dense import perceptron, random_layers
from benchmarks.networks.model import Model, mean_cross_entropy
from benchmarks.tasks import condensation, condensation_figure, condensation_methods

MODEL = Model(lambda key, pixels: random_layers(4, key, pixels), perceptron, None)
T, RATE, MINIBATCH = 3, 0.2, 5


@pytest.fixture
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.fixture
def real():
    """Twelve real images and their labels."""
    image_key, label_key = jax.random.split(jax.random.key(1))
    return jax.random.uniform(image_key, (12, 6)), jax.random.randint(label_key, (12,), 0, 10)


def written_out(key, x, real):
    """F(x) of the network and the real images that the key draws, with each step of SGD and its momentum."""
    network_key, outer_key, _ = jax.random.split(key, 3)
    y = MODEL.init(network_key, 6)
    velocity = optax.tree.zeros_like(y)
    for t in range(T):
        rate = RATE * (1 + np.cos(np.pi * t / T)) / 2

        def loss(y):
            decay = sum((leaf**2).sum() for leaf in jax.tree.leaves(y))
            return mean_cross_entropy(MODEL, y, (x, jnp.arange(10))) + condensation.L2 / 2 * decay

        velocity = jax.tree.map(lambda m, g: 0.9 * m + g, velocity, jax.grad(loss)(y))
        y = jax.tree.map(lambda leaf, m, rate=rate: leaf - rate * m, y, velocity)
    outer = bx.sampling.minibatch(MINIBATCH)(outer_key, 0, real)
    return mean_cross_entropy(MODEL, y, outer)


def test_reverse_differentiates_the_training_of_a_fresh_network_on_the_learnt_images(real):
    """With another y in the state than the one that the key draws, which must not count."""
    x = jax.random.uniform(jax.random.key(0), (10, 6))
    training = condensation.training(MODEL, RATE, T, directions=1)

    def outer_loss(x, y, batch):
        return mean_cross_entropy(MODEL, y, batch)

    solver = condensation_methods.reverse(training)
    hypergrad = condensation.renewed(bx.hypergradient(outer_loss, solver), MODEL, MINIBATCH)
    labels = condensation.labels(1)
    state = hypergrad.init(x, MODEL.init(jax.random.key(9), 6), bx.Batch(None, labels))
    estimate = jax.jit(hypergrad.estimate)
    exact = jax.jit(jax.value_and_grad(written_out, argnums=1))
    for seed in (2, 3):
        grad, state, info = estimate(jax.random.key(seed), state, x, bx.Batch(real, labels))
        value, expected = exact(jax.random.key(seed), x, real)
        np.testing.assert_allclose(info.outer_loss, value, rtol=1e-12)
        np.testing.assert_allclose(grad, expected, rtol=1e-9, atol=1e-14)
    assert jnp.abs(grad).max() > 1e-6


def test_every_method_has_a_name_of_its_own_and_builds_a_solver():
    training = condensation.training(MODEL, RATE, T, directions=4)
    names = [row.name for row in condensation_methods.ROWS]
    assert len({*names}) == len(names)
    assert {"truncated", "kfac", "cg", "neumann", "identity", "forward-gradient", "guided-kfac", "reverse"} <= {*names}
    for row in condensation_methods.ROWS:
        assert isinstance(row.solver(training, **row.settings), bx.problem.InnerSolver)
        assert json.loads(json.dumps(dict(row.settings))) == row.settings


def drawn(data_seed=0):
    """Data of three real images for each class, in mixed order: pixels tell the class and the number of an image."""
    order = np.random.default_rng(3).permutation(30)
    classes, numbers = np.divmod(order, 3)
    pixels = jnp.asarray(np.stack([classes / 10, numbers / 10], axis=1))
    classes = jnp.asarray(classes)
    return Data(data_seed, bx.Batch((pixels[:5], classes[:5]), (pixels, classes)), (pixels[:4], classes[:4]), classes)


def test_anchors_are_real_images_of_their_class_and_means_of_them():
    np.testing.assert_array_equal(condensation.labels(2), np.repeat(np.arange(10), 2))
    np.testing.assert_allclose(condensation.means(1, drawn()), [[label / 10, 0.1] for label in range(10)], rtol=1e-12)
    for images in (1, 2, 3):
        labels = np.asarray(condensation.labels(images))
        taken = np.asarray(condensation.random(images, drawn()))
        np.testing.assert_allclose(taken[:, 0], labels / 10)
        assert len({*map(tuple, taken.round(6).tolist())}) == 10 * images
        means = np.asarray(condensation.means(images, drawn()))
        np.testing.assert_allclose(means[:, 0], labels / 10)
    np.testing.assert_allclose(np.sort(means[:, 1].reshape(10, 3)), [[0, 0.1, 0.2]] * 10, atol=1e-12)
    assert not np.array_equal(condensation.random(1, drawn(0)), condensation.random(1, drawn(1)))
    start = condensation.uniform(2, drawn())
    assert start.shape == (20, 2)
    assert 0 <= start.min() < 0.2 < 0.8 < start.max() <= 1


def test_learnt_images_stay_in_the_range_of_real_ones():
    optimizer = condensation.within_range(optax.sgd(1.0))
    x = jnp.array([[0.2, 0.5], [0.9, 0.4]])
    state = optimizer.init(x)
    for grad, expected in (([[1.0, 0.1], [-1.0, 0.0]], [[0, 0.4], [1, 0.4]]), ([[-0.3, 9.0], [0.1, -9.0]], None)):
        updates, state = optimizer.update(jnp.array(grad), state, x)
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(x, [[0.3, 0], [0.9, 1]] if expected is None else expected, atol=1e-12)


def test_the_convolutional_network_takes_grey_and_coloured_images_and_every_leaf_has_a_curvature():
    model = network(4)
    for pixels, last in ((64, 4), (784, 36), (3072, 64)):
        y = jax.eval_shape(lambda pixels=pixels: model.init(jax.random.key(0), pixels))
        assert y["Dense_0"]["kernel"].shape == (last, 10)
        assert jax.eval_shape(model.logits, y, jax.ShapeDtypeStruct((2, pixels), jnp.float32)).shape == (2, 10)
    y = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), y)
    loss = condensation.training(model, RATE, T, directions=1).loss
    report = str(bx.curvature.describe(loss, jnp.zeros((10, 3072)), y, condensation.labels(1)))
    assert "unsupported" not in report
    assert report.count("InstanceNorm") == 6


def run(method, estimator, inner_steps, seed, validation, test):
    configuration = {"estimator": estimator, "inner_steps": inner_steps}
    metrics = {"validation_accuracy": validation, "test_accuracy": test, "temp_bytes": 2**20 * inner_steps}
    curve = {"outer_step": [10, 20], "test_accuracy": [test / 2, test]}
    return Run("condensation", method, seed, configuration, Outcome(np.zeros((10, 4)), metrics, curve))


def test_the_rate_of_a_method_is_chosen_by_its_mean_accuracy_on_validation_images():
    nan = float("nan")
    low, high, lost = (
        [run(f"reverse-{rate}", "reverse", 5, seed, validation[seed], test) for seed in (0, 1)]
        for rate, validation, test in ((0.1, (0.9, 0.2), 0.95), (0.2, (0.6, 0.6), 0.5), (0.3, (0.99, nan), 0.99))
    )
    longer = [run("reverse-T7-0.1", "reverse", 7, 0, 0.3, 0.3)]
    anchor = [run("means", "means", 5, 0, 0.1, 0.1)]
    assert condensation_figure.chosen([*anchor, *low, *high, *lost, *longer]) == [*anchor, *high, *longer]
    figure = condensation_figure.draw(
        [*anchor, *low, *high, *longer, run("means-T7", "means", 7, 0, 0.2, 0.2)], ["means", "means-T7"], (2, 2)
    )
    steps, memory, *pictures = figure.get_axes()
    assert len(pictures) == 20
    assert {line.get_label() for line in steps.get_lines()} == {"means-T7", "reverse-T7-0.1"}
    (joined,) = memory.containers
    np.testing.assert_allclose(joined.lines[0].get_xydata(), [[5, 0.5], [7, 0.3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ipc": 0}, "ipc must be >= 1; got 0. Pass, say, --ipc 10"),
        ({"inner_steps": ()}, "inner_steps must be >= 1; got none. Pass, say, --inner-steps 10"),
        ({"inner_steps": (10, 0)}, "inner_steps must be >= 1; got 10 0"),
        ({"directions": 0}, "directions must be >= 1; got 0"),
        ({"rates": (0.1, 0.0)}, "rates must be numbers > 0; got 0.1 0. Pass, say, --rates 0.02 0.05"),
        ({"rates": (float("nan"),)}, "rates must be numbers > 0; got nan"),
        ({"common": Options(("forward",))}, "methods must be some of identity, neumann"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        condensation.Config(**arguments)


@pytest.mark.usefixtures("single_precision")
@pytest.mark.compiles(60)  # a whole run of a command
def test_a_quick_run_compares_the_methods_and_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(condensation, "HIDDEN", 4)
    monkeypatch.setattr(condensation, "QUICK_INNER_STEPS", 12)
    monkeypatch.setattr(condensation, "NETWORKS", 2)
    monkeypatch.delitem(condensation.ANCHORS, "random")
    options = Options(("forward-gradient",), outer_steps=2, quick=True, results=tmp_path)
    assert condensation.Config(rates=(0.02, 0.05), ipc=2, directions=3, common=options).run() == 0
    folder = tmp_path / "condensation-digits-mlp-2-quick"
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert {*found} == {f"{name}-seed0" for name in ("means", "forward-gradient")}
    for record in found.values():
        assert record["configuration"]["inner_steps"] == record["metrics"]["inner_steps"] == 12
        assert 0 < record["metrics"]["validation_accuracy"] < 1
    assert found["forward-gradient-seed0"]["configuration"]["outer_optimizer"] == {"adam": {"linear_schedule": 0.05}}
    assert (folder / f"{folder.name}.png").exists()
