"""The benchmarks with texts: an encoder against BERT in numpy, tokens, votes, and whole runs on invented texts."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from safetensors.numpy import save_file
from scipy.special import expit, log_softmax

from benchmarks.data import text
from benchmarks.harness.errors import DataError
from benchmarks.harness.runner import Options
from benchmarks.networks import pretrained
from benchmarks.networks.decoder import Decoder
from benchmarks.networks.encoder import SIZES, Encoder, Size
from benchmarks.tasks import safe_selection, text_reweighting, weighting

TINY = Size(vocabulary=24, positions=8, width=8, heads=2, hidden=12, layers=2)
IDS = np.array([[1, 5, 3, 0, 0], [1, 9, 9, 4, 2]], np.int32)
REAL = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32)


def checkpoint(random, norm=("weight", "bias")):
    """Random tensors with the names and shapes that BERT's checkpoints have."""
    width, hidden = TINY.width, TINY.hidden
    shapes = {
        "embeddings.word_embeddings.weight": (TINY.vocabulary, width),
        "embeddings.position_embeddings.weight": (TINY.positions, width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }
    layers = {"pooler.dense": (width, width)}
    norms = ["embeddings.LayerNorm"]
    for number in range(TINY.layers):
        stem = f"encoder.layer.{number}"
        layers |= {f"{stem}.attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        layers |= {f"{stem}.attention.output.dense": (width, width)}
        layers |= {f"{stem}.intermediate.dense": (hidden, width), f"{stem}.output.dense": (width, hidden)}
        norms += [f"{stem}.attention.output.LayerNorm", f"{stem}.output.LayerNorm"]
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes |= {f"{name}.{ending}": (width,) for name in norms for ending in norm}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def bert(tensors, ids, real):
    """The pooled output of BERT in numpy, from its paper and the tensors as they are stored."""

    def dense(name, h):
        return h @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, h):
        centred = h - h.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return unit * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def heads(h):
        return h.reshape(*h.shape[:2], TINY.heads, -1).transpose(0, 2, 1, 3)

    tables = (tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type"))
    word, position, kind = tables
    h = norm("embeddings.LayerNorm", word[ids] + position[: ids.shape[1]] + kind[0])
    for number in range(TINY.layers):
        stem = f"encoder.layer.{number}"
        q, k, v = (heads(dense(f"{stem}.attention.self.{name}", h)) for name in ("query", "key", "value"))
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
        scores = np.exp(np.where(real[:, None, None] > 0, scores, -np.inf))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(h.shape)
        h = norm(f"{stem}.attention.output.LayerNorm", h + dense(f"{stem}.attention.output.dense", mixed))
        wide = dense(f"{stem}.intermediate.dense", h)
        wide = wide * (1 + np.vectorize(math.erf)(wide / math.sqrt(2))) / 2
        h = norm(f"{stem}.output.LayerNorm", h + dense(f"{stem}.output.dense", wide))
    return np.tanh(dense("pooler.dense", h[:, 0]))


@pytest.fixture(scope="module")
def encoder():
    """The tiny encoder with three classes, and its first parameters."""
    whole = Encoder(TINY, range(TINY.layers), 3)
    return whole, jax.jit(whole.init)(jax.random.key(0), (IDS, REAL))["params"]


def test_a_loaded_encoder_is_bert(encoder, tmp_path):
    whole, y = encoder
    tensors = checkpoint(np.random.default_rng(0))
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    loaded = pretrained.load(tmp_path / "model.safetensors", y)
    logits = jax.jit(whole.apply)({"params": loaded}, (IDS, REAL))
    head = y["classifier"]
    expected = bert(tensors, IDS, REAL) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(loaded["classifier"]["kernel"], head["kernel"])


def test_the_old_names_of_layer_norms_are_known(encoder, tmp_path):
    tensors = checkpoint(np.random.default_rng(0), norm=("gamma", "beta"))
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = pretrained.load(tmp_path / "model.safetensors", encoder[1])
    np.testing.assert_array_equal(
        loaded["block_1"]["output_norm"]["bias"], tensors["encoder.layer.1.output.LayerNorm.beta"]
    )


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_tensors(encoder, tmp_path):
    tensors = checkpoint(np.random.default_rng(0))
    del tensors["pooler.dense.bias"]
    tensors["encoder.layer.0.attention.self.key.weight"] = np.zeros((8, 9), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"2 tensors do not fit") as error:
        pretrained.load(tmp_path / "model.safetensors", encoder[1])
    assert "encoder.layer.0.attention.self.key.weight has shape (8, 9), expected (8, 8)" in str(error.value)
    assert "pooler.dense.bias is missing" in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="must be a safetensors file"):
        pretrained.load(tmp_path / "model.safetensors", encoder[1])
    with pytest.raises(DataError, match="must be a safetensors file"):
        pretrained.load(tmp_path / "absent", encoder[1])


def test_two_parts_are_the_whole_and_padding_is_not_read(encoder):
    whole, y = encoder
    apply = jax.jit(whole.apply)
    logits = apply({"params": y}, (IDS, REAL))
    net = text_reweighting.Network(Encoder(TINY, range(1)), Encoder(TINY, range(1, 2), 3))
    fixed, above = text_reweighting.split(y, net.trained)
    assert {*fixed} == {"embeddings", "block_0"}
    assert {*above} == {"block_1", "pooler", "classifier"}
    parts = jax.jit(lambda fixed, above: net.logits(above, net.below(fixed, (IDS, REAL))))
    np.testing.assert_allclose(parts(fixed, above), logits, atol=1e-6)
    other = np.where(REAL > 0, IDS, 7)
    np.testing.assert_allclose(apply({"params": y}, (other, REAL)), logits, atol=1e-6)


def test_the_large_encoder_has_as_many_parameters_as_bert():
    whole = Encoder(SIZES["bert-base"], range(12), 2)
    shapes = jax.eval_shape(whole.init, jax.random.key(0), (IDS, REAL))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 109_482_240 + 768 * 2 + 2


def test_scanned_blocks_are_the_blocks(encoder):
    whole, y = encoder
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), y["block_0"], y["block_1"])
    parts = {name: leaf for name, leaf in y.items() if not name.startswith("block")} | {"blocks": {"block": stacked}}
    scanned = Encoder(TINY._replace(scanned=True), range(TINY.layers), 3)
    outputs = jax.jit(scanned.apply)({"params": parts}, (IDS, REAL))
    np.testing.assert_allclose(outputs, jax.jit(whole.apply)({"params": y}, (IDS, REAL)), atol=1e-6)


def test_a_decoder_reads_no_word_to_come():
    model = Decoder(TINY)
    inputs = (IDS[1:], REAL[1:])
    y = jax.jit(model.init)(jax.random.key(0), inputs)
    apply = jax.jit(model.apply)
    logits = np.asarray(apply(y, inputs))
    changed = np.asarray(apply(y, (IDS[1:] + np.array([[0, 0, 0, 1, 1]], np.int32), REAL[1:])))
    np.testing.assert_array_equal(changed[:, :3], logits[:, :3])
    assert np.abs(changed[:, 3:] - logits[:, 3:]).min() > 0


def test_votes_are_counted():
    votes = np.array([[1, 1, 0], [-1, -1, -1], [2, -1, 2], [0, 1, -1]])
    winners = [text.majority(votes, 3, np.random.default_rng(seed)) for seed in range(40)]
    assert {tuple(row[:3]) for row in winners} == {(1, -1, 2)}
    assert {row[3] for row in winners} == {0, 1}  # a tie
    given = np.array([1, 0, 2, 1])
    expected = [[1, 1, -1], [0, 0, 0], [1, 0, 1], [-1, 1, 0]]
    np.testing.assert_array_equal(text.agreement(votes, given), expected)


def test_examples_are_read_with_their_entities():
    data = {"text": "fog delays it", "entity1": "fog", "entity2": "it"}
    content = json.dumps({"7": {"label": 1, "weak_labels": [-1, 1], "data": data}}).encode()
    read = text.read(content, "wrench/x")
    assert read.texts == ["fog it fog delays it"]
    assert (read.labels.tolist(), read.votes.tolist()) == ([1], [[-1, 1]])
    assert read.where(np.array([False])).texts == []
    for wrong in (b"{", b"[]", b'{"0": {"label": 1}}'):
        with pytest.raises(DataError, match=r"wrench/x(, example '0',)? must .* Delete it"):
            text.read(wrong, "wrench/x")


def test_words_become_ids(tmp_path):
    encode = text.hashed(100)
    assert text.words("Who's there?") == ["who", "'", "s", "there", "?"]
    assert encode("who THERE who") == [text.START, *encode("who")[1:], *encode("there")[1:], *encode("who")[1:]]
    assert min(encode("a b c d e f")[1:]) >= 2
    known = text.frequent(["b a b", "b c a"], 5)
    assert known("a b c") == [text.START, 4, 3, text.UNKNOWN]
    ids, real = text.tokens(["a b c", ""], known, 3)
    assert ids.tolist() == [[text.START, 4, 3], [text.START, 0, 0]]
    assert real.tolist() == [[1, 1, 1], [1, 0, 0]]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "now"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    assert text.wordpiece(tmp_path / "vocab.txt", 8, 8)("Playing now") == [2, 5, 6, 7, 3]
    assert text.wordpiece(tmp_path / "vocab.txt", 3, 8)("Playing now") == [2, 5, 3]
    with pytest.raises(DataError, match="must have at most 7 tokens"):
        text.wordpiece(tmp_path / "vocab.txt", 8, 7)
    with pytest.raises(DataError, match=r"must be the vocab\.txt or tokenizer\.json"):
        text.wordpiece(tmp_path / "absent.json", 8, 8)


def invented(name, part):
    """Texts with two classes, told apart by a word, and three labelling functions that err and abstain."""
    random = np.random.default_rng(len(part))
    labels = random.integers(0, 2, 40).astype(np.int32)
    marks = np.array([["song", "nice"], ["subscribe", "channel"]])
    texts = [" ".join(["the", *marks[label], "a" * random.integers(1, 4)]) for label in labels]
    votes = np.where(random.random((40, 3)) < 0.3, 1 - labels[:, None], labels[:, None])
    return text.Texts(texts, labels, np.where(random.random((40, 3)) < 0.3, -1, votes).astype(np.int32))


@pytest.fixture
def small(monkeypatch):
    """Invented texts, tiny models, single precision."""
    monkeypatch.setattr(text, "wrench", invented)
    sizes = {"inner": 4, "curvature": 4, "cross": 8, "outer": 8}
    sizes_of = {text_reweighting: ("encoder-small", TINY), safe_selection: ("decoder-small", TINY._replace(layers=1))}
    for module, (name, size) in sizes_of.items():
        setting = module.SETTINGS[name]._replace(inner_steps=2, length=6, sizes=sizes)
        monkeypatch.setitem(module.SETTINGS, name, setting)
        monkeypatch.setitem(module.SIZES, name, size)
    monkeypatch.setattr(text_reweighting, "ANCHORS", text_reweighting.ANCHORS[:1])
    monkeypatch.setattr(safe_selection, "ANCHORS", ())
    with jax.enable_x64(False):
        yield


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*/*.json")}


@pytest.mark.compiles(70)  # a whole run of a command
def test_text_reweighting_runs_with_a_network_of_weights(small, tmp_path, capsys):
    options = Options(("identity",), outer_steps=1, results=tmp_path)
    config = text_reweighting.Config(data="youtube", blocks=1, network=True, common=options)
    assert config.run() == 0
    found = records(tmp_path)
    assert {*found} == {"uniform-seed0", "identity-seed0"}
    assert 0 <= found["identity-seed0"]["metrics"]["auc"] <= 1
    assert found["uniform-seed0"]["metrics"]["auc"] is None
    assert found["identity-seed0"]["metrics"]["inner_gradients"] == 3
    assert found["identity-seed0"]["configuration"]["weights"] == "random"
    assert (tmp_path / "text_reweighting-youtube-encoder-small-1-blocks-network").is_dir()
    assert "Text reweighting of youtube, encoder-small from random weights" in capsys.readouterr().out


@pytest.mark.compiles(70)  # a whole run of a command
def test_one_layer_is_trained_as_published(small, tmp_path, monkeypatch):
    monkeypatch.setattr(text_reweighting, "ANCHORS", ())
    options = Options(("identity",), outer_steps=1, quick=True, results=tmp_path)
    config = text_reweighting.Config(data="youtube", layer=0, as_published=True, common=options)
    assert config.run() == 0
    found = records(tmp_path)["identity-seed0"]
    assert found["configuration"]["outer_optimizer"] == {"projected_sgd": {"learning_rate": 1000.0, "momentum": 0.9}}
    assert (found["configuration"]["l2"], found["configuration"]["learning_rate"]) == (0, 1e-5)
    assert found["metrics"]["breakdowns"] == 0
    assert (tmp_path / "text_reweighting-youtube-encoder-small-layer-0-as-published-quick").is_dir()


@pytest.mark.compiles(40)  # the setup of a model
def test_what_is_not_trained_is_carried(small):
    whole = {"embeddings", "block_0", "block_1", "pooler", "classifier"}
    cases = [
        ({}, whole, None),
        ({"as_published": True}, {"block_0", "block_1", "classifier"}, {"embeddings", "pooler"}),
        ({"layer": 0}, {"block_0", "classifier"}, {"embeddings", "block_1", "pooler"}),
        ({"layer": 1}, {"block_1", "classifier"}, {"pooler"}),
        ({"blocks": 0}, {"classifier"}, {"pooler"}),
    ]
    first = functools.cache(lambda: text_reweighting.Config().first((IDS, REAL), 0)[1])
    logits = []
    for options, params, carried in cases:
        config = text_reweighting.Config(**options)
        _, above = text_reweighting.split(first(), config.parts.trained)
        y = config.carried(above)
        if carried is None:
            assert {*y} == params
        else:
            assert ({*y.params}, {*y.carried}) == (params, carried)
            if config.parts.fixed is None:
                outputs, kept = jax.jit(config.parts.model)(y, (IDS, REAL))
                assert {*kept} == carried
                logits.append(outputs)
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.compiles(70)  # a whole run of a command
def test_safe_selection_runs(small, tmp_path, monkeypatch):
    monkeypatch.setitem(
        safe_selection.SETTINGS,
        "decoder-small",
        safe_selection.SETTINGS["decoder-small"]._replace(first_steps=2),
    )
    config = safe_selection.Config(common=Options(("kfac",), outer_steps=1, results=tmp_path))
    assert config.run() == 0
    metrics = records(tmp_path)["kfac-seed0"]["metrics"]
    assert min(metrics["unwanted"], metrics["wanted"]) > 0
    assert metrics["margin"] == metrics["unwanted"] - metrics["wanted"]
    assert metrics["state_bytes"] > 0
    assert 0 <= metrics["auc"] <= 1


@pytest.mark.compiles(60)  # with the setup of a model
def test_a_word_counts_and_padding_does_not(small, monkeypatch):
    monkeypatch.setattr(safe_selection, "train", lambda model, y, *_: y)
    config = safe_selection.Config()
    data, problem = config.load(0), config.pose(weighting.EACH)
    examples = jax.tree.map(lambda leaf: leaf[:2], data.batch.inner)
    x, y, inputs = jnp.arange(40.0), data.y, examples.inputs
    logits = jax.jit(config.decoder.apply)({"params": y}, inputs)
    losses = -log_softmax(logits, axis=-1)[np.arange(2)[:, None], np.arange(6)[None], examples.targets]
    summed = np.sum(np.where(examples.targets == text.PADDING, 0, losses), axis=1)
    norms = sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(y))
    expected = np.mean(expit([0.0, 1.0]) * summed) + weighting.L2 / 2 * norms
    np.testing.assert_allclose(jax.jit(problem.inner_loss)(x, y, examples), expected, rtol=1e-5)
    np.testing.assert_array_equal(problem.positions(examples), examples.targets != text.PADDING)
    words = np.sum(examples.targets != text.PADDING)
    value = jax.jit(problem.outer_loss)(x, y, (inputs, examples.targets))
    np.testing.assert_allclose(value, np.sum(summed) / words, rtol=1e-5)
    assert weighting.auc(weighting.EACH, data, jnp.asarray(data.good, jnp.float32)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 3}, "blocks must be an int from 0 to 2 with encoder-small; got 3. Pass --blocks 1."),
        ({"layer": 2}, "layer must be an int from 0 to 1 with encoder-small, without blocks; got 2 with blocks=None"),
        ({"layer": 1, "blocks": 1}, "got 1 with blocks=1. Pass --layer 1 alone."),
        ({"model": "encoder-scanned", "blocks": 2}, "blocks must be all 10 with encoder-scanned. Drop --blocks"),
        ({"network": True, "as_published": True}, "network learns scores, and as_published the weights; got both."),
        ({"weights": "model.safetensors"}, "belong together; got no tokenizer. Pass --tokenizer as well."),
    ],
)
def test_bad_values_are_refused_with_the_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        text_reweighting.Config(**arguments)
