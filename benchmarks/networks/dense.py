"""Softmax regression and a perceptron as plain functions of their weights; `convolutional` has the larger networks."""

import functools

import jax
import jax.numpy as jnp

import bilevax as bx
from benchmarks.networks.model import Model
from bilevax.typing import Array, Key, PyTree

HIDDEN = 32


def affine(y: PyTree, images: Array) -> Array:
    """Softmax regression."""
    return images @ y["weights"] + y["bias"][None]


def zeros(key: Key, pixels: int) -> PyTree:
    """The first y of softmax regression."""
    return {"weights": jnp.zeros((pixels, 10)), "bias": jnp.zeros(10)}


def perceptron(y: PyTree, images: Array) -> Array:
    """One hidden layer with tanh."""
    return affine(y["last"], jnp.tanh(affine(y["first"], images)))


def layer(key: Key, inputs: int, outputs: int) -> PyTree:
    """Normal weights of variance 1 / inputs."""
    return {"weights": jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs), "bias": jnp.zeros(outputs)}


def random_layers(hidden: int, key: Key, pixels: int) -> PyTree:
    """The first y of the perceptron."""
    first, last = jax.random.split(key)
    return {"first": layer(first, pixels, hidden), "last": layer(last, hidden, 10)}


def ladder(width: int, depth: int) -> Model:
    """As many hidden layers of one width with ReLU."""

    def init(key: Key, pixels: int) -> PyTree:
        sizes = [pixels, *[width] * depth, 10]
        keys = jax.random.split(key, depth + 1)
        return [layer(*one) for one in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def logits(y: PyTree, images: Array) -> Array:
        *hidden, last = y
        for weights in hidden:
            images = jax.nn.relu(affine(weights, images))
        return affine(last, images)

    return Model(init, logits, bx.curvature.gauss_newton)


MODELS = {
    "linear": Model(zeros, affine, bx.curvature.hessian),
    "mlp": Model(functools.partial(random_layers, HIDDEN), perceptron, bx.curvature.gauss_newton),
}
