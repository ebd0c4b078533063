"""Products with second derivatives of a loss; no matrix is ever formed here.

Every curvature is a function `(inner_loss, x, y, batch) -> product`, and `product(v)` is linear in v.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import optax

from bilevax import checks
from bilevax.meshes import like
from bilevax.problem import Loss, inner_gradient
from bilevax.typing import PyTree, Scalar

Product = Callable[[PyTree], PyTree]


class Curvature(Protocol):
    """`hessian`, `gauss_newton`, or a function of yours: what is linearized once at a point."""

    def __call__(self, inner_loss: Loss, x: PyTree, y: PyTree, batch: PyTree, /) -> Product: ...


def hessian(inner_loss: Loss, x: PyTree, y: PyTree, batch: PyTree) -> Product:
    """Products with H = ∇²_yy g(x, y), linearized once at this point (forward over reverse).

    Args:
      inner_loss: g, a function (x, y, batch) -> scalar.
      x: outer variable.
      y: inner variable.
      batch: what g takes as its batch.

    Returns:
      `product(v) = H v`, a pytree like v. v may be wider than y (float32 for a bfloat16 y): it is cast on the way in,
      and the result is cast back.

    Raises:
      ValueError: if g does not return a floating-point scalar.

    Cost: one gradient of g, once, and about two for each product.

    Reference: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6(1), 1994.

    Example:
        >>> import bilevax as bx
        >>> product = bx.curvature.hessian(lambda x, y, batch: x * y**2, 3.0, 2.0, None)
        >>> float(product(10.0))
        60.0
    """
    loss = checks.scalar_loss("inner_loss", inner_loss)
    _, push = jax.linearize(lambda y: jax.grad(loss, argnums=1)(x, y, batch), y)
    return lambda v: optax.tree.cast_like(push(like(optax.tree.cast_like(v, y), y)), v)


def cross(inner_loss: Loss, x: PyTree, y: PyTree, batch: PyTree) -> Product:
    """Products with the cross derivative ∇²_xy g(x, y), of shape [dim x, dim y].

    Args:
      inner_loss: g, a function (x, y, batch) -> scalar.
      x: outer variable.
      y: inner variable.
      batch: what g takes as its batch.

    Returns:
      `product(v) = ∇²_xy g · v`, a pytree like x, for v like y.

    Raises:
      ValueError: if g does not return a floating-point scalar.

    Cost: one gradient of g, once, and about two for each product.

    Example:
        >>> import bilevax as bx
        >>> product = bx.curvature.cross(lambda x, y, batch: x * y**2, 3.0, 2.0, None)
        >>> float(product(10.0))
        40.0
    """
    pull_back = inner_gradient(inner_loss, x, y, batch).pull_back
    return lambda v: pull_back(v)[0]


def damped(product: Product, damping: Scalar) -> Product:
    """Adds a multiple of the identity: v ↦ product(v) + damping · v.

    Args:
      product: a linear function v ↦ H v.
      damping: a number >= 0, in units of the eigenvalues of H.

    Returns:
      The damped product.

    Raises:
      ValueError: if damping is negative.

    Example:
        >>> import bilevax as bx
        >>> float(bx.curvature.damped(lambda v: 2.0 * v, 0.5)(4.0))
        10.0
    """
    checks.nonnegative("damping", damping)
    return lambda v: optax.tree.cast_like(optax.tree.add_scale(product(v), damping, v), v)
