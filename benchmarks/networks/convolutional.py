"""Convolutional classifiers of images, written in flax: a small network, LeNet, and residual ones.

The residual ones normalize groups of channels, not batches: the loss of an image does not depend on the others of its
batch.

Reference: He et al., arXiv 1512.03385 (residual networks); Wu and He, arXiv 1803.08494 (group normalization).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import bilevax as bx
from benchmarks.networks.model import Model
from bilevax.typing import Array, Key, PyTree

GROUPS = 8  # of channels, at each normalization


def patches(images: Array, kernel: Array, strides: Sequence[int], padding: str, **options: Any) -> Array:
    """A convolution, images [N, H, W, C] and kernel [h, w, C, D], as one matrix product; without dilation or groups.

    On a CPU, XLA's convolution is many times slower inside a loop, and where each task of a vmap has its own kernel.
    """
    (top, bottom), (left, right) = jax.lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    padded = jnp.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)))
    rows, columns = (size - window + 1 for size, window in zip(padded.shape[1:3], kernel.shape[:2], strict=True))
    windows = [
        padded[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i, j in itertools.product(*map(range, kernel.shape[:2]))
    ]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def convolution(width: int, size: int = 3, **options: Any) -> nn.Conv:
    """A convolutional layer; by `patches` on a CPU."""
    product = patches if jax.default_backend() == "cpu" else None
    return nn.Conv(width, (size, size), conv_general_dilated=product, **options)


def pictures(images: Array) -> Array:
    """Rows of pixels as squares, [N, side, side, channels]: one channel where their number is a square, else three."""
    pixels = images.shape[1]
    channels = 1 if math.isqrt(pixels) ** 2 == pixels else 3
    side = math.isqrt(pixels // channels)
    return images.reshape(-1, side, side, channels)


class Convolutional(nn.Module):
    """Convolutions of stride 2 with a bias, and a dense layer on the means over the positions.

    Attributes:
      widths: channels of each convolution.
    """

    widths: Sequence[int] = (16, 32, 64)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """The logits, [N, 10]."""
        hidden = pictures(images)
        for width in self.widths:
            hidden = nn.relu(convolution(width, strides=2)(hidden))
        return nn.Dense(10)(hidden.mean(axis=(1, 2)))


class LeNet(nn.Module):
    """Two convolutions of 5 × 5 without padding, each with ReLU and the largest of 2 × 2, and dense layers.

    Images of at least 16 pixels a side; those of 32 leave 5 × 5 positions to the dense layers.

    Reference: LeCun et al., "Gradient-based learning applied to document recognition", 1998.

    Attributes:
      dense: widths of the hidden dense layers.
    """

    dense: Sequence[int] = (120, 84)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """The logits, [N, 10]."""
        hidden = pictures(images)
        for width in (6, 16):
            hidden = nn.relu(convolution(width, 5, padding="VALID")(hidden))
            hidden = nn.max_pool(hidden, (2, 2), (2, 2))
        hidden = hidden.reshape(len(images), -1)
        for width in self.dense:
            hidden = nn.relu(nn.Dense(width)(hidden))
        return nn.Dense(10)(hidden)


class Block(nn.Module):
    """Two normalized convolutions, added to the input; the input is projected where its shape must change.

    Attributes:
      width: channels.
      strides: of the first convolution.
    """

    width: int
    strides: int

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """The features, [N, side, side, width]."""
        hidden = convolution(self.width, strides=self.strides, use_bias=False)(inputs)
        hidden = nn.relu(nn.GroupNorm(GROUPS)(hidden))
        hidden = nn.GroupNorm(GROUPS)(convolution(self.width, use_bias=False)(hidden))
        if inputs.shape != hidden.shape:
            inputs = convolution(self.width, 1, strides=self.strides, use_bias=False)(inputs)
            inputs = nn.GroupNorm(GROUPS)(inputs)
        return nn.relu(inputs + hidden)


class Residual(nn.Module):
    """A residual network for small images.

    Attributes:
      widths: channels of each stage; the first keeps the resolution, each later one halves it.
      blocks: in each stage.
    """

    widths: Sequence[int] = (16, 32, 64)
    blocks: int = 1

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """The logits, [N, 10]."""
        hidden = nn.relu(nn.GroupNorm(GROUPS)(convolution(self.widths[0], use_bias=False)(pictures(images))))
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                hidden = Block(width, strides=2 if stage and not block else 1)(hidden)
        return nn.Dense(10)(hidden.mean(axis=(1, 2)))


def classifier(network: nn.Module) -> Model:
    """A network as a function of its weights."""

    def init(key: Key, pixels: int) -> PyTree:
        return network.init(key, jnp.zeros((1, pixels)))["params"]

    def logits(y: PyTree, images: Array) -> Array:
        return jnp.asarray(network.apply({"params": y}, images))

    return Model(init, logits, bx.curvature.gauss_newton)


MODELS = {
    "cnn": classifier(Convolutional()),
    "lenet": classifier(LeNet()),
    "resnet": classifier(Residual()),
    "resnet18": classifier(Residual((64, 128, 256, 512), blocks=2)),
}
