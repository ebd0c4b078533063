"""Image data sets, split and corrupted for data hyper-cleaning."""

from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import bilevax as bx


class Data(NamedTuple):
    """Images in [0, 1] with labels, in three parts.

    Attributes:
      batch: outer = validation (images [N, 64], labels [N]), inner = training, with the labels as given.
      test: images and labels, all that are left.
      truth: the true labels of the training images.
    """

    batch: bx.Batch
    test: tuple[chex.Array, chex.Array]
    truth: chex.Array

    @property
    def clean(self) -> chex.Array:
        """Which training labels are true, also those that the redraw happened to hit."""
        return self.batch.inner[1] == self.truth


def digits(seed: int, train: int, validation: int, corruption: float) -> Data:
    """scikit-learn's embedded 8 × 8 digits; each training label is redrawn uniformly with probability `corruption`."""
    images, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    images, labels = jnp.asarray(images[order] / 16, jnp.float32), labels[order]
    redrawn = random.random(train) < corruption
    given = np.where(redrawn, random.integers(0, 10, train), labels[:train])
    end = train + validation
    return Data(
        batch=bx.Batch(
            outer=(images[train:end], jnp.asarray(labels[train:end], jnp.int32)),
            inner=(images[:train], jnp.asarray(given, jnp.int32)),
        ),
        test=(images[end:], jnp.asarray(labels[end:], jnp.int32)),
        truth=jnp.asarray(labels[:train], jnp.int32),
    )
