"""Kronecker factors of the Gauss–Newton matrix, block by block.

    G_block ≈ A ⊗ B,   (A ⊗ B) V := A V B,   V = [dW; db]
    A = Σ_n q_n ā_n ā_nᵀ      q_n = w_n / Σ_m w_m,   ā = [a; 1]
    B = 1/N Σ_n w_n Σ_k u_nk u_nkᵀ                   u = pseudo-gradient at the output of the layer

The example weights enter both factors: A is taken under the reweighted law of the data, and its mass is in B.
"""

import jax

from bilevax import checks
from bilevax.carried import parameters
from bilevax.curvature import capture
from bilevax.curvature._kronecker_product import product
from bilevax.curvature.capture.choices import Blocks
from bilevax.curvature.fisher import Fisher, sampled
from bilevax.curvature.forms import Diagonal, Factors, Kept, Kronecker, Rows, Sketch
from bilevax.curvature.inverse import Cholesky, Eigen, Inverse, by_shape, factored, low_rank, spectral
from bilevax.curvature.model_loss import held
from bilevax.curvature.passes import measure
from bilevax.curvature.sharing import ChooseSharing, Sharing, expand
from bilevax.curvature.traced_loss import Positions, trace_loss
from bilevax.problem import Loss
from bilevax.typing import Key, PyTree

__all__ = [
    "Cholesky",
    "Diagonal",
    "Eigen",
    "Inverse",
    "Kronecker",
    "Rows",
    "Sketch",
    "by_shape",
    "factored",
    "factors",
    "low_rank",
    "product",
    "spectral",
]


def __dir__() -> list[str]:
    return __all__


def factors(
    key: Key | None,
    inner_loss: Loss,
    x: PyTree,
    y: PyTree,
    batch: PyTree,
    *,
    fisher: Fisher | None = None,
    sharing: Sharing | ChooseSharing = expand,
    positions: Positions | None = None,
    inverse: Inverse = by_shape,
    largest: int = 8192,
    blocks: Blocks | None = None,
    unsupported: capture.Unsupported = capture.error,
) -> Factors:
    """The Kronecker factors of every layer of a model, found without a change to the model.

        A = Σ_n q_n ā_n ā_nᵀ          B = 1/N Σ_n w_n Σ_k u_nk u_nkᵀ          G_block ≈ A ⊗ B

    They are kept as sums, which mean the same over any data: what a gossip of agents should average, before anything is
    inverted. No derivative flows through them.

    Args:
      key: draws labels; None for a deterministic `fisher`.
      inner_loss: g, a `ModelLoss`.
      x: outer variable; a constant here.
      y: inner variable.
      batch: what g takes as its batch.
      fisher: which pseudo-gradients; `fisher.sampled()` by default.
      sharing: what becomes of several positions: `expand`, `reduce`, or a function of the name of the leaf.
      positions: batch -> [N, T] of ones and zeros, which positions count in A; by default the mask of the loss, in
        layers with as many positions.
      inverse: what `inverted` will be asked for, which says in which form factors are wanted; those by rows, which do
        not add up, are none of them.
      largest: a factor of more rows or columns is kept as its diagonal.
      blocks: what certain leaves get instead, {path or pattern: choice} or a function path -> choice or None:
        `capture.diagonal` (exact where the leaf is a layer that is used once), `identity`, `zero`, a function like
        these, or the rank of a sketch of the factors.
      unsupported: what to do with leaves that no rule covers.

    Returns:
      A dict: name of the weight -> `Kronecker`, or `Diagonal` for a leaf of its own. Leaves that a treatment inverts
      without factors are missing.

    Raises:
      TypeError: if `inner_loss` is a bare function.
      ValueError: if a leaf is covered by no rule, or positions fit no layer.

    Cost: one forward pass and as many backward passes as `fisher` says; N (d_in² + d_out²) operations for each layer.

    Reference: Martens and Grosse, arXiv 1503.05671; Grosse and Martens, arXiv 1602.01407, for convolutions;
    Eschenhagen et al., arXiv 2311.00636, for shared positions.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.ModelLoss(lambda y, a: a @ y, bx.curvature.squared_error, lambda x, batch: batch)
        >>> batch = (jnp.array([[1.0], [2.0]]), jnp.zeros((2, 1)))
        >>> exact = bx.curvature.fisher.exact
        >>> bx.curvature.kronecker.factors(None, loss, 0.0, jnp.ones((1, 1)), batch, fisher=exact)["y"].A.tolist()
        [[2.5]]
    """
    inner_loss, (x, y) = held(inner_loss, y), jax.lax.stop_gradient((x, parameters(y)))
    chosen = sampled() if fisher is None else fisher
    checks.function("fisher", chosen, "key", "loss", "outputs", "targets")
    checks.instance("inverse", inverse, Inverse, "Pass what bx.curvature.inverted is to use, or leave it out.")
    kept = Kept(inverse.form, checks.count("largest", largest, minimum=1), fresh=False)
    return measure(key, trace_loss(inner_loss, x, y, batch, sharing, positions, unsupported, blocks), chosen, kept)[0]
