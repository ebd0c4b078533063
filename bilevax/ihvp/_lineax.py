"""Any solver of lineax as an inverse-Hessian-vector product."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.curvature.products import Curvature, damped, hessian
from bilevax.ihvp._start import lower, seen, smallest, start, stateless
from bilevax.meshes import as_spread, by_compiler, dot, zeros_like
from bilevax.printing import as_called
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, norm
from bilevax.sampling import Sample, full
from bilevax.typing import Array, Key, PyTree, Scalar


@as_called
def lineax(
    solver: Any,
    *,
    damping: Scalar = 0.0,
    curvature: Curvature = hessian,
    sample: Sample = full,
    tags: Any = None,
) -> IHVP:
    """Solves (H + damping I) v = b by a solver of lineax: GMRES, BiCGStab, LSMR, Cholesky, ...

    For a curvature that conjugate gradients cannot take, and to compare solvers. b is scaled to norm one first;
    iterative solvers get the warm start v0 as their `y0`, and a v0 that solves the system is returned as it is. The
    operator is declared symmetric and positive semidefinite, as a Hessian at a minimum is; many solvers of lineax rely
    on that. For another curvature say what it is: `tags=lineax.symmetric_tag` where it is indefinite, `tags=()` where
    it is not symmetric.

    Args:
      solver: a solver object, say `lineax.GMRES(rtol=1e-6, atol=1e-6)`. `pip install "bilevax[lineax]"` brings lineax.
      damping: a number >= 0 added to the curvature.
      curvature: a function (inner_loss, x, y, batch) -> product.
      sample: how the batch of H is drawn from the inner data; it is asked with t = 0.
      tags: what lineax may assume of the operator; by default that it is symmetric and positive semidefinite.

    Returns:
      An `IHVP` without state; not declared `spd`. `info.residual` is measured by one more product, and `curvature` is
      vᵀHv / vᵀv at what lineax found. `info.products` is None: lineax counts iterations, not products. `info.breakdown`
      is True where lineax reports anything but success, or v was no better than zero, which is then returned.

    Raises:
      ValueError: if solver is not one of lineax, or damping is negative.
      ModuleNotFoundError: if lineax is not installed.

    Cost: that of the solver, and one product for the residual, one for a warm start.

    Reference: Rader, Lyons, Kidger, "Lineax: unified linear solves and linear least-squares in JAX and Equinox",
    arXiv 2311.17283.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp, lineax
        >>> loss = lambda x, y, batch: jnp.sum(jnp.array([1.0, 4.0]) * y**2)
        >>> ihvp = bx.ihvp.lineax(lineax.GMRES(rtol=1e-6, atol=1e-6))
        >>> apply, _ = ihvp.prepare(None, (), loss, (0.0, jnp.ones(2), None))
        >>> apply(jnp.array([2.0, 8.0]))[0].round(4).tolist()
        [1.0, 1.0]
    """
    try:
        import lineax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('ihvp.lineax needs lineax. Run: pip install "bilevax[lineax]"') from error

    checks.instance("solver", solver, lineax.AbstractLinearSolver, "Pass, say, lineax.GMRES(rtol=1e-6, atol=1e-6).")
    checks.nonnegative("damping", damping)
    checks.function("curvature", curvature, "inner_loss", "x", "y", "batch")
    checks.function("sample", sample, "key", "t", "data")
    tags = (lineax.symmetric_tag, lineax.positive_semidefinite_tag) if tags is None else tags

    def prepare(key: Key | None, state: tuple[()], inner_loss: Loss, point: Point) -> tuple[Apply, tuple[()]]:
        """Draws the batch of H: (apply, state), the state as it was."""
        x, y, data = point
        product = damped(curvature(inner_loss, x, y, sample(key, 0, data)), damping)

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """V by the solver of lineax from v0, or from zero where that is better."""
            begin = start(product, b, v0)
            leaves, structure = jax.tree.flatten(begin.unit)  # GMRES takes no pytree with empty containers

            def flat_product(leaves: list[Array]) -> list[Array]:
                return jax.tree.leaves(product(jax.tree.unflatten(structure, leaves)))

            multiply = as_spread(flat_product, leaves)

            def solve(unit: list[Array], v: list[Array]) -> tuple[list[Array], tuple[Scalar, Array]]:
                operator = lineax.FunctionLinearOperator(multiply, jax.eval_shape(lambda: unit), tags)
                options = {} if v0 is None else {"y0": v}
                solution = lineax.linear_solve(operator, unit, solver, options=options, throw=False)
                failed = solution.result != lineax.RESULTS.successful
                return solution.value, (solution.stats.get("num_steps", 1), failed)

            by_lineax = by_compiler(solve, (leaves, None))
            flat, (iterations, failed) = by_lineax(leaves, jax.tree.leaves(begin.v))
            left = norm(begin.r)
            solved = left <= jnp.finfo(left.dtype).eps  # BiCGStab divides zero by zero there
            v = optax.tree.where(solved, begin.v, jax.tree.unflatten(structure, flat))
            failed |= ~jnp.isfinite(norm(v))  # some solvers return NaN where they break down
            v = optax.tree.where(jnp.isfinite(norm(v)), v, zeros_like(v))
            hv = product(v)
            residual = norm(optax.tree.sub(begin.unit, hv))
            least = lower(smallest(left), dot(v, hv), dot(v, v))
            worse = ~(residual <= 1 + 16 * jnp.finfo(left.dtype).eps)
            v = optax.tree.where(worse, zeros_like(v), v)
            v = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(residual), leaf, jnp.nan), v)  # of an H with NaN
            residual = jnp.where(residual > 1, 1, residual)
            breakdown = (~solved & failed) | worse
            info = IHVPInfo(iterations, None, 0, residual, seen(least), breakdown)
            return optax.tree.cast_like(optax.tree.scale(begin.scale, v), b), info

        return apply, state

    return IHVP(stateless, prepare)
