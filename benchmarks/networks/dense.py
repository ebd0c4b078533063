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


MODELS = {
    "linear": Model(zeros, affine, bx.curvature.hessian),
    "mlp": Model(functools.partial(random_layers, HIDDEN), perceptron, bx.curvature.gauss_newton),
}
