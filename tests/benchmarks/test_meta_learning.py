import functools
import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from benchmarks.__main__ import main
from benchmarks.data import few_shot
from benchmarks.networks import convolutional
from benchmarks.networks.few_shot import Network
from benchmarks.tasks import meta_learning

COUNTS = {"inner_gradients", "outer_gradients", "hessian_products", "cross_products", "breakdowns", "outer_steps"}
TEST = {"test_accuracy", "test_error", "test_loss"}
SIDE = 8
PLUGIN = """
import bilevax as bx

def mine(inner):
    return bx.ihvp.cg(maxiter=5, curvature=inner.curvature, sample=inner.ihvp_sample)

HYPERGRADIENTS = {"mine": mine}
"""


@pytest.fixture
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.fixture
def small(monkeypatch):
    """Drawings that are noise around a picture of their class, a narrow network, and few tasks."""

    def read(name):
        pictures = jax.random.uniform(jax.random.key(0), (9, 1, SIDE, SIDE))
        noise = jax.random.uniform(jax.random.key(1), (9, 8, SIDE, SIDE), maxval=0.2)
        images = jnp.broadcast_to(pictures, noise.shape) + noise
        return images, images

    network = Network(width=4, layers=1)
    for name, value in {"NETWORK": network, "TASKS": 2, "TEST_TASKS": 3, "read": read}.items():
        monkeypatch.setattr(meta_learning, name, value)


@pytest.fixture
def run(tmp_path, capsys):
    def start(arguments):
        code = main(["meta-learning", *arguments.split(), "--results", str(tmp_path)])
        records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("meta_learning/*.json")}
        return code, capsys.readouterr().out, records, tmp_path / "meta_learning" / "meta_learning.png"

    return start


def in_double_precision(data):
    return jax.tree.map(lambda leaf: leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, data)


@pytest.mark.compiles(60)  # with the reading of the characters
def test_the_meta_gradient_of_maml_is_that_of_a_loop_written_by_hand(small):
    data = in_double_precision(meta_learning.load("omniglot", 1, 0))
    rate, steps = 0.4, 3

    def mean_loss(y, batch):
        scores = jax.nn.log_softmax(meta_learning.logits(y, batch[0]))
        return -jnp.mean(jnp.take_along_axis(scores, batch[1][:, None], axis=1))

    def by_hand(x, task):
        y = x
        for _ in range(steps):
            y = jax.tree.map(lambda leaf, slope: leaf - rate * slope, y, jax.grad(mean_loss)(y, task.inner))
        return mean_loss(y, task.outer)

    key = jax.random.key(5)
    tasks = jax.jit(jax.vmap(few_shot.draw_task, (0, None)))(jax.random.split(key, 2), data.images)
    mean = jax.value_and_grad(lambda x, tasks: jax.vmap(by_hand, (None, 0))(x, tasks).mean())
    value, expected = jax.jit(mean)(data.x, tasks)
    one = bx.hypergradient(meta_learning.cross_entropy(), meta_learning.maml(steps, rate))
    many = meta_learning.over_tasks(one, 2)
    grad, state, info = jax.jit(many.estimate)(key, many.init(data.x, data.x), data.x, data.images)
    chex.assert_trees_all_close(grad, expected, rtol=0, atol=1e-10)
    chex.assert_trees_all_equal(state.y, data.x)
    np.testing.assert_allclose(info.outer_loss, value, rtol=1e-12)
    assert info.inner.calls.outer_gradients == 2
    assert info.inner.calls.inner_gradients == 2 * (steps + 1)
    assert optax.tree.norm(grad) > 1e-2


CG = functools.partial(bx.ihvp.cg, curvature=bx.curvature.gauss_newton)


@pytest.mark.parametrize(
    ("ihvp", "expected"),
    [
        (CG(maxiter=5), -1 / 12),
        (meta_learning.factors(), -0.25 / ((2.5 + 1.25**0.5) * (1 + 0.2**0.5))),
        (CG(maxiter=1, preconditioner=meta_learning.factors()), -1 / 12),
        (bx.ihvp.identity(2.0), -1 / 2),
    ],
)
def test_the_meta_gradient_of_imaml_is_known_for_ridge_regression(ihvp, expected):
    """y* = 1/2 and H = 3, so that ∇F = strength (y* − 1) / 3; without curvature it is y* − 1.

    Cholesky factors split the strength between A = 5/2 and B = 1: (A + √(A s / B)) (B + √(B s / A)) in place of H.
    """
    squared = functools.partial(meta_learning.loss, lambda y, inputs: inputs @ y, bx.curvature.squared_error)
    support = (jnp.array([[1.0], [2.0]]), jnp.ones((2, 1)))
    query = (jnp.ones((1, 1)), jnp.ones((1, 1)))
    solver = bx.inner.implicit(squared(0.5), optax.sgd(1 / 3), 1, ihvp=ihvp, initial=lambda x: x)
    hypergrad = bx.hypergradient(squared(), solver)
    x = jnp.zeros((1, 1))
    grad, state, info = jax.jit(hypergrad.estimate)(None, hypergrad.init(x, x), x, bx.Batch(query, support))
    np.testing.assert_allclose(grad, expected, rtol=1e-12)
    np.testing.assert_allclose(state.y, 0.5, rtol=1e-12)
    np.testing.assert_allclose(info.outer_loss, 1 / 8, rtol=1e-12)


def test_first_order_is_the_query_gradient_at_the_adapted_weights(small):
    data = in_double_precision(meta_learning.load("omniglot", 1, 0))
    task = jax.tree.map(lambda leaf: leaf[0], data.test)
    solver = meta_learning.first_order(steps=3, learning_rate=0.1, strength=0.5)
    hypergrad = bx.hypergradient(meta_learning.cross_entropy(), solver)
    grad, state, _ = jax.jit(hypergrad.estimate)(None, hypergrad.init(data.x, data.x), data.x, task)
    expected = jax.jit(jax.grad(meta_learning.cross_entropy(), argnums=1))(data.x, state.y, task.outer)
    chex.assert_trees_all_close(grad, expected, rtol=1e-12)


def test_the_convolution_by_patches_is_that_of_jax():
    images, kernel = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 7, 6, 3), (3, 3, 3, 4)])
    )
    expected = jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    got = jax.jit(convolutional.patches, static_argnums=(2, 3))(images, kernel, (2, 2), "SAME")
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_shrunk_drawings_have_ink_as_one():
    drawings = np.ones((2, 3, 14, 14), bool)
    drawings[1, 2, :7, 7:] = False
    drawings[0, 0, 13, 13] = False
    shrunk = few_shot.shrink(drawings)
    expected = np.zeros((2, 3, 2, 2))
    expected[1, 2, 0, 1], expected[0, 0, 1, 1] = 1, 1 / 49
    np.testing.assert_allclose(shrunk, expected, atol=1e-7)


def numbered(classes=9, drawers=7):
    """Images whose corners tell class, drawer and turn: only the first pixel is 1, the centre is the number."""
    images = np.zeros((classes, drawers, 3, 3))
    images[..., 1, 1] = np.arange(classes * drawers).reshape(classes, drawers)
    images[..., 0, 0] = 1
    return jnp.asarray(images)


@pytest.mark.parametrize("seed", range(5))
def test_a_task_has_distinct_classes_with_their_labels_and_no_query_image_in_the_support(seed):
    task = jax.jit(few_shot.draw_task)(jax.random.key(seed), numbered())
    (query, query_labels), (support, support_labels) = task
    assert query.shape == (25, 3, 3)
    assert support.shape == (5, 3, 3)
    numbers = np.concatenate([support[:, 1, 1], query[:, 1, 1]]).astype(int)
    labels = np.concatenate([support_labels, query_labels])
    assert len({*numbers.tolist()}) == 30
    np.testing.assert_array_equal(support_labels, np.arange(5))
    np.testing.assert_array_equal(np.bincount(query_labels), [5] * 5)
    classes = [{*(numbers[labels == label] // 7).tolist()} for label in range(5)]
    assert [len(of_one) for of_one in classes] == [1] * 5
    assert len(set.union(*classes)) == 5
    corners = np.concatenate([support, query])[:, [0, 0, 2, 2], [0, 2, 0, 2]]
    turns = [{*corners[labels == label].argmax(axis=1).tolist()} for label in range(5)]
    assert [len(of_one) for of_one in turns] == [1] * 5


def test_the_same_key_draws_the_same_task_and_another_one_another():
    images = numbered()
    draw = jax.jit(few_shot.draw_task)
    chex.assert_trees_all_equal(draw(jax.random.key(0), images), draw(jax.random.key(0), images))
    assert not np.array_equal(draw(jax.random.key(0), images).outer[0], draw(jax.random.key(1), images).outer[0])


def test_all_classes_drawers_and_turns_are_drawn():
    images = numbered(6, 7)
    many = jax.jit(jax.vmap(few_shot.draw_task, (0, None)))
    tasks = many(jax.random.split(jax.random.key(0), 200), images)
    numbers, counts = np.unique(tasks.inner[0][..., 1, 1], return_counts=True)
    np.testing.assert_array_equal(numbers, np.arange(42))
    assert counts.max() < 3 * counts.min()
    corners = np.asarray(tasks.inner[0][..., [0, 0, 2, 2], [0, 2, 0, 2]]).sum(axis=(0, 1))
    assert corners.min() > 200


@pytest.mark.usefixtures("single_precision", "small")
@pytest.mark.compiles(70)  # a whole run of a command
def test_a_run_writes_records_of_one_schema_a_plot_and_a_table(run, tmp_path):
    """An inverse of a plugin does what the same one does here."""
    (tmp_path / "my_methods.py").write_text(PLUGIN)
    code, output, records, plot = run(
        f"--seeds 2 --outer-steps 2 --methods imaml mine --plugin {tmp_path / 'my_methods.py'}"
    )
    assert code == 0
    names = ("pixels", "untrained", "imaml", "mine")
    assert set(records) == {f"{method}-seed{seed}" for method in names for seed in (0, 1)}
    for record in records.values():
        assert record["task"] == "meta_learning"
        assert record["configuration"]["data"] == "omniglot"
        assert 0 <= record["metrics"]["test_accuracy"] <= 1
        assert record["curve"]["test_accuracy"][-1] == record["metrics"]["test_accuracy"]
        assert TEST | {"seconds", "cpu_seconds"} <= set(record["curve"])
    for seed in (0, 1):
        metrics, own = (records[f"{name}-seed{seed}"]["metrics"] for name in ("imaml", "mine"))
        assert set(metrics) >= COUNTS | TEST | {"seconds", "compile_seconds", "temp_bytes", "outer_loss"}
        assert metrics["inner_gradients"] == 2 * 2 * 17
        assert metrics["outer_gradients"] == 2 * 2
        assert metrics["hessian_products"] <= 2 * 2 * 5
        assert metrics["cross_products"] == 2 * 2
        assert metrics["breakdowns"] == 0
        same = ("outer_loss", "test_accuracy", "hessian_products")
        assert [own[name] for name in same] == [metrics[name] for name in same]
        assert records[f"pixels-seed{seed}"]["metrics"]["test_loss"] is None
    accuracies = [records[f"imaml-seed{seed}"]["metrics"]["test_accuracy"] for seed in (0, 1)]
    assert f"{np.mean(accuracies):.3f}" in next(line for line in output.splitlines() if line.startswith("imaml"))
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("single_precision", "small")
def test_a_logit_that_is_not_finite_makes_the_accuracy_nan():
    data = meta_learning.load("omniglot", 1, 0)
    evaluate = meta_learning.scores(meta_learning.adapted(meta_learning.maml(1, 0.4)))
    assert np.isnan(evaluate(jax.tree.map(lambda leaf: leaf * jnp.nan, data.x), data.test)["test_accuracy"])


def test_a_method_that_is_not_there_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["meta-learning", "--methods", "reptile"])
    assert "got reptile. Pass, say, --methods maml." in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.compiles(50)
@pytest.mark.slow
@pytest.mark.usefixtures("single_precision")
@pytest.mark.skipif("BILEVAX_DATA" not in os.environ, reason="needs the folder BILEVAX_DATA with Omniglot")
def test_learnt_first_weights_classify_new_characters(run):
    code, _, records, _ = run("--methods maml --outer-steps 600 --budget 3600")
    accuracy = {name: record["metrics"]["test_accuracy"] for name, record in records.items()}
    assert code == 0
    assert accuracy["maml-seed0"] >= 0.8
    assert accuracy["maml-seed0"] > max(accuracy["pixels-seed0"], accuracy["untrained-seed0"]) + 0.1
