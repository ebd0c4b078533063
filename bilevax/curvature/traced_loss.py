"""The loss of a model on one batch, traced: what every pass over its blocks reads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.curvature import capture
from bilevax.curvature.capture.choices import Blocks
from bilevax.curvature.model_loss import ModelLoss, structured
from bilevax.curvature.output_loss import OutputLoss
from bilevax.curvature.sharing import ChooseSharing, Sharing
from bilevax.problem import Loss, wide_dtype
from bilevax.typing import Array, PyTree

Positions = Callable[[PyTree], Array]  # batch -> [N, T], which positions count


class TracedLoss(NamedTuple):
    """What all passes over one batch share.

    Attributes:
      captured: the traced model.
      leaves: of y.
      loss: output loss.
      targets: what it takes.
      scale: w_n m_nt / N for each of its values.
      q: w_n / N, [N]; the mean over positions that count, where each has a weight of its own.
      mask: what positions count in their example, [N, T], ones and zeros, or multiples of their weights; or None.
      sharing: name of a layer -> `Sharing`.
    """

    captured: capture.Capture
    leaves: list[Array]
    loss: OutputLoss
    targets: Any
    scale: Callable[[Array], Array]
    q: Array
    mask: Array | None
    sharing: ChooseSharing


def trace_loss(
    inner_loss: Loss,
    x: PyTree,
    y: PyTree,
    batch: PyTree,
    sharing: Sharing | ChooseSharing,
    positions: Positions | None,
    unsupported: capture.Unsupported,
    blocks: Blocks | None = None,
) -> TracedLoss:
    """Traces the model of a `ModelLoss` on this batch, and evaluates its weights and masks."""
    loss = structured(inner_loss, "Kronecker factors")
    if not isinstance(sharing, Sharing):
        checks.function("sharing", sharing, "name")
    if positions is not None:
        checks.function("positions", positions, "batch")
    checks.function("unsupported", unsupported, "leaves")
    inputs, targets = loss.inputs_and_targets(x, batch)
    options: Any = {"blocks": blocks, "unsupported": unsupported, "examples": loss.examples}
    captured = capture.trace(loss.model, y, inputs, **options)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(y)]
    dtype = wide_dtype(*leaves)
    q = loss.weight_scale(captured.examples, dtype, x, batch).astype(dtype)
    q, mask = _of_positions(q, _mask(loss, batch, positions, captured))

    def choose(name: str) -> Sharing:
        chosen = sharing if isinstance(sharing, Sharing) else sharing(name)
        checks.instance("sharing", chosen, Sharing, "Return bx.curvature.expand or bx.curvature.reduce for every name.")
        return chosen

    def scale(outputs: Array) -> Array:
        return loss.scale(jax.eval_shape(loss.loss.value, outputs, targets), x, batch)

    return TracedLoss(captured, leaves, loss.loss, targets, scale, q, mask, choose)


def _mask(loss: ModelLoss, batch: PyTree, positions: Positions | None, captured: capture.Capture) -> Array | None:
    if positions is None:
        return None if loss.mask is None else jnp.asarray(loss.mask(batch)).reshape(captured.examples, -1)
    mask = jnp.asarray(positions(batch))
    found = sorted({block.positions for block in captured.blocks if block.matrix is not None})
    if jnp.ndim(mask) != 2 or mask.shape[0] != captured.examples or mask.shape[1] not in found:
        raise ValueError(
            f"positions must return ones and zeros [N, T] with N = {captured.examples} examples and the T of some "
            f"layer, one of {found}; got shape {jnp.shape(mask)}. Return the padding mask of the tokens."
        )
    return mask


def _of_positions(q: Array, mask: Array | None) -> tuple[Array, Array | None]:
    """Weights of positions [N, ...] as one for each example, and what a position counts in it: their product is m w."""
    # w (1, 0, 3) with the mask (1, 1, 0): 1/2 for the example, whose positions count (2, 0, 0)
    if q.ndim == 1:
        return q, mask
    q = q.reshape(q.shape[0], -1)
    if mask is not None and mask.shape != q.shape:  # positions of other layers
        return jnp.mean(q, axis=1), mask
    counts = jnp.ones_like(q) if mask is None else mask.astype(q.dtype)
    total = jnp.sum(counts, axis=1)
    mean = jnp.sum(counts * q, axis=1) / jnp.where(total > 0, total, 1)
    return mean, counts * q / jnp.where(mean == 0, 1, mean)[:, None]
