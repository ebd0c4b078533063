"""A text encoder of BERT's shape, whole or in parts, so that what lies below the trained blocks runs only once.

Reference: Devlin et al., "BERT", arXiv 1810.04805; Vaswani et al., arXiv 1706.03762.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bilevax.typing import Array


class Size(NamedTuple):
    """Numbers of words, positions and text types, widths, heads of an attention, and blocks, which may be scanned."""

    vocabulary: int
    positions: int
    width: int
    heads: int
    hidden: int
    layers: int
    types: int = 2
    scanned: bool = False


SIZES = {
    "encoder-small": Size(vocabulary=2048, positions=64, width=64, heads=4, hidden=128, layers=2),
    "encoder-scanned": Size(4096, positions=128, width=256, heads=4, hidden=1024, layers=10, scanned=True),
    "bert-base": Size(vocabulary=30522, positions=512, width=768, heads=12, hidden=3072, layers=12),
}


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-12, name=name)


class Embeddings(nn.Module):
    """The first hidden states [N, T, width] of words [N, T]: the sum of three embeddings, normalised."""

    size: Size

    @nn.compact
    def __call__(self, words: Array) -> Array:
        """All words are of the first type."""
        kinds = jnp.zeros_like(words)
        places = jnp.broadcast_to(jnp.arange(words.shape[1])[None], words.shape)
        tables = {"word": (self.size.vocabulary, words), "position": (self.size.positions, places)}
        hidden = sum(
            nn.Embed(rows, self.size.width, embedding_init=nn.initializers.normal(0.02), name=name)(ids)
            for name, (rows, ids) in {**tables, "type": (self.size.types, kinds)}.items()
        )
        return _norm("norm")(hidden)


class Block(nn.Module):
    """Attention and a network for each position, each added to its input and normalised after that."""

    size: Size

    @nn.compact
    def __call__(self, hidden: Array, attends: Array) -> Array:
        """Hidden states [N, T, width]; `attends` [N, 1, T, T] or broadcast to it: who reads whom."""
        mixed = nn.MultiHeadDotProductAttention(self.size.heads, name="attention")(hidden, mask=attends)
        hidden = _norm("attention_norm")(hidden + mixed)
        wide = nn.Dense(self.size.hidden, name="intermediate")(hidden)
        narrow = nn.Dense(self.size.width, name="output")(jax.nn.gelu(wide, approximate=False))
        return _norm("output_norm")(hidden + narrow)


class Scanned(nn.Module):
    """A block as the body of a scan."""

    size: Size

    @nn.compact
    def __call__(self, hidden: Array, attends: Array) -> tuple[Array, None]:
        """The hidden states, and nothing beside them."""
        return Block(self.size, name="block")(hidden, attends), None


class Encoder(nn.Module):
    """The blocks in a range: with the embeddings if block 0 is among them, and with the head if it has classes.

    Two parts are the whole: `Encoder(size, range(2, 12), 6)` reads what `Encoder(size, range(2))` returns, and their
    parameters together are those of `Encoder(size, range(12), 6)`. There is no dropout.

    Attributes:
      size: of the whole encoder.
      blocks: those that are here.
      classes: of the logits [N, classes]; None for hidden states [N, T, width].
    """

    size: Size
    blocks: range
    classes: int | None = None

    @nn.compact
    def __call__(self, inputs: tuple[Array, Array]) -> Array:
        """Inputs: words [N, T], or hidden states [N, T, width] of the blocks below; and real [N, T], 0 at padding."""
        hidden, real = inputs
        if 0 in self.blocks:
            hidden = Embeddings(self.size, name="embeddings")(hidden)
        attends = real[:, None, None, :] > 0
        if self.size.scanned:
            stack = nn.scan(
                Scanned, {"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=len(self.blocks)
            )
            hidden, _ = stack(self.size, name="blocks")(hidden, attends)
        for number in () if self.size.scanned else self.blocks:
            hidden = Block(self.size, name=f"block_{number}")(hidden, attends)
        if self.classes is None:
            return hidden
        pooled = jnp.tanh(nn.Dense(self.size.width, name="pooler")(hidden[:, 0]))
        return nn.Dense(self.classes, name="classifier")(pooled)
