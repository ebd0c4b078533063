"""The data and the problems of learnt penalties, divided over agents."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_matrix

import bilevax as bx
from benchmarks.data import download
from benchmarks.data.images import IMAGES
from benchmarks.harness.errors import DataError
from bilevax.typing import Array

CLASSES = 10
NOISE = 1.0  # standard deviation of what is added to aᵀy before its sign is the label
FEATURES = {"a9a": 123, "ijcnn1": 22, "w8a": 300}
MOST_TESTED = 10_000
LARGEST = 1.0  # what a penalty adds to the curvature at most


class Examples(NamedTuple):
    """Features [N, d] and labels [N], -1 and 1 or classes."""

    features: np.ndarray
    labels: np.ndarray


class Divided(NamedTuple):
    """Data of all agents.

    Attributes:
      train, validation: before they were divided; of test rows there is one set for all.
      test: those.
      batch: leaves [n, L, ...], outer = validation and inner = training, each (features, labels, weights): means over
        the L rows, so weighted, have the loss on the undivided data as their mean over agents.
    """

    train: Examples
    validation: Examples
    test: Examples
    batch: bx.Batch


def real(name: str, seed: int, train: int, partition: Callable[..., list], times: int = 1) -> Divided:
    """So many training rows and half as many validation rows of a data set, drawn by a seed; others to test on.

    The sides of images are shortened so many times.
    """
    features, labels = IMAGES[name].read(times)[0] if name in IMAGES else download.libsvm(name, FEATURES[name])
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = np.split(order, [train, train + train // 2])
    if not len(parts[2]):
        raise DataError(f"{name} has {len(labels)} rows; --rows {train} leaves none to test on. Pass fewer.")

    def part(chosen: np.ndarray) -> Examples:
        rows = features[chosen]
        dense = rows.toarray() if isinstance(rows, csr_matrix) else rows
        kind = np.int32 if name in IMAGES else np.float32
        return Examples(dense.astype(np.float32), labels[chosen].astype(kind))

    inner, outer, test = part(parts[0]), part(parts[1]), part(parts[2][:MOST_TESTED])
    try:
        mine, others = partition(*(np.maximum(rows.labels, 0).astype(int) for rows in (inner, outer)))
    except ValueError as error:
        raise DataError(f"The partition does not suit the data of seed {seed}: {error}") from error
    (stacked, weights), (validating, outer_weights) = bx.partition.stack(inner, mine), bx.partition.stack(outer, others)
    batch = bx.Batch(outer=(*validating, outer_weights), inner=(*stacked, weights))
    return Divided(inner, outer, test, jax.tree.map(np.asarray, batch))


def synthetic(n: int, seed: int, features: int, train: int, heterogeneity: float) -> Divided:
    """Agent i = 1, ..., n has features of variance (i · r)², r the heterogeneity; labels sign(aᵀy + noise), one y.

    Half as many rows to validate on, and as many to test on. Only the first half of the entries of y are not zero.
    """
    random = np.random.default_rng(seed)
    y = random.normal(size=features) * (np.arange(features) < features // 2)
    scales = heterogeneity * np.arange(1, n + 1)

    def part(rows: int) -> Examples:
        drawn = random.normal(size=(n, rows, features)) * scales[:, None, None]
        labels = np.sign(drawn @ y + NOISE * random.normal(size=(n, rows)))
        return Examples(drawn.astype(np.float32), labels.astype(np.float32))

    def pooled(rows: Examples) -> Examples:
        return Examples(rows.features.reshape(-1, features), rows.labels.reshape(-1))

    inner, outer, test = (part(rows) for rows in (train // n, train // 2 // n, train // n))
    batch = bx.Batch(*((*rows, np.ones_like(rows.labels)) for rows in (outer, inner)))
    return Divided(pooled(inner), pooled(outer), pooled(test), batch)


def penalty(x: Array, parts: int = 2) -> Array:
    """What x adds to the curvature of y: 2 exp(x) / parts while that is far below LARGEST, which it approaches then.

    The penalty of a feature without use would grow for ever, and with it the curvature, until no step size holds.
    """
    return LARGEST * jax.nn.sigmoid(x - math.log(LARGEST * parts / 2))


def decay(x: Array, y: Array) -> Array:
    """The penalty of y, [d] or [d, classes], which reads no data."""
    rates = penalty(x, y.size)[:, None] if y.ndim > 1 else penalty(x)
    return jnp.sum(rates * y**2) / 2


def logistic_fit() -> bx.curvature.ModelLoss:
    """The part of g_i of `logistic` that reads data."""
    return bx.curvature.ModelLoss(
        lambda y, features: (features @ y)[:, None],
        bx.curvature.sigmoid_cross_entropy,
        split=lambda x, batch: (batch[0], (1 + batch[1][:, None]) / 2),
        weights=lambda x, batch: batch[2],
    )


def softmax_fit() -> bx.curvature.ModelLoss:
    """The part of g_i of `softmax` that reads data."""
    return bx.curvature.ModelLoss(
        lambda y, features: features @ y,
        bx.curvature.softmax_cross_entropy,
        split=lambda x, batch: batch[:2],
        weights=lambda x, batch: batch[2],
    )


def logistic() -> bx.BilevelProblem:
    """f_i and g_i of one agent; x [d], y [d], labels -1 and 1."""

    def outer_loss(x: Array, y: Array, batch: tuple) -> Array:
        features, labels, weights = batch
        return jnp.mean(weights * jax.nn.softplus(-labels * (features @ y)))

    def inner_loss(x: Array, y: Array, batch: tuple) -> Array:
        return outer_loss(x, y, batch) + decay(x, y)

    return bx.BilevelProblem(outer_loss, inner_loss)


def softmax() -> bx.BilevelProblem:
    """The same for classes; x [p], y [p, classes], and a penalty divided by their number."""

    def outer_loss(x: Array, y: Array, batch: tuple) -> Array:
        features, labels, weights = batch
        logits = jax.nn.log_softmax(features @ y)
        return -jnp.mean(weights * jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0])

    def inner_loss(x: Array, y: Array, batch: tuple) -> Array:
        return outer_loss(x, y, batch) + decay(x, y)

    return bx.BilevelProblem(outer_loss, inner_loss)
