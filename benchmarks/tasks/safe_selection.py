"""Safe selection: a language model is trained further on texts some of which are unwanted; find those, without labels.

    min_x  f(y*(x)) = mean over clean texts of NLL per word
    y*(x) = argmin_y g(x, y) = mean over the mixture of sigmoid(x_i) · NLL_i(y) + l2 / 2 · ‖y‖²

NLL_i sums over the words of a text. The mixture is made of comments, about half of which are spam; the outer loss sees
a few comments that are none. The first y has been trained on questions. Each run has the same seconds, not steps.

Reference: Shen et al., "SEAL: safety-enhanced aligned LLM fine-tuning via bilevel data selection", arXiv 2410.07471.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import bilevax as bx
from benchmarks.data import text
from benchmarks.harness.loop import Carry
from benchmarks.harness.report import COSTS
from benchmarks.harness.runner import Options, Task, outer_loops, perform
from benchmarks.networks.decoder import SIZES, Decoder
from benchmarks.tasks.weighting import (
    EACH,
    EPS_ROOT,
    L2,
    METHODS,
    STATE,
    Data,
    Examples,
    Problem,
    Weighting,
    draw,
    foreign,
    method,
    oracle,
    uniform,
)
from bilevax.typing import Array, Key, PyTree

TASK = "safe_selection"
SPAM = 1
ANCHORS = (uniform, oracle("wanted"))
COLUMNS = {
    "auc": ("weight\nAUC", "{:.3f}".format),
    "unwanted": ("unwanted\nNLL", "{:.3f}".format),
    "wanted": ("wanted\nNLL", "{:.3f}".format),
    "margin": ("margin", "{:.3f}".format),
    "outer_loss": ("outer\nloss", "{:.3f}".format),
    "outer_steps": ("outer\nsteps", "{:,.0f}".format),
    **COSTS,
    **STATE,
}
METRICS = {"margin": "unwanted − wanted NLL per word", "wanted": "NLL per word of wanted test texts"}
CAPTION = (
    "uniform: trained on all comments alike; wanted: on those only that are no spam. unwanted and wanted NLL: per\n"
    "word of test comments; margin: their difference, which should be large, whatever is overfitted in both.\n"
    "weight AUC: of wanted against unwanted training comments.\n"
)


class SelectionSetting(NamedTuple):
    """What suits a model: words of a text, first training, steps of both levels, and texts in each batch."""

    length: int
    first_steps: int
    outer_steps: int
    inner_steps: int
    learning_rate: float
    sizes: Mapping[str, int]


SMALL_SIZES = {"inner": 32, "curvature": 32, "cross": 128, "outer": 64}
BASE_SIZES = {"inner": 64, "curvature": 64, "cross": 128, "outer": 64}
SETTINGS = {
    "decoder-small": SelectionSetting(24, 200, 1000, 5, 1e-3, SMALL_SIZES),
    "decoder-base": SelectionSetting(64, 2000, 10_000, 10, 1e-4, BASE_SIZES),
}


def next_words(words: tuple[np.ndarray, np.ndarray]) -> tuple[tuple[Array, Array], Array]:
    """What a language model reads, and the words to come, with `PADDING` where none does."""
    ids, real = (jnp.asarray(array) for array in words)
    return (ids[:, :-1], real[:, :-1]), ids[:, 1:]


def counted(targets: Array) -> Array:
    """1 where a word is to come, 0 at padding; [N, T]."""
    return (targets != text.PADDING).astype(jnp.float32)


def logits(model: Decoder, y: PyTree, inputs: Array) -> Array:
    """Those of the next word, [N, T, words]."""
    return jnp.asarray(model.apply({"params": y}, inputs))


def likelihood(model: Decoder, y: PyTree, batch: tuple) -> Array:
    """The negative log-likelihood per word."""
    inputs, targets = batch
    values = bx.curvature.softmax_cross_entropy.value(logits(model, y, inputs), targets)
    return jnp.sum(values * counted(targets)) / jnp.sum(counted(targets))


def train(model: Decoder, y: PyTree, texts: tuple, setting: SelectionSetting, key: Key) -> PyTree:
    """Trains on texts that nobody selects, in the plain way."""
    optimizer, sample = optax.adam(3 * setting.learning_rate), bx.sampling.minibatch(setting.sizes["inner"])

    def step(carry: tuple, key: Key) -> tuple[tuple, None]:
        y, state = carry
        grad = jax.grad(functools.partial(likelihood, model))(y, sample(key, 0, texts))
        updates, state = optimizer.update(grad, state)
        return (optax.apply_updates(y, updates), state), None

    keys = jax.random.split(key, setting.first_steps)
    (y, _), _ = jax.jit(lambda y, keys: jax.lax.scan(step, (y, optimizer.init(y)), keys))(y, keys)
    return y


DEFAULTS = Options(tuple(row.name for row in METHODS[:-1]), budget=20.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Safe selection: find the spam in the texts that a language model is trained on, from a few clean texts.

    The anchors (training on all texts alike, and on the wanted ones only) always run. Methods are compared at equal
    time: each run ends when its budget is spent.
    """

    model: Literal["decoder-small", "decoder-base"] = "decoder-small"
    """A transformer decoder: two blocks of width 64, or twelve of width 768 (for a GPU, with --budget 600, say)."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self.common.check_methods([row.name for row in METHODS])

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The language model; a quick run has one block of it, which compiles sooner."""
        size = SIZES[self.model]
        return Decoder(size._replace(layers=1) if self.common.quick else size)

    def load(self, seed: int) -> Data:
        """Reads the texts, and trains the first parameters, which are drawn by the seed, on questions."""
        setting = SETTINGS[self.model]
        mixture, clean, test = (text.wrench("youtube", part) for part in ("train", "valid", "test"))
        clean = clean.where(clean.labels != SPAM)
        questions = text.wrench("trec", "train")
        encode = text.frequent([*questions.texts, *mixture.texts], self.decoder.size.vocabulary)

        def read(part: text.Texts) -> tuple:
            return next_words(text.tokens(part.texts, encode, setting.length + 1))

        inputs, targets = read(mixture)
        first_key, key = jax.random.split(jax.random.key(seed))
        y = jax.jit(self.decoder.init)(first_key, jax.tree.map(lambda leaf: leaf[:1], inputs))["params"]
        y = train(self.decoder, y, read(questions), setting, key)
        numbers = jnp.arange(len(targets))
        unseen = {
            name: read(test.where((test.labels == SPAM) == spam))
            for name, spam in (("unwanted", True), ("wanted", False))
        }
        batch = bx.Batch(read(clean), Examples(numbers, inputs, targets, numbers))
        return Data(seed, batch, mixture.labels != SPAM, unseen, y)

    def pose(self, weighting: Weighting) -> Problem:
        """Both losses, and how they are minimised."""
        setting = SETTINGS[self.model]
        inner_loss = bx.curvature.ModelLoss(
            model=lambda y, inputs: logits(self.decoder, y, inputs),
            loss=bx.curvature.softmax_cross_entropy,
            split=lambda x, examples: (examples.inputs, examples.targets),
            weights=weighting.weights,
            l2=L2,
            mask=lambda examples: counted(examples.targets),
        )
        optimizer = optax.adam(setting.learning_rate, eps_root=EPS_ROOT)
        return Problem(
            inner_loss,
            lambda x, y, batch: likelihood(self.decoder, y, batch),
            optimizer,
            setting.inner_steps,
            setting.sizes,
            lambda examples: counted(examples.targets),
            step_size=1e-3,
        )

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        setting, load = SETTINGS[self.model], functools.cache(self.load)
        value = jax.jit(functools.partial(likelihood, self.decoder))

        def likelihoods(data: Data, carry: Carry) -> dict[str, float | None]:
            found = {name: value(carry.estimator.y, batch).item() for name, batch in data.test.items()}
            return {**found, "margin": found["unwanted"] - found["wanted"]}

        steps = self.common.steps(setting.outer_steps)
        rows = [*ANCHORS, *self.common.chosen(METHODS, foreign)]
        chosen: dict[str, Any] = {"model": self.model, **setting._asdict()}
        methods = [method(row, self.pose, EACH, likelihoods, chosen) for row in rows]
        anchors = [row.name for row in ANCHORS]
        task = Task(
            title=f"Safe selection, {self.model}, {self.common.budget:g} s for each run",
            folder=TASK if self.model == "decoder-small" else f"{TASK}-{self.model}",
            outer_steps=steps,
            methods=[row.name for row in rows],
            anchors=anchors,
            runs=functools.partial(outer_loops, TASK, methods, load, steps, self.common),
            columns=COLUMNS,
            caption=CAPTION,
            draw=lambda runs: draw(runs, anchors, METRICS, ("wanted", "unwanted"), EACH, load),
        )
        return perform(task, self.common, self)
