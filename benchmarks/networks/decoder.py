"""A small language model: the encoder's blocks, each word reading those before it only."""

import flax.linen as nn
import jax.numpy as jnp

from benchmarks.networks.encoder import Block, Embeddings, Size
from bilevax.typing import Array

SIZES = {
    "decoder-small": Size(vocabulary=512, positions=64, width=64, heads=4, hidden=128, layers=2, types=1),
    "decoder-base": Size(vocabulary=8192, positions=128, width=768, heads=12, hidden=3072, layers=12, types=1),
}


class Decoder(nn.Module):
    """Logits [N, T, vocabulary] of the next word at each place; its output matrix is not tied to the embeddings."""

    size: Size

    @nn.compact
    def __call__(self, inputs: tuple[Array, Array]) -> Array:
        """Inputs: words [N, T], and real [N, T], 0 at padding."""
        words, real = inputs
        before = jnp.tril(jnp.ones((words.shape[1],) * 2, bool))[None, None]
        attends = before & (real[:, None, None, :] > 0)
        hidden = Embeddings(self.size, name="embeddings")(words)
        for number in range(self.size.layers):
            hidden = Block(self.size, name=f"block_{number}")(hidden, attends)
        return nn.Dense(self.size.vocabulary, name="head")(hidden)
