"""Image data sets for data hyper-cleaning: split by a seed, and a share of the training labels redrawn."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import bilevax as bx
from benchmarks.data import download, photos

Images = tuple[np.ndarray, np.ndarray]


class Data(NamedTuple):
    """Images in [0, 1] with labels, in three parts.

    Attributes:
      seed: of the split and of the redrawn labels.
      batch: outer = validation (images [N, pixels], labels [N]), inner = training, with the labels as given.
      test: images and labels.
      truth: the true labels of the training images.
    """

    seed: int
    batch: bx.Batch
    test: tuple[chex.Array, chex.Array]
    truth: chex.Array

    @property
    def clean(self) -> chex.Array:
        """Which training labels are true, also those that the redraw happened to hit."""
        return self.batch.inner[1] == self.truth


def _digits() -> tuple[Images, None]:
    images, labels = load_digits(return_X_y=True)
    return (images / 16, labels), None


def _idx(name: str, times: int = 1) -> tuple[Images, Images]:
    parts = (download.images(name, part) for part in ("train", "t10k"))
    train, test = (
        (download.shrunk(images, times).reshape(len(images), -1) / np.float32(255), labels) for images, labels in parts
    )
    return train, test


def _cifar10() -> tuple[Images, Images]:
    parts = (photos.cifar10(part) for part in ("train", "test"))
    train, test = ((images.reshape(len(images), -1), labels) for images, labels in parts)
    return train, test


# Images [N, pixels] with labels to train and validate on, and others to test on (None: what is left of the first).
# Bytes stand for shares of 255. -14: shrunk to 14 × 14, for quick runs.
POOLS: dict[str, Callable[[], tuple[Images, Images | None]]] = {
    "digits": _digits,
    "mnist": functools.partial(_idx, "mnist"),
    "fashion-mnist": functools.partial(_idx, "fashion-mnist"),
    "mnist-14": functools.partial(_idx, "mnist", 2),
    "fashion-mnist-14": functools.partial(_idx, "fashion-mnist", 2),
    "cifar10": _cifar10,
}


def shares(images: np.ndarray) -> chex.Array:
    """Images in [0, 1]: bytes are divided by 255."""
    return jnp.asarray(images, jnp.float32) / (255 if images.dtype == np.uint8 else 1)


def load(name: str, seed: int, train: int, validation: int, corruption: float, test: int | None = None) -> Data:
    """Draws training and validation parts; each training label is redrawn uniformly with probability `corruption`.

    Args:
      name: a key of POOLS.
      seed: of all draws.
      train: number of training images.
      validation: number of validation images.
      corruption: probability with which a training label is redrawn.
      test: number of test images, drawn from those there are; by default all.

    Returns:
      The three parts.
    """
    (images, labels), others = POOLS[name]()
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    redrawn = random.random(train) < corruption
    given = np.where(redrawn, random.integers(0, 10, train), labels[order[:train]])
    chosen, rest = order[: train + validation], order[train + validation :]
    test_images, test_labels = (images[rest], labels[rest]) if others is None else others
    tested = slice(None) if test is None else random.permutation(len(test_labels))[:test]
    inputs, truth = shares(images[chosen]), jnp.asarray(labels[chosen], jnp.int32)
    return Data(
        seed=seed,
        batch=bx.Batch(outer=(inputs[train:], truth[train:]), inner=(inputs[:train], jnp.asarray(given, jnp.int32))),
        test=(shares(test_images[tested]), jnp.asarray(test_labels[tested], jnp.int32)),
        truth=truth[:train],
    )


def grey(data: Data) -> Data:
    """The same with the training images in grey, for pictures of them."""
    images, labels = data.batch.inner
    if images.shape[1] % 3 == 0:
        images = images.reshape(len(images), -1, 3).mean(axis=2)
    return data._replace(batch=data.batch._replace(inner=(images, labels)))
