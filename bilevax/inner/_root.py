"""The inner solution as a root of equations: optimality conditions, equilibria, discretized differential equations."""

import optax

from bilevax import checks
from bilevax.carried import parameters
from bilevax.inner._equation import Equation, LinearSolve, equation, own_solve
from bilevax.inner._optimizer_steps import Initial, Solve
from bilevax.printing import as_called
from bilevax.problem import InnerSolver, Loss
from bilevax.typing import PyTree, Scalar


@as_called
def root(
    residual: Equation,
    solve: Solve,
    *,
    inner_loss: Loss | None = None,
    initial: Initial | None = None,
    linear_solve: LinearSolve | None = None,
    maxiter: int = 1000,
    tol: Scalar = 1e-6,
    warm_start: bool = True,
) -> InnerSolver:
    """Takes the y of your own solver for a root of r(x, y) = residual(x, y, batch), and differentiates it implicitly.

        r(x, y) = 0          (∂r/∂y)ᵀ u = y_bar          x_bar = −(∂r/∂x)ᵀ u,   z0_bar = 0

    Right where r(x, y) = 0 and ∂r/∂y is invertible; it need not be symmetric. For optimality conditions with
    constraints stack the primal and the dual variables, y = {"primal": ..., "dual": ...}, and the residuals alike. A
    general equation has no iteration that is safe to build in: where y = T(x, y) has one, use `inner.fixed_point`.

    Args:
      residual: r, a function (x, y, batch) -> pytree like y.
      solve: your own solver `solve(x, y0, batch) -> y`, any jittable function, such as Newton's method.
      inner_loss: g, for the report alone. Without it `info.inner_loss` is ½ ‖r(x, y)‖² and `info.gradient_norm` is
        ‖r(x, y)‖.
      initial: y_0 as a function of x; by default y_0 is the warm y.
      linear_solve: your own `linear_solve(product, b, u0) -> u` in place of GMRES, such as one of
        `jax.scipy.sparse.linalg` or lineax; u0 is the warm u, or None.
      maxiter: most iterations of GMRES.
      tol: GMRES is done at a residual of tol ‖y_bar‖.
      warm_start: whether u starts from that of the previous outer step.

    Returns:
      An `InnerSolver` with state `EquationState(u)` and `info.detail` an `EquationInfo`. `info.breakdown` is True where
      the residual of u is above √tol ‖y_bar‖, or something is not finite. A residual r has no unit that it could be
      compared with: look at `detail.residual` = ‖r(x, y)‖ yourself.

    Raises:
      ValueError: if maxiter < 1, tol is negative, or r or `solve` returns a pytree unlike y.

    Cost: one r, one pull-back of r for each iteration of GMRES (`detail.products`), and one more; at most 21 vectors
    like y. What `solve` does is not counted. `info.calls` counts the gradient of g for the report alone.

    Reference: Blondel et al., "Efficient and modular implicit differentiation", arXiv 2105.15183. GMRES: Saad and
    Schultz, 1986.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp
        >>> solver = bx.inner.root(lambda x, y, batch: y**3 - x, solve=lambda x, y0, batch: jnp.cbrt(x))
        >>> round(float(jax.grad(bx.differentiable(solver))(8.0, 1.0, None)), 4)
        0.0833
    """
    maxiter = checks.count("maxiter", maxiter, minimum=1)
    checks.function("residual", residual, "x", "y", "batch")

    def checked(x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
        value, params = residual(x, y, batch), parameters(y)
        fix = "Return from residual(x, y, batch) a pytree like y, like y.params of a bx.inner.Carried."
        checks.same_shapes("y under residual", value, params, fix)
        return optax.tree.cast_like(value, params)

    return equation(
        checked,
        own_solve(solve),
        relative=False,
        inner_loss=inner_loss,
        initial=initial,
        linear_solve=linear_solve,
        maxiter=maxiter,
        tol=tol,
        warm_start=warm_start,
    )
