"""Online adaptation: what is salient, disjoint texts, the hypergradient against a written-out loop, and a whole run."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

import flax.linen as nn

from benchmarks.data import adaptation_data as data
from benchmarks.harness.errors import DataError
from benchmarks.harness.runner import Options
from benchmarks.networks.decoder import Decoder
from benchmarks.networks.encoder import Size
from benchmarks.tasks import online_adaptation as task
from benchmarks.tasks.adaptation import AdaptationSetting, Pool, Problem, adapted, read, start, train, weights

TINY = AdaptationSetting(
    Size(data.BYTES, positions=7, width=4, heads=1, hidden=6, layers=1, types=1),
    first_steps=2,
    first_rate=1e-3,
    inner_steps=3,
    others=2,
    outer_steps=4,
    streams=2,
)


class Bigram(nn.Module):
    """Reads one byte only, and compiles sooner than the decoder that it stands for."""

    size: Size

    @nn.compact
    def __call__(self, inputs):
        """Logits."""
        state = nn.Embed(self.size.vocabulary, self.size.width, name="block_0")(inputs[0])
        return nn.Dense(self.size.vocabulary, name="head")(jnp.tanh(state))


TEXTS = [f"the call f_{n}() is no. {n} of os.path and an HTTP word, plain words end it" for n in range(12)]


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("plain words, Capital. end", ""),
        ("call f(x) or a_b now", "f(x)a_b"),
        ('say "hi there" twice', '"hithere"'),
        ("in 3 of os.path, but. not", "3os.path,"),
        ("an HTTPError or NaN", "HTTPErrorNaN"),
    ],
)
def test_salient_words_are_marked(text, marked):
    marks = data.salient(text)
    assert "".join(character for character, mark in zip(text, marks, strict=True) if mark) == marked
    assert marks.dtype == np.float32


def test_texts_are_cut_into_chunks_of_bytes():
    chunks = data.cut(["ab–3 x", "short", "a_b c d e f g"], 6)
    assert [bytes(row).decode() for row in chunks.words.astype(np.uint8)] == ["ab?3 x", "a_b c ", "d e f "]
    np.testing.assert_array_equal(chunks.salient, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [0] * 6])
    kept = data.informative(chunks, 0)
    assert sorted(bytes(row).decode() for row in np.asarray(kept.words, np.uint8)) == ["a_b c ", "ab?3 x"]


@pytest.mark.parametrize("seed", [0, 1])
def test_texts_are_dealt_out_once(seed):
    collection = data.COLLECTIONS["topics"]
    parts = data.corpus(collection, seed)
    assert sorted(text for part in parts for text in part) == sorted(collection.texts())
    assert [len(part) for part in parts[:2]] == [50, 12]
    assert parts.test != data.corpus(collection, seed + 1).test
    needed = task.SMALL.inner_steps + task.SMALL.others
    assert min(len(data.informative(data.cut(part, task.SMALL.length), seed).words) for part in parts) >= needed


def test_news_are_read():
    content = b'[{"text": "one", "label": 1}, {"text": "two"}, {"text": "three"}]'
    assert data.news(content, 2) == ["one\ntwo", "three"]
    for wrong in (b"{", b'["one"]', b'[{"label": 1}]'):
        with pytest.raises(DataError, match=r"agnews-weak/dev_data.json(, example 0,)? must be .* Delete it"):
            data.news(wrong, 2)


@pytest.mark.compiles(90)  # with the training of a model
def test_first_weights_are_equal():
    model = Decoder(TINY.size)
    chunks = data.informative(data.cut(TEXTS, TINY.length), 0)
    y = train(model, chunks.words, 0, 1e-3, jax.random.key(0))
    found, states = read(model, y, chunks.words)
    assert states.shape == (len(chunks.words), TINY.length - 1, TINY.size.width)
    np.testing.assert_allclose(weights(start(TINY.size.width), states), math.log1p(math.exp(-0.8)), rtol=1e-6)
    y, states = jax.device_get((y, states))
    expected = states @ y["head"]["kernel"] + y["head"]["bias"][None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.compiles(60)  # with the training of a model
def test_hypergradients_are_those_of_a_written_out_loop():
    problem = Problem(Bigram(TINY.size), TINY)
    pool = Pool(data.informative(data.cut(TEXTS, TINY.length), 0), 0.2)
    y = train(problem.model, pool.chunks.words, 0, 1e-3, jax.random.key(0))
    y, key, steps = jax.tree.map(lambda leaf: 5 * leaf.astype(float), y), jax.random.key(1), TINY.inner_steps
    x = {"bias": jnp.asarray(0.3), "slope": jnp.linspace(-1.0, 1.0, TINY.size.width)}
    solvers = {
        "reverse": task.reverse(problem, steps),
        "forward": task.forward_gradient(problem, directions=1 + TINY.size.width),
        "guided": task.forward_gradient(problem, directions=2, guide_steps=steps),
        "identity": task.identity(problem),
        "truncated": task.truncated(problem, steps - 1),
    }

    @jax.jit
    def expected(x, y, stream):
        def last(x):
            return adapted(problem.model, y, pool.rate * weights(x, stream.inner.hidden), stream.inner.words)

        def written_out(x):
            return problem.outer_loss(x, last(x), stream.outer)

        y_bar = jax.grad(problem.outer_loss, argnums=1)(x, last(x), stream.outer)
        fixed = jax.lax.stop_gradient((y_bar, last(x)))

        def one_more_step(x):
            gradient = jax.grad(problem.inner_loss, argnums=1)(x, fixed[1], stream.inner)
            return -steps * sum(jax.tree.leaves(jax.tree.map(jnp.vdot, fixed[0], gradient)))

        return jax.grad(written_out)(x), jax.grad(one_more_step)(x)

    @jax.jit
    def estimates(x, y):
        made = {name: problem.hypergradient(solver) for name, solver in solvers.items()}
        return {name: made[name].estimate(key, made[name].init(x, y, pool), x, pool)[:2] for name in made}

    stream = problem.draw(jax.random.split(key)[0], y, pool)
    exact, single = expected(x, y, stream)
    found = estimates(x, y)
    for name, wanted in {"reverse": exact, "forward": exact, "guided": exact, "identity": single}.items():
        for leaf, number in zip(jax.tree.leaves(found[name][0]), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(leaf, number, rtol=1e-5, atol=1e-9, err_msg=name)
        np.testing.assert_array_equal(found[name][1].y["head"]["bias"], y["head"]["bias"])  # the next step starts there
    for name in ("identity", "truncated"):
        assert abs(found[name][0]["bias"] - exact["bias"]) > 1e-3 * abs(exact["bias"]), name
    rows = np.concatenate([stream.inner.words, stream.outer.others])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_the_best_rate_is_that_of_the_lowest_loss():
    assert task.best({0.1: 3.0, 0.2: 2.0, 0.4: math.nan}) == 0.2
    assert task.best({0.1: math.nan, 0.2: math.inf, 0.3: 5.0}) == 0.3


@pytest.mark.compiles(60)  # a whole run of a command
def test_online_adaptation_runs(monkeypatch, tmp_path, capsys):
    collection = data.Collection(lambda: TEXTS, train=6, validation=3, chunks=20)
    monkeypatch.setitem(data.COLLECTIONS, "topics", collection)
    monkeypatch.setitem(task.SETTINGS, "small", TINY)
    monkeypatch.setattr(task, "Decoder", Bigram)
    options = Options(("truncated",), outer_steps=2, results=tmp_path)
    with jax.enable_x64(False):
        assert task.Config(inner_rates=(0.5, 0.25), common=options).run() == 0
    folder = tmp_path / "online_adaptation"
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert {*found} == {f"{name}-seed0" for name in ("uniform", "none", "marked", "truncated")}
    numbers = {name: record["metrics"] for name, record in found.items()}
    assert numbers["none-seed0"]["divergence"] == pytest.approx(0, abs=1e-6)
    assert numbers["uniform-seed0"]["gain"] == 0
    learnt, tried = numbers["truncated-seed0"], found["truncated-seed0"]["configuration"]["tried"]
    assert {*tried} == {"0.5", "0.25"}
    assert learnt["validation"] == tried[f"{learnt['inner_rate']:g}"] == min(tried.values())
    assert found["truncated-seed0"]["configuration"]["at_grid_end"] == ["inner_rate"]
    assert learnt["gain"] == pytest.approx(numbers["uniform-seed0"]["held_out"] - learnt["held_out"])
    assert learnt["held_out"] == pytest.approx(learnt["salient"] + learnt["divergence"] / 2)
    assert found["truncated-seed0"]["seed"] == 0
    assert (folder / "online_adaptation.png").stat().st_size > 0
    assert "Online adaptation to topics, small model, T = 3, 2 outer steps, seed 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner_rates": ()}, "inner_rates must be > 0; got none. Pass, say, --inner-rates 0.03."),
        ({"inner_rates": (0.1, -1.0)}, r"inner_rates must be > 0; got 0.1 -1.0."),
        ({"outer_rate": math.nan}, "outer_rate must be > 0; got nan"),
    ],
)
def test_bad_values_are_refused_with_the_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        task.Config(**arguments)
