"""The network of few-shot tasks, written in flax."""

import functools

import flax.linen as nn

from benchmarks.data.few_shot import WAYS
from benchmarks.networks.convolutional import patches
from bilevax.typing import Array


class Network(nn.Module):
    """Convolutions of stride 2 and a dense layer: images [N, side, side] or [N, side, side, 3] -> logits [N, WAYS].

    Of a photograph it sees how far each pixel is from the mean colour.

    Attributes:
      width: channels of each convolution.
      layers: number of convolutions.
    """

    width: int = 32
    layers: int = 3

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """The logits."""
        convolution = functools.partial(nn.Conv, self.width, (3, 3), strides=2, conv_general_dilated=patches)
        grey = images.ndim == 3
        hidden = images[..., None] if grey else 4 * (images - images.mean(axis=(1, 2), keepdims=True))
        for _ in range(self.layers):
            hidden = nn.relu(convolution(kernel_init=nn.initializers.he_normal())(hidden))
        return nn.Dense(WAYS)(hidden.reshape(len(hidden), -1))
