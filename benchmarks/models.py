"""Classifiers of images as plain functions of their weights; `benchmarks.vision` has the convolutional ones."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevax as bx

HIDDEN = 32


class Model(NamedTuple):
    """A classifier of images.

    Attributes:
      init: `init(key, pixels) -> y`.
      logits: `logits(y, images) -> [N, 10]`, images [N, pixels].
      curvature: what the implicit methods take for the Hessian of the training loss.
    """

    init: Callable[[chex.PRNGKey, int], chex.ArrayTree]
    logits: Callable[[chex.ArrayTree, chex.Array], chex.Array]
    curvature: Callable[..., Any]


def affine(y: chex.ArrayTree, images: chex.Array) -> chex.Array:
    """Softmax regression."""
    return images @ y["weights"] + y["bias"][None]


def zeros(key: chex.PRNGKey, pixels: int) -> chex.ArrayTree:
    """The first y of softmax regression."""
    return {"weights": jnp.zeros((pixels, 10)), "bias": jnp.zeros(10)}


def perceptron(y: chex.ArrayTree, images: chex.Array) -> chex.Array:
    """One hidden layer with tanh."""
    return affine(y["last"], jnp.tanh(affine(y["first"], images)))


def layer(key: chex.PRNGKey, inputs: int, outputs: int) -> chex.ArrayTree:
    """Normal weights of variance 1 / inputs."""
    return {"weights": jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs), "bias": jnp.zeros(outputs)}


def random_layers(hidden: int, key: chex.PRNGKey, pixels: int) -> chex.ArrayTree:
    """The first y of the perceptron."""
    first, last = jax.random.split(key)
    return {"first": layer(first, pixels, hidden), "last": layer(last, hidden, 10)}


MODELS = {
    "linear": Model(zeros, affine, bx.curvature.hessian),
    "mlp": Model(functools.partial(random_layers, HIDDEN), perceptron, bx.curvature.gauss_newton),
}


def classifier(name: str) -> Model:
    """A model by its name; the convolutional ones need flax."""
    if name in MODELS:
        return MODELS[name]
    from benchmarks import vision

    return vision.MODELS[name]


def mean_cross_entropy(model: Model, y: chex.ArrayTree, batch: tuple) -> chex.Array:
    """Of the model on (images, labels)."""
    images, labels = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model.logits(y, images), labels))


@functools.partial(jax.jit, static_argnums=0)
def hits(model: Model, y: chex.ArrayTree, images: chex.Array, labels: chex.Array) -> chex.Array:
    """Whether each image is classified right, as 1 and 0; NaN for all if a logit is not finite."""
    outputs = model.logits(y, images)
    return jnp.where(jnp.isfinite(outputs).all(), (jnp.argmax(outputs, axis=1) == labels) * 1.0, jnp.nan)


def accuracy(model: Model, y: chex.ArrayTree, images: chex.Array, labels: chex.Array) -> float:
    """Share of the images that are classified right; NaN if a logit is not finite."""
    return hits(model, y, images, labels).mean().item()
