"""Implicit differentiation of the inner solution."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import parameters
from bilevax.curvature.model_loss import held
from bilevax.curvature.products import Product
from bilevax.ihvp._cg import cg
from bilevax.ihvp._checked import check_ihvp, prepared
from bilevax.inner._once import once
from bilevax.inner._optimizer_steps import (
    Begin,
    Initial,
    Optimizer,
    Solve,
    Watched,
    check_point,
    diverged,
    optimizer_steps,
    solution,
    step_keys,
    watch,
)
from bilevax.inner._transposed import moved_along, transposed
from bilevax.inner._unread import on_leaves_read
from bilevax.meshes import dot, zeros_like
from bilevax.printing import as_called, by_shape
from bilevax.problem import (
    IHVP,
    Calls,
    IHVPInfo,
    InnerGradient,
    InnerSolver,
    Iterate,
    Loss,
    SolverInfo,
    added,
    arrays,
    inner_gradient,
    norm,
    widen,
)
from bilevax.sampling import Sample, counted_from, full
from bilevax.typing import Array, Key, PyTree

FAR = 1e-2  # of ‖y‖: at such a distance from a stationary point the implicit rule is wrong
NEAR = 1e-4  # of that distance: steps that go no further have stopped
DIVERGED = 10  # a residual ‖b − H v‖ / ‖b‖ above it; the noise of batches is smaller


class ImplicitState(NamedTuple):
    """What `implicit` keeps: the last v (None without warm start) and the state of its IHVP.

    Example:
        >>> import bilevax as bx
        >>> bx.inner.implicit(lambda x, y, batch: (y - x) ** 2).init(1.0, 2.0).v.item()
        0.0
    """

    v: PyTree | None
    ihvp: Any

    def __repr__(self) -> str:
        return by_shape(self)


class ImplicitResidual(NamedTuple):
    """Where the inner problem was solved, and the keys of what is drawn there."""

    ihvp_key: Key | None
    cross_key: Key | None
    x: PyTree
    begin: Begin
    z: Iterate
    moved: Array | None
    batch: PyTree


@as_called
def implicit(
    inner_loss: Loss,
    optimizer: Optimizer | None = None,
    steps: int | None = None,
    *,
    ihvp: IHVP | None = None,
    solve: Solve | None = None,
    initial: Initial | None = None,
    sample: Sample = full,
    cross_sample: Sample = full,
    warm_start: bool = True,
) -> InnerSolver:
    """Solves the inner problem, and differentiates its solution by the implicit function theorem.

        y ≈ y*(x)          [∇²_yy g] v = y_bar          x_bar = −∇²_xy g · v,   z0_bar = 0

    Right where ∇_y g(x, y) = 0 and ∇²_yy g is positive definite; `info.gradient_norm` and `info.detail` say how far
    that is from true. Where y stops at a constraint or a kink instead (its last step is next to nothing, while ∇_y g
    points far away), `info.breakdown` is True: there take `inner.fixed_point` of the step. A `solve` is seen to stop
    when it is called again from the y that it found, in the second outer step at the earliest. A leaf of y that g does
    not read has no part in it. Only x in g counts: derivatives with respect to a learned step size, or to `initial`,
    are zero.

    Args:
      inner_loss: g, a function (x, y, batch) -> scalar.
      optimizer: any optax transformation, or a function x ↦ transformation; needed when steps > 0.
      steps: inner steps before the derivative, >= 0. With 0, or without an optimizer, the y of your own loop is taken
        as it is.
      ihvp: the inverse-Hessian-vector product; by default `ihvp.cg()`.
      solve: your own solver `solve(x, y0, batch) -> y` in place of the steps; any jittable function.
      initial: y_0 as a function of x; by default y_0 is the warm y.
      sample: how inner step t draws its batch from the data.
      cross_sample: how the batch of the cross term and of the report is drawn, with the t of the last step. The IHVP
        has its own, which begins at t = 0.
      warm_start: whether the IHVP starts from the v of the previous outer step, unless that solve broke down.

    Returns:
      An `InnerSolver` with state `ImplicitState(v, ihvp)`.

    Raises:
      ValueError: if steps is negative, steps or the optimizer comes without the other, both `solve` and steps are
        given, or a later link of a `chain` sends back a derivative of a momentum or another optimizer state.
      TypeError: when an estimate of `hypergradient` is differentiated; the solve of `differentiable` can be.

    Cost: `steps` gradients, the products of the IHVP, one gradient and one pull-back for the cross term. Memory does
    not grow with steps. What `solve` does is not counted; one more gradient tells whether it diverged.

    Reference: Pedregosa, arXiv 1602.02355; Lorraine, Vicol, Duvenaud, arXiv 1911.02590, theorem 1; Rajeswaran et al.
    (iMAML), arXiv 1909.04630.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> loss = lambda x, y, batch: 0.5 * (y - x) ** 2
        >>> solve = bx.differentiable(bx.inner.implicit(loss, optax.sgd(1.0), steps=1, ihvp=bx.ihvp.exact()))
        >>> float(jax.jit(jax.grad(lambda x: solve(x, 0.0, None) ** 2))(3.0))
        6.0
    """
    if steps is None and optimizer is not None:
        raise ValueError(
            "steps must be given with an optimizer; got None. Pass, say, steps=10, or 0 to take y as it is."
        )
    steps = checks.count("steps", 0 if steps is None else steps)
    if steps and optimizer is None:
        raise ValueError(
            f"optimizer must be given for steps > 0; got None with steps={steps}. Pass, say, optax.sgd(0.1)."
        )
    if steps and solve is not None:
        raise ValueError(f"solve replaces the steps of the optimizer; got solve and steps={steps}. Drop one of them.")
    run = optimizer_steps(inner_loss, optax.identity() if optimizer is None else optimizer, initial, sample)
    solver = cg() if ihvp is None else ihvp
    check_ihvp("ihvp", solver, "Pass, say, bx.ihvp.cg(maxiter=10), called.")
    checks.function("cross_sample", cross_sample, "key", "t", "data")
    if solve is not None:
        checks.function("solve", solve, "x", "y0", "batch")
    gradients = steps + 1 + (solve is not None)  # of g: in each step, and before and after those of `solve`

    def init(x: PyTree, y: PyTree, batch: PyTree = None) -> ImplicitState:
        """The first v, 0 like y (None without warm start), and what the IHVP keeps for this inner data."""
        check_point(x, y)
        params = parameters(y)
        v = zeros_like(arrays(params)) if warm_start else None
        return ImplicitState(v, solver.init(x, params, batch, held(inner_loss, y)))

    def forward(
        key: Key | None, state: ImplicitState, x: PyTree, z: Iterate, batch: PyTree
    ) -> tuple[Iterate, ImplicitResidual, ImplicitState]:
        """The z after the steps, or with the y of `solve`; the state waits for `backward`."""
        keys = step_keys(key)
        before = parameters(z.y)
        if solve is None:

            def step(carry: tuple[Watched, PyTree], _: None) -> tuple[tuple[Watched, PyTree], None]:
                return (run.watched_step(keys.steps, batch, x, carry[0]), parameters(carry[0].z.y)), None

            ((z, begin), before), _ = jax.lax.scan(step, (watch(z), before), length=steps)
        else:
            begin = Begin(jnp.asarray(True), *run.report(keys.steps, batch, x, z))
            z = z._replace(y=solution(solve(x, z.y, batch), z.y))
        moved = _length(optax.tree.sub(parameters(z.y), before)) if steps or solve is not None else None
        return z, ImplicitResidual(keys.ihvp, keys.cross, x, begin, z, moved, batch), state

    def backward(
        residual: ImplicitResidual, state: ImplicitState, z_bar: Iterate
    ) -> tuple[tuple[PyTree, Iterate], ImplicitState, SolverInfo]:
        """x_bar = −∇²_xy g · v like x, and zeros like y; the state keeps v like y for the next outer step."""
        ihvp_key, cross_key, x, begin, z, moved, batch = residual
        loss = held(inner_loss, z.y)
        x, y, y_bar = once("inner.implicit", (x, parameters(z.y), z_bar.y))
        moments = [bar for bar in jax.tree.leaves(z_bar.opt_state) if bar.dtype != jax.dtypes.float0]
        if moments:
            raise ValueError(
                f"optimizer of inner.implicit must keep no momentum where another link follows in a chain; got a "
                f"state with {len(moments)} floating-point arrays, whose derivative the implicit rule would drop. "
                f"Use optax.sgd without momentum in both links, or inner.reverse."
            )
        drawn = cross_sample(cross_key, jnp.maximum(z.t - 1, 0), batch)
        inner = inner_gradient(loss, x, y, drawn)
        b = on_leaves_read(y_bar, loss, x, y, drawn)
        with counted_from(None):  # the samplers of an IHVP begin at 0
            parts = solver.prepare(ihvp_key, state.ihvp, loss, (x, y, batch))
            apply, ihvp_state = prepared("ihvp", parts, state.ihvp)
            v, ihvp_info = _checked(apply(b, state.v), b)
        x_bar = optax.tree.scale(-1, inner.pull_back(v)[0])
        products = added(ihvp_info.products, ihvp_info.setup_products)
        calls = Calls(0, gradients + ihvp_info.setup_gradients, products, 1)
        size = norm(inner.gradient)
        lost = ~jnp.isfinite(inner.loss + size) | diverged(begin, inner.loss, size)
        if moved is not None:
            lost |= _stuck(moved, _length(y), size * _length(v), _length(b), by_steps=solve is None)
        breakdown = ihvp_info.breakdown | lost
        info = SolverInfo(inner.loss, size, breakdown, calls, ihvp_info)
        kept = optax.tree.where(ihvp_info.breakdown, zeros_like(v), v) if warm_start else None
        state = ImplicitState(kept, ihvp_state)
        return (x_bar, Iterate(zeros_like(y))), state, info

    def tangent(key: Key | None, x: PyTree, y: PyTree, batch: PyTree, x_dot: PyTree) -> PyTree:
        """y_dot = −[∇²_yy g]⁻¹ ∇²_yx g x_dot by the IHVP; to be differentiated with the Hessian itself."""
        keys, loss, params = step_keys(key), held(inner_loss, y), parameters(y)

        def drawn(batch: PyTree) -> PyTree:
            return cross_sample(keys.cross, jnp.asarray(max(steps - 1, 0), jnp.int32), batch)

        def gradient(x: PyTree, params: PyTree, batch: PyTree) -> InnerGradient:
            return inner_gradient(loss, x, params, drawn(batch))

        def invert(product: Product, b: PyTree) -> PyTree:
            at = jax.lax.stop_gradient((x, params, batch))
            kept = solver.init(*at, loss)
            apply, _ = prepared("ihvp", solver.prepare(keys.ihvp, kept, loss, at), kept)
            b = on_leaves_read(b, loss, x, params, drawn(batch))
            return _checked(apply(b), b)[0]

        def cross(x: PyTree, params: PyTree, batch: PyTree, x_dot: PyTree) -> PyTree:
            return transposed(lambda v: gradient(x, params, batch).pull_back(v)[0], params, x_dot)

        b = jax.checkpoint(cross, prevent_cse=False)(x, params, batch, x_dot)  # nothing is kept for the way back
        b = moved_along(b, x_dot)
        v = jax.lax.custom_linear_solve(lambda v: gradient(x, params, batch).pull_back(v)[1], b, invert, symmetric=True)
        return optax.tree.scale(-1, v)

    return InnerSolver(init, run.start, forward, backward, fresh=initial is not None, tangent=tangent)


def _length(tree: PyTree) -> Array:
    """The Euclidean norm, quicker than `norm` and without its care for tiny and huge numbers."""
    wide = widen(tree)
    return jnp.sqrt(dot(wide, wide))


def _stuck(moved: Array, size: Array, steepness: Array, curved: Array, by_steps: bool) -> Array:
    """Whether y stays where it is although ∇_y g points away from there, as at a constraint or a kink.

    By the curvature along v, ‖y_bar‖ / ‖v‖, the stationary point is ‖∇_y g‖ ‖v‖ / ‖y_bar‖ away: here more than 1 % of
    ‖y‖, of which the last step went less than one part in 10⁴, and 10⁻⁶ ‖y‖. A `solve` is judged by the whole way from
    its y0, which is all that costs nothing.
    """
    far = steepness > FAR * size * curved
    near = moved <= NEAR * FAR * size if by_steps else moved * curved <= NEAR * steepness
    return far & near


def _checked(applied: Any, b: PyTree) -> tuple[PyTree, IHVPInfo]:
    """What an inverse-Hessian-vector product returns for b, if it is what it should be.

    Zero where that diverged; but what is not finite stays so, and is seen.
    """
    v, info = checks.parts("apply of ihvp.prepare", applied, "v", "info")
    checks.same_form("v of ihvp.prepare", v, b, "Return v like b: optax.tree.cast_like(v, b).")
    checks.instance("info of ihvp.prepare", info, IHVPInfo, "Return bx.problem.IHVPInfo(...) beside v.")
    if info.residual is None:
        return v, info
    diverging = info.breakdown & (info.residual > DIVERGED) & jnp.isfinite(info.residual)
    return optax.tree.where(diverging, zeros_like(v), v), info
