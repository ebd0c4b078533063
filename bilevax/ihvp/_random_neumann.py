"""One random term of the Neumann series, which is right in the mean."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.curvature.products import Curvature, damped, hessian
from bilevax.ihvp._start import lower, seen, smallest, start, stateless
from bilevax.meshes import dot
from bilevax.printing import as_called
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, norm
from bilevax.sampling import Sample, fold, full, split
from bilevax.typing import Array, Key, PyTree, Scalar


class _Carry(NamedTuple):
    r: PyTree
    norm: Array  # ‖r‖
    curvature: Array
    grew: Array  # whether ‖r‖ ever did


@as_called
def random_neumann(
    *,
    terms: int,
    step_size: Scalar,
    damping: Scalar = 0.0,
    curvature: Curvature = hessian,
    sample: Sample = full,
) -> IHVP:
    """Draws one term of the Neumann series, with a batch of its own for each of its factors.

        v = terms · step_size · Π_{i=1}^{p} (I − step_size · (H_i + damping I)) b,   p uniform on 0..terms − 1

    Its mean over p and over the batches is the sum of the first `terms` terms, whose error is
    (I − step_size · H)^terms H⁻¹ b, with batches of any size, where a series on one batch has a bias of its own. The
    price is noise: up to `terms` − 1 times the square of the mean, where step_size · H is near I. `sgd` from a cold
    start has the same mean without the noise of p, at twice the cost. It is here for the published methods that use it.

    Args:
      terms: number of terms of the series, >= 1.
      step_size: a number in (0, 2 / λ_max(H)).
      damping: a number >= 0 added to the curvature.
      curvature: a function (inner_loss, x, y, batch) -> product.
      sample: how the batch of factor i is drawn from the inner data; it is asked with t = i.

    Returns:
      An `IHVP` without state, linear in b for one key; it makes no use of a warm start. `info.products` is p, and
      `info.residual` is not measured. `info.breakdown` tells when the product of factors grew at any of them.

    Raises:
      ValueError: if terms < 1, step_size is not positive, or damping is negative; when it draws, if there is no key.

    Cost: (terms − 1) / 2 products in the mean, each with its own linearization of ∇_y g; under vmap the largest p of
    all.

    Reference: Ghadimi and Wang, "Approximation methods for bilevel programming", arXiv 1802.02246, algorithm 3.

    Example:
        >>> import bilevax as bx, jax
        >>> ihvp = bx.ihvp.random_neumann(terms=2, step_size=0.5)
        >>> prepare = lambda key: ihvp.prepare(key, (), lambda x, y, batch: 0.5 * y**2, (0.0, 1.0, None))[0]
        >>> sorted({float(prepare(jax.random.key(seed))(8.0)[0]) for seed in range(9)})  # the mean is 8 · (1/2 + 1/4)
        [4.0, 8.0]
    """
    terms = checks.count("terms", terms, minimum=1)
    checks.scalar("step_size", step_size)
    checks.positive("step_size", step_size)
    checks.scalar("damping", damping)
    checks.nonnegative("damping", damping)
    checks.function("curvature", curvature, "inner_loss", "x", "y", "batch")
    checks.function("sample", sample, "key", "t", "data")

    def prepare(key: Key | None, state: tuple[()], inner_loss: Loss, point: Point) -> tuple[Apply, tuple[()]]:
        """Draws the number of factors: (apply, state), the state as it was; the key must be given."""
        if key is None:
            raise ValueError("key must be a jax.random.key for a random series; got None. Pass jax.random.key(0).")
        x, y, data = point
        number_key, sample_key = split(key, 2)
        p = jax.random.randint(number_key, (), 0, terms)

        def factor(i: Array, carry: _Carry) -> _Carry:
            product = damped(curvature(inner_loss, x, y, sample(fold(sample_key, i), i, data)), damping)
            hr = product(carry.r)
            least = lower(carry.curvature, dot(carry.r, hr), carry.norm**2)
            r = optax.tree.cast_like(optax.tree.add_scale(carry.r, -step_size, hr), carry.r)
            size = norm(r)
            grew = carry.grew | ~(size <= carry.norm * (1 + 16 * jnp.finfo(size.dtype).eps))
            return _Carry(r, size, least, grew)

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """V by one draw of the series; v0 is not used."""
            begin = start(lambda v: v, b, None)
            size = norm(begin.r)
            carry = _Carry(begin.r, size, smallest(size), ~jnp.isfinite(size))
            carry = jax.lax.fori_loop(0, p, factor, carry)
            v = optax.tree.scale(begin.scale * terms * step_size, carry.r)
            breakdown = carry.grew | (carry.curvature < 0)
            return optax.tree.cast_like(v, b), IHVPInfo(p, p, 0, None, seen(carry.curvature), breakdown)

        return apply, state

    return IHVP(stateless, prepare)
