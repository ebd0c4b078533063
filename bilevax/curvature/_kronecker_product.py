"""Products with Kronecker factors, not with their inverse."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import parameters
from bilevax.curvature import capture
from bilevax.curvature.capture.choices import Blocks
from bilevax.curvature.forms import Diagonal, Factors, Kronecker, Rows, Sketch
from bilevax.curvature.model_loss import held
from bilevax.curvature.sharing import expand
from bilevax.curvature.traced_loss import trace_loss
from bilevax.meshes import like, whole
from bilevax.problem import Loss, widen
from bilevax.typing import Array, PyTree


def product(
    found: Factors,
    inner_loss: Loss,
    x: PyTree,
    y: PyTree,
    batch: PyTree,
    *,
    blocks: Blocks | None = None,
    unsupported: capture.Unsupported = capture.error,
) -> Callable[[PyTree], PyTree]:
    """Products with the Gauss–Newton matrix of the data as the factors have it, wherever they come from.

        v -> blockdiag(A ⊗ B) v,      (A ⊗ B) V = A V B          without the weight decay

    Args:
      found: the factors of this model, as `kronecker.factors` measured them, whole or as diagonals.
      inner_loss: g, a `ModelLoss`.
      x: outer variable; for shapes.
      y: inner variable; for shapes.
      batch: what g takes as its batch; for its shapes.
      blocks: as they were given to `kronecker.factors`. Leaves that have no factors get 0.
      unsupported: as it was given to `kronecker.factors`.

    Returns:
      `v -> blockdiag(A ⊗ B) v`, pytrees like y; linear, symmetric and positive semidefinite.

    Raises:
      TypeError: if `inner_loss` is a bare function.
      ValueError: if the factors are kept by rows or by a sketch: pass `inverse=kronecker.spectral` to
        `kronecker.factors`.

    Cost: two products of matrices for each application and layer, 2 d_in d_out (d_in + d_out) operations.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.ModelLoss(lambda y, a: a @ y, bx.curvature.squared_error, lambda x, batch: batch)
        >>> problem = (loss, 0.0, jnp.ones((1, 1)), (jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))))
        >>> found = bx.curvature.kronecker.factors(None, *problem, fisher=bx.curvature.fisher.exact)
        >>> bx.curvature.kronecker.product(found, *problem)(jnp.array([[2.0]])).round(4).tolist()
        [[10.0]]
    """
    inner_loss, y = held(inner_loss, y), parameters(y)
    here = trace_loss(inner_loss, x, y, batch, expand, None, unsupported, blocks)

    def times(v: PyTree) -> PyTree:
        checks.same_shapes("v", v, y, "Pass a pytree like y.")
        wide = dict(enumerate(jax.tree.leaves(whole(widen(v)))))
        total = {leaf: jnp.zeros_like(value) for leaf, value in wide.items()}
        for block in here.captured.blocks:
            part = found.get(block.name)
            if part is None:
                continue
            if block.matrix is None:
                of_leaf = {block.leaf: block.put(_applied(part, block.take(wide[block.leaf])), wide[block.leaf])}
            else:
                of_leaf = block.unpack(_applied(part, block.pack(wide)), wide)
            total |= {leaf: total[leaf] + value for leaf, value in of_leaf.items()}
        tree = jax.tree.unflatten(jax.tree.structure(v), [total[k] for k in range(len(wide))])
        return like(optax.tree.cast_like(tree, v), v)

    return times


def _applied(part: Kronecker | Diagonal, v: Array) -> Array:
    """A V B of matrices [*stack, rows, outputs], or a product with a diagonal."""
    if isinstance(part, Diagonal):
        return part.diagonal * v
    a, b = part.A, part.B
    if isinstance(a, Rows | Sketch) or isinstance(b, Rows | Sketch):
        raise ValueError(
            "found must hold whole factors or diagonals; got some by rows or by a sketch. Pass inverse="
            "bx.curvature.kronecker.spectral to bx.curvature.kronecker.factors."
        )
    diagonal_a, diagonal_b = part.diagonals
    left = a[..., :, None] * v if diagonal_a else a @ v
    return left * b[..., None, :] if diagonal_b else left @ b
