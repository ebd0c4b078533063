"""Small classifiers of every kind that people train, as they are written: what a curvature must make blocks of.

Each is a function `(key) -> (model, y)`: a model (y, inputs) -> logits [N, CLASSES], and its first y. Those of images
read [N, 8, 8, 2], those of texts tokens [N, 6] out of VOCABULARY, the others features [N, 8].
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from bilevax.typing import Array, Key, PyTree

CLASSES, VOCABULARY, WIDTH, LENGTH = 3, 12, 8, 6
Made: TypeAlias = tuple[Callable[[PyTree, Array], Array], PyTree]


class Small(NamedTuple):
    """One model.

    Attributes:
      make: `make(key) -> (model, y)`.
      inputs: "features", "images" or "texts".
    """

    make: Callable[[Key], Made]
    inputs: str


def linen(module: nn.Module, example: Array) -> Callable[[Key], Made]:
    """A module of flax; statistics of a batch are read and forgotten."""

    def model(y: PyTree, inputs: Array) -> Array:
        return module.apply({"params": y}, inputs, mutable=["batch_stats"])[0]

    return lambda key: (model, module.init(key, example)["params"])


class MLP(nn.Module):
    """Two hidden layers; with `normed` weights where asked."""

    normed: bool = False

    @nn.compact
    def __call__(self, a: Array) -> Array:
        """Logits of features."""
        for _ in range(2):
            layer = nn.Dense(10)
            a = nn.tanh((nn.WeightNorm(layer) if self.normed else layer)(a))
        return nn.Dense(CLASSES)(a)


class Convolutional(nn.Module):
    """Two convolutions; the second one by depth, or each with BatchNorm, where asked."""

    by_depth: bool = False
    batch_norm: bool = False

    @nn.compact
    def __call__(self, a: Array) -> Array:
        """Logits of images."""
        for groups in (1, 6 if self.by_depth else 1):
            a = nn.Conv(6, (3, 3), strides=2, feature_group_count=groups, use_bias=not self.batch_norm)(a)
            a = nn.tanh(nn.BatchNorm(use_running_average=False)(a) if self.batch_norm else a)
        return nn.Dense(CLASSES)(a.mean((1, 2)))


class Recurrent(nn.Module):
    """An LSTM whose kernels are joined before use."""

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Logits of texts."""
        h = nn.Embed(VOCABULARY, WIDTH)(tokens)
        return nn.Dense(CLASSES)(jnp.asarray(nn.RNN(nn.OptimizedLSTMCell(WIDTH))(h))[:, -1])


class Transformer(nn.Module):
    """One block; the layer before the last reads words off the table that wrote them."""

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Logits of texts."""
        table = nn.Embed(VOCABULARY, WIDTH)
        h = table(tokens)
        h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
        h = h + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(h))))
        return nn.Dense(CLASSES)(nn.tanh(table.attend(h)).mean(1))


def _normal(key: Key, **shapes: tuple[int, ...]) -> PyTree:
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) / shape[-2] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def all_experts(key: Key) -> Made:
    """Four experts, all of which each example asks; a softmax weighs what they say."""
    y = _normal(key, gate=(WIDTH, 4), up=(4, WIDTH, 6), down=(4, 6, WIDTH), head=(WIDTH, CLASSES))

    def model(y: PyTree, a: Array) -> Array:
        said = jnp.einsum("nef,efd->ned", jnp.tanh(jnp.einsum("nd,edf->nef", a, y["up"])), y["down"])
        return (a + jnp.einsum("ne,ned->nd", jax.nn.softmax(a @ y["gate"]), said)) @ y["head"]

    return model, y


def switch(key: Key) -> Made:
    """Four experts, of which each example asks the one with the largest probability, and weighs it by that."""
    y = _normal(key, gate=(WIDTH, 4), up=(4, WIDTH, 6), down=(4, 6, WIDTH), head=(WIDTH, CLASSES))

    def model(y: PyTree, a: Array) -> Array:
        probabilities = jax.nn.softmax(a @ y["gate"])
        chosen = jax.nn.one_hot(probabilities.argmax(1), 4, dtype=a.dtype)
        own = jnp.einsum("ne,nd->end", chosen, a)  # the examples of each expert, and zeros
        said = jnp.einsum("enf,efd->end", jnp.tanh(jnp.einsum("end,edf->enf", own, y["up"])), y["down"])
        return (a + jnp.einsum("ne,end->nd", chosen * probabilities, said)) @ y["head"]

    return model, y


def low_rank_update(key: Key) -> Made:
    """A frozen layer with an update of rank 2, merged into it before use."""
    frozen_key, key = jax.random.split(key)
    frozen = _normal(frozen_key, w=(WIDTH, 10))["w"]
    y = _normal(key, a=(WIDTH, 2), b=(2, 10), head=(10, CLASSES))
    return lambda y, a: jnp.tanh(a @ (frozen + y["a"] @ y["b"])) @ y["head"], y


SHAPES = {"features": (WIDTH,), "images": (8, 8, 2), "texts": (LENGTH,)}  # of one example
FEATURES, IMAGES = jnp.zeros((1, WIDTH)), jnp.zeros((1, 8, 8, 2))
TOKENS = jnp.zeros((1, LENGTH), int)
MODELS: dict[str, Small] = {
    "MLP": Small(linen(MLP(), FEATURES), "features"),
    "MLP, weight norm": Small(linen(MLP(normed=True), FEATURES), "features"),
    "MLP, merged LoRA": Small(low_rank_update, "features"),
    "CNN": Small(linen(Convolutional(), IMAGES), "images"),
    "CNN by depth": Small(linen(Convolutional(by_depth=True), IMAGES), "images"),
    "CNN, BatchNorm": Small(linen(Convolutional(batch_norm=True), IMAGES), "images"),
    "LSTM": Small(linen(Recurrent(), TOKENS), "texts"),
    "transformer, tied table": Small(linen(Transformer(), TOKENS), "texts"),
    "all experts": Small(all_experts, "features"),
    "Switch experts": Small(switch, "features"),
}
