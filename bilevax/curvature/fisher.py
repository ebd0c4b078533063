"""Pseudo-gradients u of the outputs, whose products u uᵀ add up to the curvature L of the output loss, or estimate it.

Each is a function `(key, loss, outputs, targets) -> (columns, column)`: so many backward passes, and `column(k)`, the
cotangent of pass k, like the outputs.
"""

import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.curvature.output_loss import OutputLoss
from bilevax.typing import Array, Key, Scalar

__all__ = ["empirical", "exact", "sampled"]


def __dir__() -> list[str]:
    return __all__


Columns = tuple[int, Callable[[Scalar], Array]]


class Fisher(Protocol):
    """A function of this module, or one of yours: which pseudo-gradients, and how many of them."""

    def __call__(self, key: Key | None, loss: OutputLoss, outputs: Array, targets: Array, /) -> Columns: ...


def sampled(samples: int = 1) -> Fisher:
    """Gradients at labels drawn from the model's own distribution: an unbiased estimate of the curvature.

        u = ∇_z loss(z, t),   t ~ the model          E[u uᵀ] = L

    Args:
      samples: labels for each output, >= 1; the error falls like 1/√samples.

    Returns:
      A Fisher estimator.

    Raises:
      ValueError: if samples < 1, or, when it is used, if there is no key.

    Cost: one backward pass for each sample.

    Reference: Martens and Grosse, arXiv 1503.05671, section 5.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> fisher, loss = bx.curvature.fisher.sampled(2), bx.curvature.softmax_cross_entropy
        >>> columns, column = fisher(jax.random.key(0), loss, jnp.zeros((1, 2)), jnp.zeros(1, int))
        >>> columns, column(0).shape
        (2, (1, 2))
    """
    samples = checks.count("samples", samples, minimum=1)

    def columns(key: Key | None, loss: OutputLoss, outputs: Array, targets: Array) -> Columns:
        if key is None:
            raise ValueError(
                "key must be a jax.random.key for fisher.sampled, which draws labels; got None. Pass "
                "key=jax.random.key(0), or fisher=bx.curvature.fisher.exact."
            )

        def column(k: Scalar) -> Array:
            here = jax.random.fold_in(key, k)
            if loss.draw is not None:
                u = loss.draw(here, outputs, targets)
            else:
                u = loss.root(outputs, targets, jax.random.rademacher(here, outputs.shape, outputs.dtype))
            return u / math.sqrt(samples)

        return samples, column

    columns.__name__ = f"sampled({samples})"  # as print shows it
    return columns


def exact(key: Key | None, loss: OutputLoss, outputs: Array, targets: Array) -> Columns:
    """The columns of the root S of the curvature, one after the other, each example with a random sign ("type 2").

        Σ_k u_k u_kᵀ = S Sᵀ = L          u_nk = ±1 S_n e_k

    The signs cancel in what each example adds alone: factors and diagonals are exact then, and the same to the bit for
    every key. Where examples interact (BatchNorm in train mode, graph networks) one pass carries the sum of what all
    outputs ask of an example; the signs remove the products of two outputs on average, and what is found is unbiased,
    as with `sampled`.

    Args:
      key: draws the signs; with None they are the same every time.
      loss: output loss.
      outputs: [N, ..., C].
      targets: what the loss takes.

    Returns:
      As many passes as one example has outputs (positions · C), and the function of their number.

    Cost: that many backward passes.

    Reference: Botev, Ritter, Barber, arXiv 1706.03662; Dangel et al., arXiv 2507.05127, section 2.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.squared_error
        >>> columns, column = bx.curvature.fisher.exact(None, loss, jnp.zeros((1, 2)), jnp.zeros((1, 2)))
        >>> [abs(column(k)).tolist() for k in range(columns)]
        [[[1.0, 0.0]], [[0.0, 1.0]]]
    """
    shape = jnp.shape(outputs)
    one, drawn = shape[1:], jax.random.key(0) if key is None else key

    def column(k: Scalar) -> Array:
        s = (jnp.arange(math.prod(one)) == k).astype(outputs.dtype).reshape(1, *one)
        signs = jax.random.rademacher(jax.random.fold_in(drawn, k), shape[:1], outputs.dtype)
        return loss.root(outputs, targets, s * signs.reshape(-1, *(1 for _ in one)))

    return math.prod(one), column


def empirical(key: Key | None, loss: OutputLoss, outputs: Array, targets: Array) -> Columns:
    """The gradient at the true labels: biased, for comparison with others that use it.

        u = ∇_z loss(z, target)

    Args:
      key: not used.
      loss: output loss.
      outputs: [N, ..., C].
      targets: what the loss takes.

    Returns:
      One pass, and the function of its number.

    Cost: one backward pass.

    Reference: Kunstner, Balles, Hennig, arXiv 1905.12558, on what is wrong with it.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.squared_error
        >>> _, column = bx.curvature.fisher.empirical(None, loss, jnp.ones((1, 2)), jnp.zeros((1, 2)))
        >>> column(0).tolist()
        [[1.0, 1.0]]
    """
    gradient = jax.grad(lambda outputs: jnp.sum(loss.value(outputs, targets)))
    return 1, lambda k: gradient(outputs)
