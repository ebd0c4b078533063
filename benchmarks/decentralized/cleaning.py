"""The data and the problem of hyper-cleaning, divided over agents."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks.data.images import Data
from benchmarks.harness.errors import DataError
from bilevax.typing import Array


class Divided(NamedTuple):
    """Data of all agents.

    Attributes:
      whole: before it was divided.
      batch: leaves [n, L, ...]: outer = validation (images, labels, weights), inner = training (images, labels, ids,
        weights), where ids are the positions of an agent's images in x, and weights are n · L / N, and 0 where rows
        only fill up: means over the L rows, so weighted, have the loss on the undivided data as their mean over agents.
    """

    whole: Data
    batch: bx.Batch


def divide(whole: Data, partition: Callable[..., list]) -> Divided:
    """Gives the agents their training images, by true labels, and their validation images."""
    (images, given), ids = whole.batch.inner, np.arange(len(whole.truth))
    try:
        train, validation = partition(np.asarray(whole.truth), np.asarray(whole.batch.outer[1]))
    except ValueError as error:
        raise DataError(f"The partition does not suit the data of seed {whole.seed}: {error}") from error
    (*inner, ids), weights = bx.partition.stack((images, given, ids), train)
    outer, outer_weights = bx.partition.stack(whole.batch.outer, validation)
    batch = bx.Batch(outer=(*outer, outer_weights), inner=(*inner, ids, weights))
    return Divided(whole, jax.tree.map(np.asarray, batch))


def cross_entropy(y: Array, images: Array, labels: Array) -> Array:
    """Of softmax regression with the weights y [pixels, 10]; one number for each image."""
    return optax.softmax_cross_entropy_with_integer_labels(images @ y, labels)


def decay(l2: float, x: Array, y: Array) -> Array:
    """The part of g_i that reads no data."""
    return l2 / 2 * jnp.sum(y**2)


def fit() -> bx.curvature.ModelLoss:
    """The part of g_i that reads data."""
    return bx.curvature.ModelLoss(
        lambda y, images: images @ y,
        bx.curvature.softmax_cross_entropy,
        split=lambda x, batch: batch[:2],
        weights=lambda x, batch: jax.nn.sigmoid(x[batch[2]]) * batch[3],
    )


def outer_fit() -> bx.curvature.ModelLoss:
    """f_i by its parts."""
    return dataclasses.replace(fit(), weights=lambda x, batch: batch[2])


def cleaning(l2: float) -> bx.BilevelProblem:
    """f_i and g_i of one agent; x [N], for the training images of all agents; y [pixels, 10]."""

    def outer_loss(x: Array, y: Array, batch: tuple) -> Array:
        images, labels, weights = batch
        return jnp.mean(weights * cross_entropy(y, images, labels))

    def inner_loss(x: Array, y: Array, batch: tuple) -> Array:
        images, labels, ids, weights = batch
        losses = jax.nn.sigmoid(x[ids]) * cross_entropy(y, images, labels)
        return jnp.mean(weights * losses) + decay(l2, x, y)

    return bx.BilevelProblem(outer_loss, inner_loss)
