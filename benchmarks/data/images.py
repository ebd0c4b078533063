"""Image data sets for data hyper-cleaning: split by a seed, and a share of the training labels redrawn."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import bilevax as bx
from benchmarks.data import download, photos
from bilevax.typing import Array

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
    test: tuple[Array, Array]
    truth: Array

    @property
    def clean(self) -> Array:
        """Which training labels are true, also those that the redraw happened to hit."""
        return self.batch.inner[1] == self.truth


class ImageSet(NamedTuple):
    """A data set of images of ten classes, and what suits it where a task does not say otherwise.

    Attributes:
      read: `read(times)`, images [N, pixels] with labels to train and validate on, and others to test on (None: what is
        left of the first); each side is so many times shorter than `shape` says. Bytes stand for shares of 255.
      shape: of an image: height, width and, of coloured ones, 3.
      split: how many images to train on, to validate on and, where there are too many, to test on.
      rates: step sizes of gradient descent for each model of `benchmarks.networks.classifiers`.
      small: a set of few and small images, for which tasks have settings of their own.
    """

    read: Callable[[int], tuple[Images, Images | None]]
    shape: tuple[int, ...]
    split: Mapping[str, int] = {"train": 4000, "validation": 500}
    rates: Mapping[str, float] = {
        "linear": 0.1,
        "mlp": 0.1,
        "cnn": 0.05,
        "lenet": 0.05,
        "resnet": 0.05,
        "resnet18": 0.05,
    }
    small: bool = False


def _digits(times: int) -> tuple[Images, None]:
    images, labels = load_digits(return_X_y=True)
    return (download.shrunk(images.reshape(-1, 8, 8), times).reshape(len(images), -1) / 16, labels), None


def _idx(name: str, times: int) -> tuple[Images, Images]:
    parts = (download.images(name, part) for part in ("train", "t10k"))
    train, test = (
        (download.shrunk(images, times).reshape(len(images), -1) / np.float32(255), labels) for images, labels in parts
    )
    return train, test


def _cifar10(times: int) -> tuple[Images, Images]:
    parts = (photos.cifar10(part) for part in ("train", "test"))
    train, test = ((photos.reduced(images, times).reshape(len(images), -1), labels) for images, labels in parts)
    return train, test


# All that a new set needs is a line here, and a reader of its files: every task on images takes it.
IMAGES = {
    "digits": ImageSet(
        read=_digits,
        shape=(8, 8),
        split={"train": 1000, "validation": 300},
        rates={"linear": 0.5, "mlp": 0.2, "cnn": 0.1, "lenet": 0.1, "resnet": 0.1, "resnet18": 0.05},
        small=True,
    ),
    "mnist": ImageSet(functools.partial(_idx, "mnist"), (28, 28)),
    "fashion-mnist": ImageSet(functools.partial(_idx, "fashion-mnist"), (28, 28)),
    "cifar10": ImageSet(
        read=_cifar10,
        shape=(32, 32, 3),
        split={"train": 4000, "validation": 500, "test": 2000},
        rates={"linear": 0.01, "mlp": 0.02, "cnn": 0.05, "lenet": 0.05, "resnet": 0.05, "resnet18": 0.05},
    ),
}
if TYPE_CHECKING:
    ImageName = str
else:
    ImageName = Literal[*IMAGES]  # what the command line takes


def check_full(name: str, full: bool) -> None:
    """Refuses the sizes of published runs for a small set."""
    if full and IMAGES[name].small:
        raise ValueError(f"full is about public data sets; got it with data={name}. Drop --full, or pass --data.")


def shares(images: np.ndarray) -> Array:
    """Images in [0, 1]: bytes are divided by 255."""
    return jnp.asarray(images, jnp.float32) / (255 if images.dtype == np.uint8 else 1)


def load(
    name: str, seed: int, train: int, validation: int, corruption: float, test: int | None = None, times: int = 1
) -> Data:
    """Draws training and validation parts; each training label is redrawn uniformly with probability `corruption`.

    Args:
      name: a key of IMAGES.
      seed: of all draws.
      train: number of training images.
      validation: number of validation images.
      corruption: probability with which a training label is redrawn.
      test: number of test images, drawn from those there are; by default all.
      times: how many times each side is shortened.

    Returns:
      The three parts.
    """
    (images, labels), others = IMAGES[name].read(times)
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
