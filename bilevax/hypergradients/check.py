"""The doctor: is this hypergradient right, and if not, why not?"""

import math
import textwrap
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax import checks
from bilevax.hypergradients import _reference as oracle
from bilevax.hypergradients._penalty import PenaltyDetail
from bilevax.hypergradients._two_phase import TwoPhaseInfo
from bilevax.problem import Batch, Hypergradient, IHVPInfo, Loss

SOLVED = 1e-8  # ‖∇_y g‖ of a solved inner problem, relative to ‖∇_y g‖ + 1 at the start
FLAT = 1e-10  # a smaller ratio of the curvatures is no minimum that is unique


class HypergradientReport(NamedTuple):
    """What `check_hypergradient` found; `print` shows it as a short page.

    Attributes:
      ok: whether the hypergradient is right to the tolerance.
      verdict: what is the matter, in plain words.
      remedy: what to do about it.
      relative_error: ‖grad − reference‖ / ‖reference‖.
      cosine: of the angle between the two.
      inner_error: the part of the relative error that comes from the y of the estimator not being y*(x): the same ratio
        for the exact implicit hypergradient at that y.
      solver_error: the rest: ‖grad − exact implicit hypergradient at the same y‖ / ‖reference‖.
      noise: relative standard deviation of the estimates of eight keys; NaN without a key.
      gradient_norm: ‖∇_y g‖ at the y of the estimator.
      reference_gradient_norm: ‖∇_y g‖ at y*(x).
      smallest_curvature: smallest eigenvalue of ∇²_yy g at y*(x) (Lanczos above 1,000 unknowns).
      largest_curvature: the largest one.
      estimator_curvature: the smallest eigenvalue at the y of the estimator.
      finite_difference_error: relative distance of the reference from a central difference of F along a direction.
      damping: the damping of the Hessian that explains the estimate best, where that is tried; NaN otherwise.
      grad: the estimate that was checked, a pytree like x.
      reference: the exact hypergradient, a pytree like x of NumPy arrays in float64.

    Example:
        >>> import bilevax as bx
        >>> bx.hypergradients.HypergradientReport._fields[:3]
        ('ok', 'verdict', 'remedy')
    """

    ok: bool
    verdict: str
    remedy: str
    relative_error: float
    cosine: float
    inner_error: float
    solver_error: float
    noise: float
    gradient_norm: float
    reference_gradient_norm: float
    smallest_curvature: float
    largest_curvature: float
    estimator_curvature: float
    finite_difference_error: float
    damping: float
    grad: chex.ArrayTree
    reference: chex.ArrayTree

    @property
    def condition(self) -> float:
        """The ratio of the largest to the smallest curvature; infinite where the smallest is not positive."""
        return self.largest_curvature / self.smallest_curvature if not self.smallest_curvature <= 0 else math.inf

    def __str__(self) -> str:
        """The page that `print` shows."""
        return (
            f"{'ok' if self.ok else 'WRONG'}: {self.verdict}\n"
            f"  relative error      {self.relative_error:.2g}   cosine {self.cosine:.6f}\n"
            f"    because of y      {self.inner_error:.2g}   of the derivative at that y {self.solver_error:.2g}"
            f"{'' if math.isnan(self.noise) else f'   of random draws {self.noise:.2g}'}\n"
            f"  ‖∇_y g‖             {self.gradient_norm:.2g}   at y* {self.reference_gradient_norm:.2g}\n"
            f"  curvature at y*     {self.smallest_curvature:.3g} to {self.largest_curvature:.3g}   "
            f"condition {self.condition:.3g}\n"
            f"  finite differences  agree with the reference to {self.finite_difference_error:.2g}\n"
            + textwrap.fill(f"remedy: {self.remedy}", 100, break_on_hyphens=False)
        )


def _double(tree: Any) -> Any:
    """The tree with every floating-point leaf in float64."""

    def widen(leaf: Any) -> Any:
        return jnp.asarray(leaf, float) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(widen, tree)


def check_hypergradient(
    outer_loss: Loss,
    inner_loss: Loss,
    x: chex.ArrayTree,
    y: chex.ArrayTree,
    batch: Batch,
    hypergradient: Hypergradient,
    *,
    key: chex.PRNGKey | None = None,
    state: Any = None,
    tol: float = 0.01,
) -> HypergradientReport:
    """Compares an estimate with the exact hypergradient, and tells what makes the difference.

        reference = ∇_x f − ∇²_xy g [∇²_yy g]⁻¹ ∇_y f  at y*(x)          error = (grad − reference) / ‖reference‖
                  = what is due to y ≠ y*(x)  +  what is due to the derivative at that y

    What `jax.test_util.check_grads` is to gradients: the first thing to run when a bilevel loop does not learn. In
    float64, whatever your numbers are, it solves the inner problem by a trust-region method from the y of the
    estimator, solves the linear system directly (above 1,000 inner unknowns by conjugate gradients), confirms the
    result by a central difference of F(x) = f(x, y*(x)), and then looks for the cause: an inner problem that is not
    solved, an indefinite or flat curvature, too few iterations, a damping or another curvature, an unroll that is too
    short, a penalty that is too weak, noise of random draws. It is meant for a small instance of your problem: no jit
    around it. The measure is y*(x): an unroll that is meant to stop early (MAML) is right in its own way, and wrong
    here. A loss must be the same function in float64: one that draws random numbers without a dtype, or computes in
    bfloat16, is not.

    Args:
      outer_loss: f, a function (x, y, batch) -> scalar.
      inner_loss: g, a function (x, y, batch) -> scalar.
      x: outer variable.
      y: inner variable where the estimator starts, without a `state`.
      batch: `Batch(outer, inner)`: all the data; what `hypergradient` draws from it is its own affair.
      hypergradient: the estimator to check, of the same losses.
      key: passed to `estimate`; with a key, eight estimates tell the noise.
      state: a state of `hypergradient` from your own loop, with its warm y and v; by default `init(x, y, batch)`.
      tol: relative error up to which the hypergradient counts as right.

    Returns:
      A `HypergradientReport`: `print` it, or assert its `ok`.

    Raises:
      ValueError: if a loss is not scalar, x or y is empty or not floating-point, the batch is no `Batch`, the
        hypergradient is no `Hypergradient`, or tol is not positive.

    Cost: a dense Hessian for each of some ten Newton steps, or for large y some thousand products.

    Reference: Grazzi et al., arXiv 2006.16218, for the split of the error into these two parts.

    Example:
        >>> import bilevax as bx, optax
        >>> inner_loss, outer_loss = lambda x, y, batch: (y - x) ** 2, lambda x, y, batch: (y - 1.0) ** 2
        >>> solver = bx.inner.implicit(inner_loss, optax.sgd(0.1), steps=3)
        >>> hypergrad = bx.hypergradient(outer_loss, solver)
        >>> report = bx.check_hypergradient(outer_loss, inner_loss, 3.0, 0.0, bx.Batch(None, None), hypergrad)
        >>> report.ok, report.verdict
        (False, 'the inner problem is not solved')
    """
    checks.instance("hypergradient", hypergradient, Hypergradient, "Pass, say, bx.hypergradient(outer_loss, solver).")
    checks.instance("batch", batch, Batch, "Pass bx.Batch(outer=..., inner=...).")
    checks.positive("tol", tol)
    checks.floating("x", x)
    checks.floating("y", y)
    outer_loss = checks.scalar_loss("outer_loss", outer_loss)
    inner_loss = checks.scalar_loss("inner_loss", inner_loss)
    state = hypergradient.init(x, y, batch) if state is None else state
    checks.has_y("hypergradient", state)
    estimate = jax.jit(hypergradient.estimate)
    grad, new_state, info = estimate(key, state, x, batch)
    keys = [] if key is None else [jax.random.fold_in(key, number) for number in range(7)]
    others = [estimate(key, state, x, batch)[0] for key in keys]
    values = [float(loss(x, state.y, data)) for loss, data in zip((outer_loss, inner_loss), batch, strict=True)]
    with jax.enable_x64(True):
        wide_x, wide_y, wide_batch = _double((x, state.y, batch))
        y0, unravel = ravel_pytree(wide_y)
        problem = oracle.flat_problem(outer_loss, inner_loss, unravel, wide_batch)
        wide_values = [float(problem.outer(wide_x, y0)[0]), float(problem.inner(wide_x, y0)[0])]
        y_T = np.asarray(ravel_pytree(_double(new_state.y))[0])
        report, start_norm = _measure(
            problem, wide_x, np.asarray(y0), y_T, [_flat(tree) for tree in (grad, *others)], tol
        )
        stuck = _stuck(state.y, new_state.y, unravel(problem.inner(wide_x, y_T)[1]), SOLVED * start_norm)
    report = report._replace(grad=grad)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves((new_state.y, grad)))
    same = np.allclose(values, wide_values, rtol=max(1e-4, 30 * eps), atol=1e-6, equal_nan=True)
    if not same:
        ok, verdict, remedy = _other_function(report, values, wide_values, tol)
    else:
        ok, verdict, remedy = _verdict(report, info, stuck, start_norm, tol)
    return report._replace(ok=ok, verdict=verdict, remedy=remedy)


def _flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(_double(tree))[0])


def _stuck(before: Any, after: Any, gradient: Any, threshold: float) -> list[str]:
    """The leaves of y that no inner step moved although their gradient is not zero, where others moved."""
    leaves = jax.tree_util.tree_leaves_with_path(after)
    pairs = zip(leaves, jax.tree.leaves(before), jax.tree.leaves(gradient), strict=True)
    still = [
        (f"y{jax.tree_util.keystr(path)}", np.array_equal(new, old), float(np.linalg.norm(np.ravel(slope))))
        for (path, new), old, slope in pairs
    ]
    if all(equal for _, equal, _ in still):
        return []
    return [name for name, equal, slope in still if equal and slope > threshold]


def _measure(
    problem: oracle.Problem, x: Any, y0: np.ndarray, y_T: np.ndarray, estimates: list[np.ndarray], tol: float
) -> tuple[HypergradientReport, float]:
    """All figures of the report, and 1 + ‖∇_y g‖ at the start."""
    start_norm = 1 + float(np.linalg.norm(problem.inner(x, y0)[1]))
    lower = float(problem.inner(x, y_T)[0]) <= float(problem.inner(x, y0)[0])
    solution = oracle.inner_solution(problem, x, y_T if lower else y0)
    at_solution, at_y_T = oracle.point_at(problem, x, solution), oracle.point_at(problem, x, y_T)
    reference, there, flat = at_solution.hypergradient(), at_y_T.hypergradient(), estimates[0]
    # Near a stationary x the two parts of the reference cancel: their rounding is no error of the estimate.
    scale = float(np.linalg.norm(reference) + 1e-6 * np.linalg.norm(at_solution.direct - reference)) or 1.0

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b)) / scale

    damping, left = math.nan, math.inf
    fits = flat.size >= 3 and y0.size <= oracle.DENSE  # some damping always matches one or two numbers
    if fits and distance(flat, there) > tol and at_y_T.largest > 0:
        damping, left = oracle.fitted_damping(at_y_T, flat)
    deviations = [float(np.linalg.norm(each - np.mean(estimates, axis=0))) for each in estimates]
    report = HypergradientReport(
        ok=False,
        verdict="",
        remedy="",
        relative_error=distance(flat, reference),
        cosine=float(flat @ reference / (np.linalg.norm(flat) * np.linalg.norm(reference) or 1.0)),
        inner_error=distance(there, reference),
        solver_error=distance(flat, there),
        noise=float(np.linalg.norm(deviations)) / math.sqrt(len(estimates) - 1) / scale
        if len(estimates) > 1
        else math.nan,
        gradient_norm=float(np.linalg.norm(at_y_T.gradient)),
        reference_gradient_norm=float(np.linalg.norm(at_solution.gradient)),
        smallest_curvature=at_solution.smallest,
        largest_curvature=at_solution.largest,
        estimator_curvature=at_y_T.smallest,
        finite_difference_error=oracle.finite_difference_error(problem, x, solution, reference, tol),
        damping=damping if left / scale < tol else math.nan,
        grad=(),
        reference=jax.tree.map(np.asarray, ravel_pytree(x)[1](jnp.asarray(reference))),
    )
    return report, start_norm


def _other_function(
    r: HypergradientReport, values: list[float], wide_values: list[float], tol: float
) -> tuple[bool, str, str]:
    return (
        r.relative_error <= tol,
        "a loss is another function in float64, so that the reference is not its own",
        f"f and g are {values[0]:.6g} and {values[1]:.6g} in your numbers, {wide_values[0]:.6g} and "
        f"{wide_values[1]:.6g} in float64. Draw random numbers with dtype=jnp.float32 (jax.random.bernoulli and "
        f"uniform draw others in float64), and check a float32 copy of a model that computes in half precision.",
    )


def _verdict(
    r: HypergradientReport, info: Any, stuck: list[str], start_norm: float, tol: float
) -> tuple[bool, str, str]:
    """The first of these that applies: the problem itself, then success, then the larger part of the error."""
    if not r.reference_gradient_norm <= SOLVED * start_norm:
        return (
            False,
            "the inner problem has no minimum that could be found",
            f"‖∇_y g‖ is still {r.reference_gradient_norm:.2g} after a trust-region method in float64. Check that g is "
            f"bounded below and smooth in y (not computed in half precision), and add a penalty such as l2 / 2 · ‖y‖².",
        )
    if r.smallest_curvature < -FLAT * r.largest_curvature:
        return (
            False,
            "the curvature is indefinite at a stationary point: y is at a saddle",
            f"The smallest curvature is {r.smallest_curvature:.2g}. Start y elsewhere (not where units are equal or "
            f"zero) and solve on.",
        )
    if r.smallest_curvature <= FLAT * r.largest_curvature:
        return (
            False,
            "the curvature is flat: y*(x) is not unique, and F has no gradient that does not depend on the start",
            f"The smallest curvature is {r.smallest_curvature:.2g}, the largest {r.largest_curvature:.2g}. Add a "
            f"penalty such as l2 / 2 · ‖y‖² to g, or differentiate the program that you run: inner.reverse.",
        )
    if r.finite_difference_error > tol:
        return (
            False,
            "the implicit hypergradient and a finite difference of F do not agree",
            "Check that f and g are smooth at y*, that g draws nothing at random, and that x enters g by no "
            "stop_gradient, rounding or sorting.",
        )
    if r.relative_error <= tol:
        return True, f"the hypergradient is right to {tol:g}", "none needed"
    if not math.isfinite(r.relative_error) and math.isfinite(r.gradient_norm):
        return (
            False,
            "the estimate is not finite, though y is",
            f"The linear solve diverges, or f is not finite. A step size of ihvp must be below 2 / "
            f"{r.largest_curvature:.2g} = {2 / r.largest_curvature:.2g}. Look at info.inner.detail, or take ihvp.cg.",
        )
    if not math.isfinite(r.relative_error):
        return (
            False,
            "the estimate is not finite",
            f"The inner steps diverge, or a loss is not finite: take a step size below 2 / {r.largest_curvature:.2g} "
            f"= {2 / r.largest_curvature:.2g} for plain gradient descent, and look at info.inner.",
        )
    return False, *_cause(r, _active(info), stuck, tol)


def _active(info: Any) -> Any:
    """The info of the estimator that ran, where there are two phases."""
    while isinstance(info, TwoPhaseInfo):
        info = info.second if info.phase else info.first
    return info


def _cause(r: HypergradientReport, info: Any, stuck: list[str], tol: float) -> tuple[str, str]:
    details = jax.tree.leaves(info, is_leaf=lambda node: isinstance(node, IHVPInfo | PenaltyDetail))
    solves = [detail for detail in details if isinstance(detail, IHVPInfo)]
    penalties = [detail for detail in details if isinstance(detail, PenaltyDetail)]
    if solves and r.estimator_curvature < 0:
        return (
            "the curvature is indefinite where the estimator stands",
            f"The smallest curvature there is {r.estimator_curvature:.2g}, at y* {r.smallest_curvature:.2g}: solve the "
            f"inner problem further, or take cg(curvature=bx.curvature.gauss_newton) or a damping above "
            f"{-r.estimator_curvature:.2g}.",
        )
    if r.noise > 0.5 * r.relative_error:
        return (
            "the noise of random draws is most of the error",
            "Draw larger batches (sample= of the inner steps and of the IHVP, cross_sample=), take smaller inner "
            "steps, more directions of a forward gradient or a guide for them, or average: a small outer step size "
            "does that too.",
        )
    if stuck:
        return (
            f"{', '.join(stuck)} does not move, but g depends on it",
            "The implicit rule takes all of y for solved. Leave frozen parts out of y (docs/recipes.md), or "
            "differentiate the program that you run: inner.reverse.",
        )
    if penalties and r.inner_error <= r.solver_error:
        return (
            "the penalty is biased",
            f"Its error is of order 1 / multiplier, and errors in y are multiplied by it: multiplier is "
            f"{float(penalties[0].multiplier):.3g}, ‖∇_y g‖ {r.gradient_norm:.2g}. Raise it, and the steps with it.",
        )
    if r.inner_error > r.solver_error:
        return (
            "the inner problem is not solved",
            f"‖∇_y g‖ is {r.gradient_norm:.2g}. Take more inner steps, keep y warm over the outer steps, or raise the "
            f"step size: plain gradient descent takes up to 2 / {r.largest_curvature:.2g} = "
            f"{2 / r.largest_curvature:.2g}.",
        )
    if not solves:
        return (
            "the unroll is too short",
            f"The derivative passes through too few steps for a condition number of {r.condition:.2g}. Take more "
            f"steps, or put a tail behind them: chain(implicit(...), reverse(...)).",
        )
    residual = float(solves[0].residual)
    if solves[0].breakdown:
        return (
            "the linear solver broke down",
            f"The residual is {residual:.2g}. A step size of ihvp must be below 2 / {r.largest_curvature:.2g} = "
            f"{2 / r.largest_curvature:.2g}; ihvp.cg needs none.",
        )
    if residual > tol / 2:
        iterations = math.ceil(math.sqrt(r.condition) / 2 * math.log(2 * math.sqrt(r.condition) / tol))
        return (
            "the linear system is not solved: too few iterations",
            f"The residual is {residual:.2g} after {float(solves[0].iterations):.0f}. A condition number of "
            f"{r.condition:.2g} takes cg at most {iterations} iterations; give it more, or a preconditioner.",
        )
    if math.isnan(residual):
        return (
            "the inverse Hessian is replaced by a crude approximation",
            "It solves no linear system. Take ihvp.cg, and this one as its preconditioner=.",
        )
    if r.cosine**2 > 1 - 1e-6 and np.size(ravel_pytree(r.reference)[0]) >= 3:
        return (
            "the estimate is a multiple of the hypergradient",
            "Its direction is right, its length or its sign is not: look for a lost factor between the losses of the "
            "estimator and these, such as a sum for a mean.",
        )
    if math.isfinite(r.damping):
        return (
            "another system was solved: the damping is too large",
            f"The estimate is that of a damping of about {r.damping:.2g}, where the smallest curvature is "
            f"{r.smallest_curvature:.2g}. Take a damping well below that.",
        )
    return (
        "another system was solved: the curvature is not the Hessian",
        f"The residual is small, {residual:.2g}, but of a different matrix: a Gauss–Newton curvature, a batch of its "
        f"own, or a damping. Take curvature=bx.curvature.hessian at a solved inner problem.",
    )
