"""What a classifier of images is to the tasks, and how it is judged."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax.typing import Array, Key, PyTree


class Model(NamedTuple):
    """A classifier of images.

    Attributes:
      init: `init(key, pixels) -> y`.
      logits: `logits(y, images) -> [N, 10]`, images [N, pixels].
      curvature: what the implicit methods take for the Hessian of the training loss.
    """

    init: Callable[[Key, int], PyTree]
    logits: Callable[[PyTree, Array], Array]
    curvature: Callable[..., Any]


def mean_cross_entropy(model: Model, y: PyTree, batch: tuple) -> Array:
    """Of the model on (images, labels)."""
    images, labels = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model.logits(y, images), labels))


@functools.partial(jax.jit, static_argnums=0)
def hits(model: Model, y: PyTree, images: Array, labels: Array) -> Array:
    """Whether each image is classified right, as 1 and 0; NaN for all if a logit is not finite."""
    outputs = model.logits(y, images)
    return jnp.where(jnp.isfinite(outputs).all(), (jnp.argmax(outputs, axis=1) == labels) * 1.0, jnp.nan)


def accuracy(model: Model, y: PyTree, images: Array, labels: Array) -> float:
    """Share of the images that are classified right; NaN if a logit is not finite."""
    return hits(model, y, images, labels).mean().item()
