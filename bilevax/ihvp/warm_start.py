"""Where an iterative solve of H v = b starts."""

import chex
import optax

from bilevax.curvature.products import Product


def warm_start(
    product: Product, b: chex.ArrayTree, v0: chex.ArrayTree | None
) -> tuple[chex.ArrayTree, chex.ArrayTree, int]:
    """Returns a start v, its residual r = b − H v, and the number of products that it took.

    v0 is used where its residual is smaller than ‖b‖. Otherwise (it is stale, not finite, or left over from a solve
    that broke down) the start is zero, so that no error is carried from one outer step to the next.
    """
    zeros = optax.tree.zeros_like(b)
    if v0 is None:
        return zeros, b, 0
    v0 = optax.tree.cast_like(v0, b)
    r = optax.tree.sub(b, product(v0))
    better = optax.tree.norm(r) < optax.tree.norm(b)
    return optax.tree.where(better, v0, zeros), optax.tree.where(better, r, b), 1
