"""Conjugate gradients, safe in float32, at a million unknowns, and at an indefinite Hessian."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.curvature.products import Curvature, Product, damped, hessian
from bilevax.ihvp._checked import check_ihvp, prepared
from bilevax.ihvp._start import seen, smallest, start, stateless
from bilevax.meshes import dot, zeros_like
from bilevax.printing import as_called
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, added, norm
from bilevax.sampling import Sample, full, split
from bilevax.typing import Array, Key, PyTree, Scalar


class _Carry(NamedTuple):
    v: PyTree
    r: PyTree  # b − H v
    p: PyTree  # search direction
    rz: Array  # rᵀ M r
    norm: Array  # ‖r‖
    smallest: Array  # pᵀHp / pᵀp, over the directions so far
    largest: Array
    iterations: Array
    products: Array
    stop: Array
    best: PyTree  # the v of the smallest residual so far, for a solve that breaks down
    best_norm: Array


def _unpreconditioned(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
    return b, IHVPInfo(0, 0, 0, None, None, False)


def _prepare_none(key: Key | None, state: Any, inner_loss: Loss, point: Point) -> tuple[Apply, Any]:
    return _unpreconditioned, state


# ihvp.identity would measure each z, which doubles the vector work of an iteration.
_NONE = IHVP(stateless, _prepare_none, spd=True)


def _conjugate_gradients(
    product: Product, precondition: Apply, v: PyTree, r: PyTree, maxiter: int, tol: Scalar
) -> tuple[_Carry, IHVPInfo]:
    """Solves H v = b from v with r = b − H v, for ‖b‖ = 1; stops at the first direction that cannot be trusted.

    From zero, a first direction p of negative curvature is gone along all the same, as far as ‖Hp‖ says. Returns the
    last carry, and what the preconditioner reports.
    """
    z, info = precondition(r)
    size = norm(z)
    gain = 1 / jnp.where(size > 0, size, 1)

    def unit(z: PyTree) -> PyTree:  # CG does not depend on the scale of its preconditioner
        return z if precondition is _unpreconditioned else optax.tree.scale(gain, z)

    z = unit(z)
    from_zero = dot(v, v) == 0
    count = jnp.zeros((), jnp.int32)
    eps = jnp.finfo(size.dtype).eps

    def unfinished(c: _Carry) -> Array:
        return (c.iterations < maxiter) & (c.norm > tol) & (c.norm > 0) & ~c.stop

    def iterate(c: _Carry) -> _Carry:
        hp = product(c.p)
        php, pp = dot(c.p, hp), dot(c.p, c.p)
        rayleigh = php / pp
        largest = jnp.maximum(c.largest, jnp.abs(rayleigh))
        good = (rayleigh > eps * largest) & (c.rz > 0) & jnp.isfinite(php)
        falling = from_zero & (c.iterations == 0) & (c.rz > 0) & (rayleigh < 0)
        bent = jax.lax.cond(falling, lambda: c.rz / jnp.sqrt(pp * dot(hp, hp)), lambda: jnp.zeros_like(c.rz))
        alpha = jnp.where(good, c.rz / php, bent)
        v = optax.tree.add_scale(c.v, alpha, c.p)
        r = optax.tree.add_scale(c.r, -alpha, hp)
        z, info = precondition(r)
        z = unit(z)
        rz = jnp.where(good, dot(r, z), c.rz)
        p = optax.tree.add_scale(z, rz / c.rz, c.p)
        products = added(c.products, added(1, info.products))
        stop = ~good | info.breakdown
        length = jnp.sqrt(dot(r, r))  # without a preconditioner the compiler finds rz here
        better = falling | (length < c.best_norm)
        best, best_norm = optax.tree.where(better, v, c.best), jnp.where(better, length, c.best_norm)
        lowest = jnp.minimum(c.smallest, rayleigh)
        return _Carry(v, r, p, rz, length, lowest, largest, c.iterations + 1, products, stop, best, best_norm)

    rz, products = dot(r, z), added(count, info.products)
    length, stop = jnp.sqrt(dot(r, r)), jnp.asarray(info.breakdown)
    best = optax.tree.where(length <= 1, v, zeros_like(v))
    begin = _Carry(
        v, r, z, rz, length, smallest(size), jnp.zeros_like(size), count, products, stop, best, jnp.minimum(length, 1)
    )
    return jax.lax.while_loop(unfinished, iterate, begin), info


@as_called
def cg(
    *,
    maxiter: int = 20,
    tol: Scalar = 1e-6,
    damping: Scalar = 0.0,
    curvature: Curvature = hessian,
    preconditioner: IHVP | None = None,
    sample: Sample = full,
) -> IHVP:
    """Solves (H + damping I) v = b by preconditioned conjugate gradients on the symmetric system itself.

        α = rᵀz / pᵀHp    v ← v + α p    r ← r − α H p    z = M r    p ← z + (rᵀz / r₋ᵀz₋) p

    b is scaled to norm one first, so that neither a tiny nor a huge b can underflow or overflow. The curvature pᵀHp is
    checked in every iteration: at a negative or numerically zero one (below machine precision times the largest seen)
    the loop stops, and `info.breakdown` says so; `info.curvature` is the smallest pᵀHp / pᵀp. v is then that of the
    smallest residual so far, at most that of v = 0; but where already b has negative curvature, v = b · ‖b‖ / ‖H b‖
    (without a preconditioner), which has no small residual, but a direction along which f changes. Few iterations may
    miss the negative eigenvalues of an indefinite H: no breakdown is no proof of a minimum, and a large residual is a
    warning. Numbers that are not finite give a v of NaN, never a silent guess. A warm start v0 that is no better than
    zero is replaced by zero. Half-precision leaves are solved in float32.

    Args:
      maxiter: largest number of iterations, >= 1.
      tol: stops at ‖b − (H + damping I) v‖ <= tol · ‖b‖.
      damping: a number >= 0 added to the curvature.
      curvature: a function (inner_loss, x, y, batch) -> product; the Hessian where y is close to a minimum.
      preconditioner: another IHVP with `spd=True`, prepared once per solve. It brings its own damping; where it
        reports a breakdown, it is not positive definite, and this solve stops as well.
      sample: how the batch of H is drawn from the inner data; it is asked with t = 0.

    Returns:
      An `IHVP` whose state is that of the preconditioner. `info.residual` is the recursively updated one.

    Raises:
      ValueError: if maxiter < 1, tol or damping is negative, or the preconditioner is not `spd`.

    Cost: one product for each iteration and one for a warm start, and the preconditioner once more than there are
    iterations; six vectors like y.

    Reference: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952; for
    hypergradients: Pedregosa, arXiv 1602.02355, and Grazzi et al., arXiv 2006.16218.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = lambda x, y, batch: jnp.sum(jnp.array([1.0, 4.0]) * y**2)
        >>> apply, _ = bx.ihvp.cg(maxiter=2).prepare(None, (), loss, (0.0, jnp.ones(2), None))
        >>> v, info = apply(jnp.array([2.0, 8.0]))
        >>> v.round(4).tolist(), int(info.iterations), bool(info.breakdown)
        ([1.0, 1.0], 2, False)
    """
    maxiter = checks.count("maxiter", maxiter, minimum=1)
    checks.nonnegative("tol", tol)
    checks.nonnegative("damping", damping)
    checks.function("curvature", curvature, "inner_loss", "x", "y", "batch")
    checks.function("sample", sample, "key", "t", "data")
    chosen = _NONE if preconditioner is None else preconditioner
    check_ihvp("preconditioner", chosen, "Pass, say, bx.ihvp.identity(0.1), called.")
    if not chosen.spd:
        raise ValueError(
            "preconditioner must be an IHVP whose apply is linear in b (spd=True); got one that is not, such as "
            "ihvp.cg itself. Pass ihvp.identity, ihvp.kfac, ihvp.nystrom, ihvp.neumann or ihvp.exact, or None."
        )

    def prepare(key: Key | None, state: Any, inner_loss: Loss, point: Point) -> tuple[Apply, Any]:
        """Draws the batch of H and prepares the preconditioner, whose state it is: (apply, state)."""
        x, y, data = point
        batch_key, preconditioner_key = split(key, 2)
        product = damped(curvature(inner_loss, x, y, sample(batch_key, 0, data)), damping)
        parts = chosen.prepare(preconditioner_key, state, inner_loss, point)
        precondition, state = prepared("preconditioner", parts, state)

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """V by conjugate gradients from v0, or from zero where that is better."""
            begin = start(product, b, v0)
            carry, outer = _conjugate_gradients(product, precondition, begin.v, begin.r, maxiter, tol)
            finite = jnp.isfinite(carry.norm)
            v = optax.tree.where(carry.stop, carry.best, carry.v)
            v = jax.tree.map(lambda leaf: jnp.where(finite, leaf * begin.scale, jnp.nan), v)
            residual = jnp.where(carry.stop & finite, carry.best_norm, carry.norm)
            products = added(begin.products, carry.products)
            info = IHVPInfo(
                carry.iterations,
                products,
                outer.setup_products,
                residual,
                seen(carry.smallest),
                carry.stop | ~finite,
                outer.setup_gradients,
            )
            return optax.tree.cast_like(v, b), info

        return apply, state

    return IHVP(chosen.init, prepare)
