"""What a classifier of images is to the tasks, and how it is judged."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


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
