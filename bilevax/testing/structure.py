"""Structure for losses that have none."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevax import curvature
from bilevax.problem import Loss
from bilevax.typing import Array, PyTree


def as_model(loss: Loss, x: PyTree, y: PyTree) -> curvature.ModelLoss:
    """Any convex loss as a `ModelLoss`: the model hands out y itself, and the output loss is all the rest."""
    flat, unravel = ravel_pytree(y)

    def model(y: PyTree, ones: Array) -> Array:
        parts = [
            leaf.reshape(1, -1).astype(flat.dtype) * ones.astype(flat.dtype)
            for leaf in map(jnp.asarray, jax.tree.leaves(y))
        ]
        return jnp.concatenate(parts, axis=1)

    output_loss = curvature.convex(lambda outputs, batch: loss(x, unravel(outputs[0]), batch)[None])
    return curvature.ModelLoss(model, output_loss, lambda x, batch: (jnp.ones((1, 1)), batch))
