import hashlib
import io
import json
import math
import tarfile
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from scipy.special import expit, logsumexp

import bilevax as bx
from benchmarks.data import few_shot, photos
from benchmarks.data.images import IMAGES, ImageSet, load
from benchmarks.decentralized import curvature as decentralized_curvature
from benchmarks.decentralized import hyper_cleaning as decentralized_hyper_cleaning
from benchmarks.harness.errors import DataError
from benchmarks.harness.loop import Outcome
from benchmarks.harness.report import Run
from benchmarks.harness.runner import Options
from benchmarks.networks import convolutional
from benchmarks.networks.classifiers import ladder
from benchmarks.networks.dense import MODELS
from benchmarks.studies import skipping
from benchmarks.tasks import condensation, estimators, forms, hyper_cleaning, long_tail, poisoning
from benchmarks.tasks.methods import named


@pytest.fixture
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Packs JPEG files of one colour, a function (name, {path in the archive: (colour, side)}) -> path."""
    monkeypatch.setenv("BILEVAX_DATA", str(tmp_path))
    monkeypatch.setattr(photos, "CIFAR10", {"train": 2, "test": 1})
    monkeypatch.setattr(photos, "MINI_IMAGENET", 2)
    for reader in (photos.cifar10, photos.mini_imagenet):
        reader.cache_clear()

    def pack(name, files):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:xz") as tar:
            for member, (colour, side) in files.items():
                content = io.BytesIO()
                Image.new("RGB", (side, side), colour).save(content, "JPEG")
                info = tarfile.TarInfo(member)
                info.size = content.tell()
                content.seek(0)
                tar.addfile(info, content)
        trust(path)
        return path

    def trust(path):
        """What the archive holds is what was published."""
        listing = [f"{hashlib.sha256(content).hexdigest()}  {member}\n" for member, content in members_of(path)]
        name, sha256 = str(path.relative_to(tmp_path)), hashlib.sha256("".join(listing).encode()).hexdigest()
        monkeypatch.setitem(photos.ARCHIVES, name, photos.Archive("somewhere", sha256))

    def members_of(path):
        with tarfile.open(path) as tar:
            return sorted((member.name, tar.extractfile(member).read()) for member in tar)

    yield pack
    for reader in (photos.cifar10, photos.mini_imagenet):
        reader.cache_clear()


def test_cifar10_is_read_with_labels_in_the_order_of_class_names_and_numbers(archive):
    shades = {"train/frog/0.jpg": 200, "train/cat/1.jpg": 10, "train/frog/1.jpg": 220, "train/cat/0.jpg": 30}
    archive("cifar10-jpeg/train.tar.xz", {path: ((shade, 0, 255 - shade), 32) for path, shade in shades.items()})
    images, labels = photos.cifar10("train")
    assert images.shape == (4, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(images[:, 5, 7, 0], [30, 10, 200, 220], atol=6)
    np.testing.assert_allclose(images[:, 5, 7, 2], [225, 245, 55, 35], atol=6)


def test_photographs_of_miniimagenet_are_shrunk_to_means(archive):
    files = {
        f"test/{wnid}_{i}.jpg": ((shade, shade, shade), 84) for wnid, shade in (("n2", 90), ("n1", 40)) for i in (0, 1)
    }
    archive("mini-imagenet/test_first200.tar.xz", files)
    images = photos.mini_imagenet("test", 4)
    assert images.shape == (2, 2, 21, 21, 3)
    np.testing.assert_allclose(images[0], 40, atol=4)
    np.testing.assert_allclose(images[1], 90, atol=4)


def test_archives_that_are_missing_cut_or_of_other_images_are_refused(archive, monkeypatch):
    with pytest.raises(
        DataError, match=r"test.tar.xz is missing. Name a folder that has it with BILEVAX_DATA=<folder>"
    ):
        photos.cifar10("test")
    path = archive("cifar10-jpeg/test.tar.xz", {"test/cat/0.jpg": ((0, 0, 0), 16)})
    with pytest.raises(DataError, match=r"test/cat/0.jpg must be a JPEG or PNG file of 32 × 32 pixels: it is 16 × 16"):
        photos.cifar10("test")
    archive("cifar10-jpeg/test.tar.xz", {f"test/cat/{number}.jpg": ((0, 0, 0), 32) for number in range(2)})
    with pytest.raises(DataError, match=r"test.tar.xz must have 1 images for each class; got 2 for cat. Copy it again"):
        photos.cifar10("test")
    monkeypatch.setitem(photos.ARCHIVES, "cifar10-jpeg/test.tar.xz", photos.Archive("somewhere", "0" * 64))
    with pytest.raises(DataError, match=r"must hold the JPEG files of somewhere, .* has the sha256 0{64}; got "):
        photos.cifar10("test")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"test.tar.xz cannot be read as a tar.xz archive.*Copy it again."):
        photos.cifar10("test")


def test_bytes_become_shares_and_a_test_set_can_be_drawn(monkeypatch):
    images = np.zeros((6, 12), np.uint8)
    images[:, 3:6] = [0, 51, 255]
    tests = np.arange(20, dtype=np.uint8)[:, None] * np.ones((1, 12), np.uint8)
    pool = (images, np.arange(6)), (tests, np.arange(20) % 10)
    monkeypatch.setitem(IMAGES, "coloured", ImageSet(lambda times: pool, (2, 2, 3)))
    data = load("coloured", seed=0, train=4, validation=2, corruption=0, test=5)
    assert bool(data.clean.all())
    np.testing.assert_allclose(data.batch.inner[0][0, 3:6], [0, 0.2, 1], rtol=1e-6)
    drawn = np.rint(np.asarray(data.test[0][:, 0]) * 255).astype(int)
    assert len({*drawn.tolist()}) == 5
    np.testing.assert_array_equal(data.test[1], drawn % 10)


@pytest.mark.parametrize("name", ["cnn", "resnet", "resnet18"])
def test_networks_take_grey_and_coloured_images_and_every_leaf_has_a_curvature(name):
    model = convolutional.MODELS[name]
    for pixels in (64, 784, 3072):
        y = jax.eval_shape(lambda pixels=pixels: model.init(jax.random.key(0), pixels))
        logits = jax.eval_shape(model.logits, y, jax.ShapeDtypeStruct((2, pixels), jnp.float32))
        assert logits.shape == (2, 10)
    kernels = [leaf.shape for leaf in jax.tree.leaves(y) if leaf.ndim == 4]
    assert sum(shape[:2] == (3, 3) for shape in kernels) == {"cnn": 3, "resnet": 7, "resnet18": 17}[name]
    if name != "resnet18":
        y = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), y)
        batch = jnp.zeros((2, 3072)), jnp.zeros(2, int), jnp.arange(2)
        report = str(bx.curvature.describe(hyper_cleaning.inner_loss(model), jnp.zeros(2), y, batch))
        assert "unsupported" not in report
        assert report.count("Dense_0") == 2


def test_the_logits_of_an_image_do_not_depend_on_the_others():
    model = convolutional.classifier(convolutional.Residual((8,)))
    images = np.random.default_rng(0).uniform(size=(3, 64))
    y = jax.jit(model.init, static_argnums=1)(jax.random.key(1), 64)
    logits = np.asarray(jax.jit(model.logits)(y, np.concatenate([images, images[::-1]])))
    np.testing.assert_allclose(logits[:3], logits[:2:-1], rtol=1e-5)
    assert np.ptp(logits[:, 0]) > 1e-3


def test_a_minibatch_finds_its_weights_by_number():
    """Two images of a set of four, with the weights that belong to them."""
    loss = hyper_cleaning.inner_loss(MODELS["linear"])
    x, y = jnp.array([0.0, 1.0, -1.0, 2.0]), {"weights": jnp.full((3, 10), 0.1), "bias": jnp.arange(10.0)}
    whole = hyper_cleaning.numbered(bx.Batch(None, (jnp.ones((4, 3)), jnp.array([0, 1, 2, 3])))).inner
    some = jax.tree.map(lambda leaf: np.asarray(leaf)[[3, 1]], whole)
    values = logsumexp(np.arange(10.0)) - np.array([3.0, 1.0])
    fit = np.mean(expit([2.0, 1.0]) * values)
    decay = hyper_cleaning.L2 / 2 * (30 * 0.01 + np.sum(np.arange(10.0) ** 2))
    np.testing.assert_allclose(jax.jit(loss)(x, y, some), fit + decay, rtol=1e-6)


@pytest.mark.parametrize(
    "task",
    [
        *(hyper_cleaning, poisoning, long_tail, condensation),
        *(skipping, decentralized_hyper_cleaning, decentralized_curvature),
    ],
)
def test_every_task_on_images_takes_every_set_of_the_table(task):
    assert typing.get_args(typing.get_type_hints(task.Config)["data"]) == tuple(IMAGES)


def test_small_images_have_the_shape_of_the_table_and_sides_can_be_shortened():
    (images, labels), tests = IMAGES["digits"].read(1)
    assert tests is None
    assert images.shape == (1797, math.prod(IMAGES["digits"].shape))
    (halved, same), _ = IMAGES["digits"].read(2)
    expected = images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    np.testing.assert_allclose(halved, expected, rtol=1e-6)
    np.testing.assert_array_equal(same, labels)


def test_photographs_are_shortened_to_rounded_means():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, :2, :2, 1] = [[10, 20], [30, 41]]
    assert photos.reduced(images, 1) is images
    halved = photos.reduced(images, 2)
    assert halved.shape == (2, 2, 2, 3)
    assert halved[1, 0, 0].tolist() == [0, 25, 0]
    assert halved.sum() == 25


@pytest.mark.usefixtures("single_precision")
@pytest.mark.compiles(100)  # a whole run of a command
def test_a_convolutional_network_is_cleaned_by_minibatches_with_kronecker_factors(tmp_path, monkeypatch):
    monkeypatch.setitem(convolutional.MODELS, "cnn", convolutional.classifier(convolutional.Convolutional((4,))))
    monkeypatch.setitem(IMAGES, "digits", IMAGES["digits"]._replace(split={"train": 60, "validation": 30}))
    monkeypatch.setattr(hyper_cleaning, "MINIBATCH", 12)
    monkeypatch.setattr(hyper_cleaning, "ANCHORS", hyper_cleaning.ANCHORS[:1])
    options = Options(("kfac",), outer_steps=2, results=tmp_path)
    assert hyper_cleaning.Config(model="cnn", corruption=0.3, common=options).run() == 0
    folder = tmp_path / "hyper_cleaning-digits-cnn-0.3"
    record = json.loads((folder / "kfac-seed0.json").read_text())
    assert record["configuration"]["minibatch"] == 12
    assert record["configuration"]["corruption"] == 0.3
    assert record["metrics"]["cross_products"] == 2
    assert record["metrics"]["breakdowns"] == 0
    assert (folder / f"{folder.name}.png").exists()


@pytest.mark.usefixtures("single_precision")
@pytest.mark.compiles(100)  # a whole run of a command
def test_images_are_cleaned_as_published(tmp_path, monkeypatch):
    monkeypatch.setitem(IMAGES, "digits", IMAGES["digits"]._replace(split={"train": 60, "validation": 30}))
    monkeypatch.setattr(hyper_cleaning, "ANCHORS", hyper_cleaning.ANCHORS[1:2])
    options = Options(("kfac",), outer_steps=2, results=tmp_path)
    config = hyper_cleaning.Config(model="mlp", width=8, depth=2, as_published=True, common=options)
    assert config.run() == 0
    folder = tmp_path / "hyper_cleaning-digits-mlp-8-width-2-depth-as-published"
    chosen = json.loads((folder / "kfac-seed0.json").read_text())["configuration"]
    assert chosen["inner_optimizer"] == {"sgd": {"learning_rate": 1e-3, "momentum": 0.9}}
    assert chosen["outer_optimizer"] == {"projected_sgd": {"learning_rate": 1.0, "momentum": 0.9}}
    assert [chosen[name] for name in ("l2", "minibatch", "outer_batch", "inner_steps")] == [0, 128, 128, 10]
    images = hyper_cleaning.standardized(load("digits", 0, 60, 30, 0.5)).batch.inner[0]
    np.testing.assert_allclose([images.mean(), images.std()], [0, 1], atol=1e-3)


def test_a_ladder_has_as_many_layers_of_one_width():
    shapes = {
        ("mlp", 256, 1, 784): [(784, 256), (256, 10)],
        ("mlp", 5, 3, 64): [(64, 5), (5, 5), (5, 5), (5, 10)],
        ("lenet", 84, 1, 3072): [(5, 5, 3, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10)],
        ("lenet", 100, 3, 256): [(5, 5, 1, 6), (5, 5, 6, 16), (16, 120), (120, 100), (100, 100), (100, 100), (100, 10)],
    }
    for (name, width, depth, pixels), expected in shapes.items():
        model = ladder(name, width, depth)
        y = jax.eval_shape(lambda model=model, pixels=pixels: model.init(jax.random.key(0), pixels))
        assert sorted(leaf.shape for leaf in jax.tree.leaves(y) if leaf.ndim > 1) == sorted(expected)
        logits = jax.eval_shape(model.logits, y, jax.ShapeDtypeStruct((2, pixels), jnp.float32))
        assert logits.shape == (2, 10)
    batch = jnp.zeros((2, 256)), jnp.zeros(2, int), jnp.arange(2)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), y)
    report = str(bx.curvature.describe(hyper_cleaning.inner_loss(model), jnp.zeros(2), zeros, batch))
    assert report.count("Conv") == 4
    assert "unsupported" not in report


def test_projected_steps_end_in_the_box_and_the_momentum_knows_of_none():
    """Heavy ball with momentum 0.9: 0.5 + 0.4 = 0.9, then 0.4 · 0.9 + 0.4 more is cut at 1, and so on to the left."""
    optimizer = forms.published(learning_rate=1.0).optimizer
    x, state = jnp.array([0.5, 0.25]), optimizer.init(jnp.array([0.5, 0.25]))
    seen = []
    for grad in ([-0.4, 0.5], [-0.4, 0.5], [1.0, -1.0], [0.0, 0.0]):
        updates, state = optimizer.update(jnp.array(grad), state, x)
        x = optax.apply_updates(x, updates)
        seen.append(x)
    trace = [-0.316, 0.145]  # 0.9 (0.76) − 1, and 1 − 0.9 (0.95)
    expected = [[0.9, 0.0], [1.0, 0.0], [1 + trace[0], trace[1]], [1 + 1.9 * trace[0], 1.9 * trace[1]]]
    np.testing.assert_allclose(np.array(seen), expected, atol=1e-7)


@pytest.mark.parametrize("form", [forms.published(1.0), forms.scores(1e-3, 0.1)])
def test_forms_start_at_the_weights_that_are_asked_for(form):
    weights = jnp.array([0.0, 0.5, 1.0, 0.25])
    np.testing.assert_allclose(form.weights(form.start(weights)), weights, atol=1e-12)


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (hyper_cleaning, {"corruption": 1.0}, "corruption must be a probability, 0 < corruption < 1"),
        (hyper_cleaning, {"full": True}, "full is about public data sets; got it with data=digits"),
        (hyper_cleaning, {"width": 8}, "width must be an int >= 1, with mlp or lenet; got 8 with linear."),
        (hyper_cleaning, {"model": "mlp", "depth": 0}, "depth must be an int >= 1, with mlp or lenet; got 0 with mlp."),
        (hyper_cleaning, {"model": "lenet"}, "model lenet needs images of 16 pixels a side; got data=digits"),
        (poisoning, {"radius": 0.0}, r"radius must lie in \(0, 1\]; got 0. Pass, say, --radius 0.5"),
        (poisoning, {"full": True}, "full is about public data sets; got it with data=digits"),
        (long_tail, {"full": True}, "full is about public data sets; got it with data=digits"),
    ],
)
def test_options_that_make_no_sense_are_refused(task, arguments, message):
    with pytest.raises(ValueError, match=message):
        task.Config(**arguments)


def test_altered_images_stay_in_their_box_and_the_others_stay_as_they_are():
    first = jnp.array([[0.0, 0.3, 0.9], [0.5, 1.0, 0.2]])
    optimizer = poisoning.within(optax.sgd(1.0), radius=0.25)
    x, state = first, optimizer.init(first)
    for grad in (jnp.full((2, 3), -9.0), jnp.full((2, 3), 0.1), jnp.full((2, 3), 9.0)):
        updates, state = optimizer.update(grad, state, x)
        x = optax.apply_updates(x, updates)
        if grad[0, 0] < 0:
            highest = x
    np.testing.assert_allclose(highest, [[0.25, 0.55, 1], [0.75, 1, 0.45]], atol=1e-12)
    np.testing.assert_allclose(x, [[0, 0.05, 0.65], [0.25, 0.75, 0]], atol=1e-12)
    images, labels = poisoning.poisoned(x, (jnp.arange(12.0).reshape(4, 3), jnp.arange(4)))
    np.testing.assert_array_equal(images[:2], x)
    np.testing.assert_array_equal(images[2:], [[6, 7, 8], [9, 10, 11]])
    np.testing.assert_array_equal(labels, np.arange(4))


@pytest.mark.usefixtures("single_precision")
@pytest.mark.compiles(100)  # a whole run of a command
def test_an_attack_raises_the_validation_loss_of_a_model_trained_anew(tmp_path, monkeypatch):
    setting = poisoning.SMALL._replace(split={"train": 120, "validation": 100}, poisons=6, anew=100)
    monkeypatch.setattr(poisoning, "SMALL", setting)
    config = poisoning.Config(common=Options(("kfac",), outer_steps=10, results=tmp_path))
    assert config.run() == 0
    folder = tmp_path / "poisoning-digits-linear"
    found = {
        name: json.loads((folder / f"{name}-seed0.json").read_text())["metrics"] for name in ("none", "random", "kfac")
    }
    assert found["none"]["change"] == 0
    assert 0.25 < found["random"]["change"] <= 0.5
    assert 0 < found["kfac"]["change"] <= 0.5
    assert found["kfac"]["anew_loss"] > max(found["none"]["anew_loss"], found["random"]["anew_loss"]) * 1.05
    assert found["none"]["validation_error"] < 0.3
    assert (folder / f"{folder.name}.png").exists()


def test_methods_are_compared_after_the_time_of_the_fastest():
    def run(method, seed, seconds, errors):
        curve = {"seconds": seconds, "test_error": errors}
        return Run("poisoning", method, seed, {}, Outcome(jnp.zeros(1), {}, curve))

    runs = [
        run("fast", 0, [0.5, 1.0], [0.1, 0.2]),
        run("fast", 1, [0.6, 1.2], [0.3, 0.4]),
        run("slow", 0, [0.9, 1.8], [0.5, 0.9]),
        run("slow", 1, [2.0, 4.0], [0.6, 0.9]),
    ]
    assert poisoning.at_equal_time(runs, "test_error") == (1.0, {"fast": [0.2, 0.3], "slow": [0.5, 0.6]})


def test_training_images_fall_geometrically_and_validation_is_balanced():
    data = long_tail.load("digits", long_tail.SMALL, seed=3)
    np.testing.assert_array_equal(data.counts, np.geomspace(120, 3, 10).round())
    np.testing.assert_array_equal(np.bincount(data.batch.outer[1]), [5] * 10)
    assert sum(len(part[1]) for part in (*data.batch, data.test)) == 1797
    _, labels, weights = long_tail.ANCHORS["balanced"](data).inner
    masses = np.bincount(labels, weights=np.asarray(long_tail.scaled(weights)))
    np.testing.assert_allclose(masses, len(labels) / 10, rtol=1e-4)


def test_weights_read_the_losses_at_the_warm_y_as_constants():
    """The derivative of the weighted loss in x is that of fixed losses, whatever y does to them later."""
    model = MODELS["linear"]
    x, y = long_tail.weight_network(jax.random.key(0)), {"weights": jnp.ones((2, 10)), "bias": jnp.arange(10.0)}
    images, labels = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2))), np.array([9, 1, 9, 4])
    seen = []
    inner = bx.problem.Hypergradient(
        lambda x, y, batch: seen.append(batch.inner),
        lambda key, state, x, batch: seen.append(batch.inner),
    )
    wrapped = long_tail.with_losses(inner, model)
    wrapped.init(x, y, bx.Batch(None, (images, labels)))
    warm = bx.hypergradients.HypergradientState(y, (), None)
    wrapped.estimate(None, warm, x, bx.Batch(None, (images, labels)))
    logits = np.asarray(images) @ np.asarray(y["weights"]) + np.asarray(y["bias"])[None]
    expected = logsumexp(logits, axis=1) - logits[np.arange(4), labels]
    for batch in seen:
        np.testing.assert_allclose(batch[2], expected, rtol=1e-6)
    assert len(seen) == 2


@pytest.mark.usefixtures("single_precision")
@pytest.mark.compiles(100)  # a whole run of a command
def test_a_weight_network_is_learnt_for_long_tailed_digits(tmp_path, monkeypatch):
    monkeypatch.delitem(long_tail.ANCHORS, "validation")
    assert long_tail.Config(model="linear", common=Options(("kfac",), outer_steps=3, results=tmp_path)).run() == 0
    folder = tmp_path / "long_tail-digits-linear"
    found = {path.stem: json.loads(path.read_text())["metrics"] for path in folder.glob("*.json")}
    assert {*found} == {"uniform-seed0", "balanced-seed0", "kfac-seed0"}
    assert found["uniform-seed0"]["tail_accuracy"] < found["balanced-seed0"]["tail_accuracy"]
    assert found["kfac-seed0"]["cross_products"] == 3
    assert (folder / f"{folder.name}.png").exists()


def test_several_shots_give_each_class_so_many_support_images_and_photographs_are_not_turned():
    images = jnp.zeros((6, 12, 2, 2, 3)).at[:, :, 0, 0].set(1.0)
    images = images.at[:, :, 1, 1, 0].set(jnp.arange(72.0).reshape(6, 12))
    (query, query_labels), (support, support_labels) = jax.jit(few_shot.draw_task, static_argnums=2)(
        jax.random.key(0), images, 3
    )
    np.testing.assert_array_equal(np.bincount(support_labels), [3] * 5)
    np.testing.assert_array_equal(np.bincount(query_labels), [5] * 5)
    both = np.concatenate([support, query])
    assert len({*both[:, 1, 1, 0].tolist()}) == 40
    np.testing.assert_array_equal(both[:, 0, 0], 1)


def test_every_estimator_has_a_name_of_its_own_and_settings_for_the_files():
    inner = estimators.Inner(hyper_cleaning.inner_loss(MODELS["linear"]), bx.curvature.hessian, 0.1, 20)
    names = [row.name for row in estimators.ESTIMATORS]
    assert len({*names}) == len(names)
    assert {"identity", "cg", "kfac", "ekfac", "pcg-kfac", "reverse"} <= {*names}
    for row in estimators.ESTIMATORS:
        assert json.loads(json.dumps(named(row.settings(inner))))
