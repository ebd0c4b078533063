import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import bilevax as bx
from benchmarks.__main__ import main
from benchmarks.data.few_shot import QUERIES, WAYS
from benchmarks.decentralized import heads, meta_learning
from benchmarks.decentralized.exact import Effort, evaluator
from benchmarks.harness.errors import DataError

TASK = "decentralized-meta-learning"
AGENTS, TASKS, SHOTS, CLASSES, NUMBER, SIDE = 3, 2, 2, 12, 60, 6


def photos(seed):
    """Noise around a picture of each class."""
    random = np.random.default_rng(seed)
    pictures = random.uniform(size=(CLASSES, 1, SIDE, SIDE, 3))
    return (pictures + random.uniform(0, 0.3, size=(CLASSES, NUMBER, SIDE, SIDE, 3))).astype(np.float32)


@pytest.fixture(autouse=True)
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.fixture
def small(monkeypatch):
    """A tiny backbone and few test tasks."""
    monkeypatch.setattr(heads, "BACKBONE", heads.Backbone(widths=(4,)))
    monkeypatch.setattr(meta_learning, "BACKBONE", heads.BACKBONE)
    monkeypatch.setattr(meta_learning, "TEST_TASKS", 3)
    monkeypatch.setattr(meta_learning, "OUTER_GRID", meta_learning.OUTER_GRID[1:3])
    monkeypatch.setattr(meta_learning, "INNER_GRID", meta_learning.INNER_GRID[1:2])
    monkeypatch.setattr(meta_learning, "read", lambda name: (jnp.asarray(photos(0)), jnp.asarray(photos(1))))


@pytest.fixture(scope="module")
def tasks():
    return heads.deal(photos(0), bx.partition.dirichlet_balanced(AGENTS, alpha=0.3, seed=0), TASKS, SHOTS, seed=0)


def network(tasks):
    return meta_learning.network(tasks, jax.tree.map(lambda leaf: leaf[0], tasks.batch), 0)


def test_agents_draw_tasks_from_images_of_their_own_without_repeating_any_in_a_task(tasks):
    labels = np.repeat(np.arange(CLASSES), NUMBER)
    (parts,) = bx.partition.dirichlet_balanced(AGENTS, alpha=0.3, seed=0)(labels)
    assert tasks.ids.shape == (AGENTS, TASKS, WAYS, SHOTS + QUERIES)
    for rows, ids in zip(parts, tasks.ids, strict=True):
        assert set(ids.ravel()) <= set(rows)
        assert all(len(set(one.ravel())) == one.size for one in ids)
    np.testing.assert_array_equal(labels[tasks.ids], np.broadcast_to(tasks.classes[..., None], tasks.ids.shape))
    assert all(len(set(classes)) == WAYS for classes in tasks.classes.reshape(-1, WAYS))


def test_support_and_query_are_the_images_that_were_drawn(tasks):
    rows = photos(0).reshape(-1, SIDE, SIDE, 3)
    for (images, labels), ids in (
        (tasks.batch.inner, tasks.ids[..., :SHOTS]),
        (tasks.batch.outer, tasks.ids[..., SHOTS:]),
    ):
        np.testing.assert_array_equal(images, rows[ids.reshape(AGENTS, TASKS, -1)])
        np.testing.assert_array_equal(labels[0, 0], np.repeat(np.arange(WAYS), ids.shape[-1]))


def test_features_have_one_length_so_that_the_curvature_is_bounded_for_every_x(small, tasks):
    net = network(tasks)
    x = jax.tree.map(lambda leaf: 5 * leaf + 0.1, net.x)
    rows = jax.jit(heads.features)(x, tasks.batch.inner[0][0])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=2), heads.LENGTH, rtol=1e-3)

    def flat(y):
        return net.problem.inner_loss(x, y.reshape(net.y.shape), jax.tree.map(lambda leaf: leaf[0], net.batch.inner))

    hessian = jax.jit(jax.hessian(flat))(jnp.zeros(net.y.size))
    eigenvalues = np.linalg.eigvalsh(hessian)
    assert eigenvalues[0] > meta_learning.L2 / TASKS * 0.99
    assert eigenvalues[-1] < net.curvature()


def test_the_mean_over_agents_is_the_mean_over_all_tasks(small, tasks):
    net = network(tasks)
    y = jax.random.normal(jax.random.key(0), (AGENTS, *net.y.shape))

    @jax.jit
    def whole(y):
        every, losses = y.reshape(-1, *net.y.shape[1:]), {}
        for kind, (images, labels) in tasks.batch._asdict().items():
            logits = heads.features(net.x, images.reshape(-1, *images.shape[2:])) @ every
            shape = (AGENTS * TASKS, -1)
            losses[kind] = optax.softmax_cross_entropy_with_integer_labels(logits, labels.reshape(shape)).mean()
        return losses["outer"], losses["inner"] + meta_learning.L2 / 2 * jnp.sum(every**2) / len(every)

    @jax.jit
    def divided(y):
        parts = ((net.problem.outer_loss, net.batch.outer), (net.problem.inner_loss, net.batch.inner))
        return [net.loss(loss, net.x, y, batch) for loss, batch in parts]

    np.testing.assert_allclose(divided(y), whole(y), rtol=1e-5)


def solved(x, support):
    """The head of one task by scipy, from the features of its support images."""
    images, labels = support
    rows = np.asarray(heads.features(x, images[None])[0], float)
    hot = np.eye(WAYS)[labels]

    def value(flat):
        y = flat.reshape(-1, WAYS)
        logits = rows @ y
        logits -= logits.max(axis=1, keepdims=True)
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        loss = -np.mean(np.sum(hot * np.log(chances), axis=1)) + meta_learning.L2 / 2 * np.sum(y**2)
        return loss, (rows.T @ (chances - hot) / len(rows) + meta_learning.L2 * y).ravel()

    start = np.zeros(rows.shape[1] * WAYS)
    return scipy.optimize.minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x.reshape(-1, WAYS)


@pytest.mark.compiles(60)  # with the reading of the characters
def test_the_accurate_heads_are_those_that_numpy_finds_and_the_gradient_is_that_of_the_outer_loss(small, tasks):
    with jax.enable_x64(True):
        net = network(tasks)
        x, batch = jax.tree.map(
            lambda leaf: leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf,
            jax.device_get((net.x, net.batch)),
        )
        exactly = evaluator(net, Effort())
        start = np.zeros((AGENTS, *net.y.shape))
        at = exactly(x, start, batch)
        for agent, task in ((0, 0), (2, 1)):
            head = solved(x, jax.tree.map(lambda leaf, i=agent, j=task: leaf[i, j], batch.inner))
            np.testing.assert_allclose(at.y[agent, task], head, rtol=1e-4, atol=1e-6)
        assert at.residual < 1e-10
        way, size = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=float)).reshape(leaf.shape), x), 1e-5
        ends = [
            exactly(jax.tree.map(lambda leaf, d, s=s: leaf + s * d, x, way), at.y, batch).loss for s in (size, -size)
        ]
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * size), optax.tree.vdot(at.gradient, way), rtol=1e-5)


def test_a_minibatch_has_as_many_images_of_each_task_with_their_labels(tasks):
    images, labels = jax.tree.map(lambda leaf: leaf[1], tasks.batch.inner)
    drawn, given = heads.of_each_task(8)(jax.random.key(0), 0, (jnp.asarray(images), jnp.asarray(labels)))
    assert given.shape == (TASKS, 4)
    for task in range(TASKS):
        for image, label in zip(np.asarray(drawn[task]), np.asarray(given[task]), strict=True):
            assert (image == images[task, labels[task] == label]).all(axis=(1, 2, 3)).any()


def test_a_partition_that_leaves_an_agent_without_tasks_is_refused():
    with pytest.raises(DataError, match=r"leaves agent 0 with 2 classes of 7 images or more, for tasks of 5 classes"):
        heads.deal(photos(0), bx.partition.classes_per_agent(6, classes=2, seed=0), TASKS, SHOTS, seed=0)


@pytest.mark.compiles(120)  # a whole run of a command
def test_a_run_writes_records_of_accuracies_on_new_classes(small, tmp_path, capsys):
    options = "--agents 3 --partition iid --tasks 2 --shots 2 --batch-size 8 --outer-steps 6 --quick"
    options += " --methods lopa-local lopa-tracking"
    assert main([TASK, *options.split(), "--results", str(tmp_path)]) == 0
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*/*-seed0.json")}
    assert set(records) == {"lopa-local-seed0", "lopa-tracking-seed0"}
    for record in records.values():
        assert record["task"] == "decentralized_meta_learning"
        assert 0 <= record["metrics"]["test_accuracy"] <= 1
        assert record["metrics"]["test_loss"] > 0
        assert record["configuration"]["tasks"] == 2
    assert len([*tmp_path.glob("*/*.png")]) == 1
    assert "lower level of its own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shots 16", "shots must lie between 1 and 15; got 16. Pass, say, --shots 5."),
        ("--tasks 0", "tasks must be an int >= 1; got 0. Pass, say, --tasks 4."),
        ("--tasks 5", "batch_size must be a multiple of the 5 tasks of an agent; got 32. Pass, say, --batch-size 40."),
        ("--partition dirichlet", "got dirichlet. Pass, say, --partition dirichlet:0.1."),
        ("--methods mdbo", "; got mdbo. Pass, say, --methods sldbo."),
    ],
)
def test_bad_values_are_refused_with_the_fix(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([TASK, *arguments.split()])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
