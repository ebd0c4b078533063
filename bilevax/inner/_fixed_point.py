"""The inner solution as a fixed point, also where it is no stationary point of a loss."""

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import parameters, with_parameters
from bilevax.inner._equation import Equation, LinearSolve, equation, own_solve
from bilevax.inner._optimizer_steps import Initial, Solve, solution
from bilevax.printing import as_called
from bilevax.problem import InnerSolver, Loss, norm
from bilevax.typing import Array, PyTree, Scalar


@as_called
def fixed_point(
    step: Equation,
    *,
    inner_loss: Loss | None = None,
    solve: Solve | None = None,
    rate: Scalar = 1.0,
    initial: Initial | None = None,
    linear_solve: LinearSolve | None = None,
    maxiter: int = 1000,
    tol: Scalar = 1e-6,
    warm_start: bool = True,
) -> InnerSolver:
    """Solves y = T(x, y), T(x, y) = step(x, y, batch), and differentiates the solution implicitly.

        y ← y + rate (T(x, y) − y)          (I − ∂T/∂y)ᵀ u = y_bar          x_bar = (∂T/∂x)ᵀ u,   z0_bar = 0

    Right wherever T is differentiable at y, and I − ∂T/∂y is invertible. That covers inner problems with constraints
    and kinks, whose solution is no stationary point of g: T is a projected or proximal gradient step of any length
    (`optax.projections` has boxes, simplices and balls). It covers layers in equilibrium as well, with Anderson's or
    Broyden's method as `solve`. ∂T/∂y need not be symmetric: u is found by GMRES, from pull-backs of T alone.

    Args:
      step: T, a function (x, y, batch) -> y.
      inner_loss: g, for the report alone. Without it `info.inner_loss` is ½ ‖y − T(x, y)‖² and `info.gradient_norm`
        is ‖y − T(x, y)‖.
      solve: your own solver `solve(x, y0, batch) -> y` in place of the built-in iteration; any jittable function.
      rate: in the built-in iteration, in (0, 1]; below 1 where T is no contraction.
      initial: y_0 as a function of x; by default y_0 is the warm y.
      linear_solve: your own `linear_solve(product, b, u0) -> u` in place of GMRES, such as one of
        `jax.scipy.sparse.linalg` or lineax; u0 is the warm u, or None.
      maxiter: most iterations of the built-in iteration, and of GMRES.
      tol: either is done at a residual of tol: ‖y − T(x, y)‖ relative to the larger of ‖y_0‖ and ‖y‖, and that of u
        relative to ‖y_bar‖.
      warm_start: whether u starts from that of the previous outer step.

    Returns:
      An `InnerSolver` with state `EquationState(u)` and `info.detail` an `EquationInfo`. `info.breakdown` is True where
      one of the two residuals is above √tol, or something is not finite.

    Raises:
      ValueError: if maxiter < 1, tol is negative, rate is not in (0, 1], or T or `solve` returns a pytree unlike y.

    Cost: one T for each iteration (`detail.iterations`) and one more; one T and one pull-back of it for u, and one
    pull-back for each iteration of GMRES (`detail.products`); at most 21 vectors like y. What `solve` does is not
    counted. `info.calls` counts the gradient of g for the report, and nothing that T does.

    Reference: Bai, Kolter, Koltun, "Deep equilibrium models", arXiv 1909.01377; Bertrand et al., "Implicit
    differentiation for fast hyperparameter selection in non-smooth convex learning", arXiv 2105.01637; Blondel et al.,
    arXiv 2105.15183. GMRES: Saad and Schultz, 1986.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> step = lambda x, y, batch: jnp.maximum(y - 0.5 * (y - x), 0.0)  # towards x, and y >= 0
        >>> solve = bx.differentiable(bx.inner.fixed_point(step))
        >>> (jax.jacobian(solve)(jnp.array([2.0, -3.0]), jnp.ones(2), None).round(4) + 0.0).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    checks.scalar("rate", rate)
    checks.fraction("rate", rate)
    maxiter = checks.count("maxiter", maxiter, minimum=1)
    checks.function("step", step, "x", "y", "batch")

    def missing(x: PyTree, y: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        """T(x, y) − y, and y with what T carries on."""
        moved = solution(step(x, y, batch), y, "step", "y")
        return optax.tree.sub(parameters(moved), parameters(y)), with_parameters(moved, parameters(y))

    def residual(x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
        return optax.tree.scale(-1, missing(x, y, batch)[0])

    def iterate(x: PyTree, y0: PyTree, batch: PyTree) -> tuple[PyTree, Array]:
        size = norm(parameters(y0))

        def unfinished(carry: tuple[PyTree, PyTree, Array]) -> Array:
            y, change, iterations = carry
            return (iterations < maxiter) & (norm(change) > tol * jnp.maximum(size, norm(parameters(y))))

        def improve(carry: tuple[PyTree, PyTree, Array]) -> tuple[PyTree, PyTree, Array]:
            y, change, iterations = carry
            params = optax.tree.cast_like(optax.tree.add_scale(parameters(y), rate, change), parameters(y))
            change, y = missing(x, with_parameters(y, params), batch)
            return y, change, iterations + 1

        change, y = missing(x, y0, batch)
        begin = y, change, jnp.zeros((), jnp.int32)
        y, change, iterations = jax.lax.while_loop(unfinished, improve, begin)
        params, stuck = parameters(y), jnp.isnan(norm(change))  # the reason why it stopped
        return with_parameters(y, optax.tree.where(stuck, optax.tree.add(params, change), params)), iterations

    run = iterate if solve is None else own_solve(solve)
    return equation(
        residual,
        run,
        relative=True,
        inner_loss=inner_loss,
        initial=initial,
        linear_solve=linear_solve,
        maxiter=maxiter,
        tol=tol,
        warm_start=warm_start,
    )
