"""What becomes of a layer that is applied at several positions of an example: tokens, or patches of an image."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from bilevax.printing import by_text
from bilevax.typing import Array


class Sharing(NamedTuple):
    """How rows of positions enter the factors.

    Attributes:
      inputs: `inputs(a, mask)`, activations [N, T, d_in] and mask [N, T] -> rows [N, T or 1, d_in].
      outputs: gradients [N, T, d_out] -> rows [N, T or 1, d_out].
      per_position: whether the rows are still one for each position, so that a mask counts them.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.curvature.reduce.outputs(jnp.ones((1, 3, 2))).tolist()
        [[[3.0, 3.0]]]
    """

    inputs: Callable[[Array, Array], Array]
    outputs: Callable[[Array], Array]
    per_position: bool
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


ChooseSharing = Callable[[str], Sharing]  # name of a leaf -> what becomes of its positions


def _mean(a: Array, mask: Array) -> Array:
    count = jnp.sum(mask, axis=1)[:, None, None]
    return jnp.sum(a * mask[:, :, None], axis=1, keepdims=True) / jnp.where(count > 0, count, 1)


expand = Sharing(lambda a, mask: a, lambda u: u, True, text="expand")
"""Each position is an example of its own: A = Σ a aᵀ / count, B = Σ u uᵀ. Exact for deep linear networks with a loss at
every position. Reference: Eschenhagen et al., arXiv 2311.00636, section 3."""
reduce = Sharing(_mean, lambda u: jnp.sum(u, axis=1, keepdims=True), False, text="reduce")
"""One row for each example: the mean of the activations and the sum of the gradients. Exact for linear networks that
average their positions; not for the keys of attention, whose gradients add up to zero. Reference: as for `expand`."""
