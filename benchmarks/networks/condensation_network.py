"""The convolutional network of data condensation, written in flax.

Reference: Gidaris and Komodakis, arXiv 1804.09458; Zhao, Mopuri, Bilen, arXiv 2006.05929, section 4, who condense
images with it.
"""

import flax.linen as nn

from benchmarks.networks.convolutional import classifier, convolution, pictures
from benchmarks.networks.model import Model
from bilevax.typing import Array

LAYERS = 3


class NormalizedConvolutions(nn.Module):
    """Convolutions, each with instance normalization and a mean over 2 × 2 positions, and a dense layer.

    Attributes:
      width: channels of each convolution.
    """

    width: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """The logits, [N, 10]."""
        hidden = pictures(images)
        for _ in range(LAYERS):
            hidden = nn.relu(nn.InstanceNorm()(convolution(self.width)(hidden)))
            hidden = nn.avg_pool(hidden, (2, 2), strides=(2, 2))
        return nn.Dense(10)(hidden.reshape(len(hidden), -1))


def network(width: int) -> Model:
    """The network with so many channels."""
    return classifier(NormalizedConvolutions(width))
