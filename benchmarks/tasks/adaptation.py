"""The problem of online adaptation: a language model takes a weighted step on each document, and is then judged.

y_t = y_{t−1} − rate · ∇ mean over bytes of w(x) · NLL(y_{t−1}),  document t = 1..T,  from the base model y_0
f(y_T) = NLL of the salient bytes of the T documents + ½ KL(base model ‖ y_T) on others
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks.data.adaptation_data import Chunks, likelihoods
from benchmarks.harness.plugin import finished
from benchmarks.networks.decoder import Decoder
from benchmarks.networks.encoder import Size
from bilevax.typing import Array, Key, PyTree, Scalar

BATCH = 32  # chunks in a step of the first training
LOCALITY = 0.5  # weight of the divergence
BIAS = -0.8  # the first weights are softplus(-0.8) = 0.37, where adapting is safe


class AdaptationSetting(NamedTuple):
    """What suits a model.

    Attributes:
      size: of the model.
      first_steps: of training the base model.
      first_rate: step size of it.
      inner_steps: T, and the documents of an outer step.
      others: documents of the divergence.
      outer_steps: of each run.
      streams: draws of documents to validate on, and as many to test on.
    """

    size: Size
    first_steps: int
    first_rate: float
    inner_steps: int
    others: int
    outer_steps: int
    streams: int

    @property
    def length(self) -> int:
        """Bytes of a document: the first is read and not predicted."""
        return self.size.positions + 1


class Pool(NamedTuple):
    """What an outer step draws its documents from, and the rate of its inner steps."""

    chunks: Chunks
    rate: Scalar


class Passage(NamedTuple):
    """Documents to adapt to.

    Attributes:
      words: int32 [T, length].
      hidden: what the base model computes there, [T, length − 1, width].
      rate: of the inner steps.
    """

    words: Array
    hidden: Array
    rate: Scalar


class Aim(NamedTuple):
    """What an adapted model is judged by.

    Attributes:
      chunks: the documents that it read, with their marks.
      others: other documents, int32 [number, length].
      base: the base model's log-probabilities there, [number, length − 1, BYTES].
    """

    chunks: Chunks
    others: Array
    base: Array


def logits(model: Decoder, y: PyTree, words: Array) -> Array:
    """Those of each byte but the first, [N, length − 1, BYTES]."""
    return jnp.asarray(model.apply({"params": y}, _inputs(words)))


def read(model: Decoder, y: PyTree, words: Array) -> tuple[Array, Array]:
    """The same, and what the last block returns there, [N, length − 1, width]."""
    last = f"block_{model.size.layers - 1}"
    found, kept = model.apply(
        {"params": y}, _inputs(words), capture_intermediates=lambda module, _: module.name == last
    )
    return found, kept["intermediates"][last]["__call__"][0]


def _inputs(words: Array) -> tuple[Array, Array]:
    return words[:, :-1], jnp.ones_like(words[:, :-1], jnp.float32)


def train(model: Decoder, words: Array | np.ndarray, steps: int, learning_rate: float, key: Key) -> PyTree:
    """Trains a new model on chunks [C, length] in the plain way."""
    optimizer, sample = optax.adamw(learning_rate), bx.sampling.minibatch(BATCH)
    first_key, key = jax.random.split(key)

    def step(carry: tuple, key: Key) -> tuple[tuple, None]:
        y, state = carry
        batch = sample(key, 0, words)
        grad = jax.grad(lambda y: likelihoods(logits(model, y, batch), batch).mean())(y)
        updates, state = optimizer.update(grad, state, y)
        return (optax.apply_updates(y, updates), state), None

    @jax.jit
    def run(words: Array) -> PyTree:
        y = model.init(first_key, _inputs(words[:1]))["params"]
        return jax.lax.scan(step, (y, optimizer.init(y)), jax.random.split(key, steps))[0][0]

    return run(jnp.asarray(words))


def weights(x: dict[str, Array], states: Array) -> Array:
    """The weight of each byte that follows hidden states [..., width]: [...]."""
    return jax.nn.softplus(states @ x["slope"] / math.sqrt(states.shape[-1]) + x["bias"])


def start(width: int) -> dict[str, Array]:
    """Equal weights."""
    return {"bias": jnp.full((), BIAS), "slope": jnp.zeros(width)}


class Problem(NamedTuple):
    """The two losses of a language model, and the draws of documents."""

    model: Decoder
    setting: AdaptationSetting

    @property
    def steps(self) -> int:
        """Number of inner steps, each on a document of its own."""
        return self.setting.inner_steps

    def inner_loss(self, x: PyTree, y: PyTree, passage: Passage) -> Array:
        """The weighted mean of one document, or of several, times the rate: the inner steps have size one."""
        words = passage.words.reshape(-1, self.setting.length)
        values = likelihoods(logits(self.model, y, words), words)
        return jnp.mean(passage.rate * weights(x, passage.hidden).reshape(values.shape) * values)

    def parts(self, y: PyTree, aim: Aim) -> tuple[Array, Array]:
        """The negative log-likelihood of salient bytes, and the divergence."""
        found = logits(self.model, y, jnp.concatenate([aim.chunks.words, aim.others]))
        there, elsewhere = jnp.split(found, [self.steps])
        marks = aim.chunks.salient[:, 1:]
        value = jnp.sum(marks * likelihoods(there, jnp.asarray(aim.chunks.words))) / jnp.sum(marks)
        divergence = optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(elsewhere), aim.base)
        return value, jnp.mean(divergence)

    def outer_loss(self, x: PyTree, y: PyTree, aim: Aim) -> Array:
        """Both together."""
        value, divergence = self.parts(y, aim)
        return value + LOCALITY * divergence

    def draw(self, key: Key, base: PyTree, pool: Pool) -> bx.Batch:
        """Draws documents, all of them distinct."""
        number = self.steps + self.setting.others
        rows = jax.random.choice(key, len(pool.chunks.words), (number,), replace=False)
        words, salient = (leaf[rows] for leaf in pool.chunks)
        found, hidden = read(self.model, base, words)
        here, elsewhere = slice(self.steps), slice(self.steps, None)
        aim = Aim(Chunks(words[here], salient[here]), words[elsewhere], jax.nn.log_softmax(found[elsewhere]))
        return bx.Batch(outer=aim, inner=Passage(words[here], hidden[here], pool.rate))

    def hypergradient(self, solver: Any) -> bx.problem.Hypergradient:
        """Each outer step draws its documents from the pool in its batch, and starts at the base model."""
        whole = finished(self.outer_loss, solver)

        def estimate(key: Key | None, state: Any, x: PyTree, batch: Any) -> tuple:  # whose batch is the pool
            draw_key, key = jax.random.split(bx.sampling.needed(key, "random documents"))
            grad, last, info = whole.estimate(key, state, x, self.draw(draw_key, state.y, batch))
            return grad, last._replace(y=state.y, opt_state=state.opt_state, t=state.t), info

        def init(x: PyTree, y: PyTree, batch: Any = None, *, opt_state: Any = None) -> Any:
            return whole.init(x, y, opt_state=opt_state)

        return bx.problem.Hypergradient(init, estimate)


def adapted(model: Decoder, base: PyTree, step_sizes: Array, words: Array) -> PyTree:
    """The model after a step on each document, words [T, length], with the step sizes of its bytes [T, length − 1]."""

    def step(y: PyTree, document: tuple[Array, Array]) -> tuple[PyTree, None]:
        sizes, words = (part[None] for part in document)
        grad = jax.grad(lambda y: jnp.mean(sizes * likelihoods(logits(model, y, words), words)))(y)
        return jax.tree.map(jnp.subtract, y, grad), None

    return jax.lax.scan(step, base, (step_sizes, words))[0]


def judge(problem: Problem) -> Callable[[PyTree, Array, bx.Batch], tuple[float, ...]]:
    """A function (base, step sizes [streams, T, length − 1], streams) -> outer loss and both its parts, means."""

    @jax.jit
    def values(base: PyTree, step_sizes: Array, streams: bx.Batch) -> tuple[Array, ...]:
        def one(stream: tuple[Array, bx.Batch]) -> tuple[Array, Array]:
            y = adapted(problem.model, base, stream[0], stream[1].inner.words)
            return problem.parts(y, stream[1].outer)

        value, divergence = (part.mean() for part in jax.lax.map(one, (step_sizes, streams)))
        return value + LOCALITY * divergence, value, divergence

    return lambda *arguments: tuple(value.item() for value in values(*arguments))
