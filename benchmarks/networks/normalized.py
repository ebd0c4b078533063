"""A convolutional classifier with BatchNorm and Dropout, written in flax nnx: what it carries is not only weights."""

import functools

import jax
from flax import nnx

from benchmarks.networks.convolutional import patches, pictures
from bilevax.typing import Array

DROPOUT = 0.25  # share of the features that the last layer does not see in training


class Normalized(nnx.Module):
    """Two convolutions of stride 2, each with BatchNorm, and a dense layer on all positions with Dropout.

    Attributes:
      side: of the images, which have one channel.
    """

    def __init__(self, side: int, rngs: nnx.Rngs) -> None:
        """Draws the weights."""
        product = patches if jax.default_backend() == "cpu" else jax.lax.conv_general_dilated
        convolution = functools.partial(
            nnx.Conv, kernel_size=(3, 3), strides=2, use_bias=False, conv_general_dilated=product, rngs=rngs
        )
        positions = (-(-side // 4)) ** 2
        self.first, self.first_norm = convolution(1, 8), nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.second, self.second_norm = convolution(8, 16), nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(DROPOUT), nnx.Linear(16 * positions, 10, rngs=rngs)

    def __call__(self, images: Array, rngs: nnx.Rngs | None = None) -> Array:
        """Logits [N, 10] of rows of pixels; rngs for the dropout of `train()`."""
        hidden = nnx.relu(self.first_norm(self.first(pictures(images))))
        hidden = nnx.relu(self.second_norm(self.second(hidden)))
        return self.head(self.dropout(hidden.reshape(len(images), -1), rngs=rngs))
