"""The doctor: is this hypergradient right, and if not, why not?"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax import checks
from bilevax.hypergradients._causes import Findings, diagnosed
from bilevax.hypergradients._checked import check_hypergrad, estimated
from bilevax.hypergradients._penalty import PenaltyDetail
from bilevax.hypergradients._reference import (
    FlatProblem,
    LocalModel,
    finite_difference_error,
    fitted_damping,
    flat_problem,
    inner_solution,
    local_model,
)
from bilevax.hypergradients._report import HypergradientReport
from bilevax.hypergradients._two_phase import TwoPhaseInfo
from bilevax.problem import Batch, BilevelProblem, Hypergradient, IHVPInfo
from bilevax.typing import Key, PyTree

SOLVED = 1e-8  # ‖∇_y g‖ of a solved inner problem, relative to ‖∇_y g‖ + 1 at the start


def _double(tree: PyTree) -> PyTree:
    """The tree with every floating-point leaf in float64."""

    def widen(leaf: Any) -> Any:
        return jnp.asarray(leaf, float) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(widen, tree)


def check_hypergradient(
    problem: BilevelProblem,
    x: PyTree,
    y: PyTree,
    batch: Batch,
    hypergrad: Hypergradient,
    *,
    key: Key | None = None,
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
      problem: f and g, functions (x, y, batch) -> scalar.
      x: outer variable.
      y: inner variable where the estimator starts, without a `state`.
      batch: `Batch(outer, inner)`: all the data; what `hypergrad` draws from it is its own affair.
      hypergrad: the estimator to check, of the same losses.
      key: passed to `estimate`; with a key, eight estimates tell the noise.
      state: a state of `hypergrad` from your own loop, with its warm y and v; by default `init(x, y, batch)`.
      tol: relative error up to which the hypergradient counts as right.

    Returns:
      A `HypergradientReport`: `print` it, or assert its `ok`.

    Raises:
      ValueError: if problem is no `BilevelProblem`, a loss is not scalar, x or y is empty or not floating-point, the
        batch is no `Batch`, hypergrad is no `Hypergradient`, or tol is not positive.

    Cost: a dense Hessian for each of some ten Newton steps, or for large y some thousand products.

    Reference: Grazzi et al., arXiv 2006.16218, for the split of the error into these two parts.

    Example:
        >>> import bilevax as bx, optax
        >>> problem = bx.BilevelProblem(lambda x, y, batch: (y - 1.0) ** 2, lambda x, y, batch: (y - x) ** 2)
        >>> solver = bx.inner.implicit(problem.inner_loss, optax.sgd(0.1), steps=3)
        >>> hypergrad = bx.hypergradient(problem.outer_loss, solver)
        >>> report = bx.check_hypergradient(problem, 3.0, 0.0, bx.Batch(None, None), hypergrad)
        >>> report.ok, report.verdict
        (False, 'the inner problem is not solved')
    """
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    check_hypergrad("hypergrad", hypergrad)
    checks.instance("batch", batch, Batch, "Pass bx.Batch(outer=..., inner=...).")
    checks.positive("tol", tol)
    checks.floating("x", x)
    checks.floating("y", y)
    outer_loss = checks.scalar_loss("outer_loss", problem.outer_loss)
    inner_loss = checks.scalar_loss("inner_loss", problem.inner_loss)
    state = hypergrad.init(x, y, batch) if state is None else state
    checks.has_y("hypergrad", state)
    estimate = jax.jit(hypergrad.estimate)
    grad, new_state, info = estimated(estimate(key, state, x, batch), x, state)
    keys = [] if key is None else [jax.random.fold_in(key, number) for number in range(7)]
    others = [estimate(key, state, x, batch)[0] for key in keys]
    values = [float(loss(x, state.y, data)) for loss, data in zip((outer_loss, inner_loss), batch, strict=True)]
    with jax.enable_x64(True):
        wide_x, wide_y, wide_batch = _double((x, state.y, batch))
        y0, unravel = ravel_pytree(wide_y)
        flat = flat_problem(outer_loss, inner_loss, unravel, wide_batch)
        wide_values = [float(flat.outer(wide_x, y0)[0]), float(flat.inner(wide_x, y0)[0])]
        start, y_T = np.asarray(y0), _flat(new_state.y)
        figures = _measure(flat, wide_x, start, y_T, [_flat(tree) for tree in (grad, *others)], tol)
        solved = SOLVED * (1 + float(np.linalg.norm(flat.inner(wide_x, start)[1])))
        stuck = _stuck(state.y, new_state.y, unravel(flat.inner(wide_x, y_T)[1]), solved)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves((new_state.y, grad)))
    same = np.allclose(values, wide_values, rtol=max(1e-4, 30 * eps), atol=1e-6, equal_nan=True)
    solves, penalties = _details(info)
    figures = figures._replace(grad=grad)
    return diagnosed(Findings(figures, tol, solved, values, wide_values, same, stuck, solves, penalties))


def _flat(tree: PyTree) -> np.ndarray:
    return np.asarray(ravel_pytree(_double(tree))[0])


def _stuck(before: PyTree, after: PyTree, gradient: PyTree, threshold: float) -> list[str]:
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


def _details(info: Any) -> tuple[list[IHVPInfo], list[PenaltyDetail]]:
    """What the IHVPs and the penalties of the estimator report; of two phases, those of the one that ran."""
    while isinstance(info, TwoPhaseInfo):
        info = info.second if info.phase else info.first
    details = jax.tree.leaves(info, is_leaf=lambda node: isinstance(node, IHVPInfo | PenaltyDetail))
    solves = [detail for detail in details if isinstance(detail, IHVPInfo)]
    return solves, [detail for detail in details if isinstance(detail, PenaltyDetail)]


def _measure(
    problem: FlatProblem, x: PyTree, y0: np.ndarray, y_T: np.ndarray, estimates: list[np.ndarray], tol: float
) -> HypergradientReport:
    """All figures of the report."""
    lower = float(problem.inner(x, y_T)[0]) <= float(problem.inner(x, y0)[0])
    solution = inner_solution(problem, x, y_T if lower else y0)
    at_solution, at_y_T = local_model(problem, x, solution), local_model(problem, x, y_T)
    reference, there, flat = at_solution.hypergradient(), at_y_T.hypergradient(), estimates[0]
    # Near a stationary x the two parts of the reference cancel: their rounding is no error of the estimate.
    scale = float(np.linalg.norm(reference) + 1e-6 * np.linalg.norm(at_solution.direct - reference)) or 1.0

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b)) / scale

    return HypergradientReport(
        ok=False,
        verdict="",
        remedy="",
        relative_error=distance(flat, reference),
        cosine=float(flat @ reference / (np.linalg.norm(flat) * np.linalg.norm(reference) or 1.0)),
        inner_error=distance(there, reference),
        solver_error=distance(flat, there),
        noise=_deviation(estimates) / scale,
        gradient_norm=float(np.linalg.norm(at_y_T.gradient)),
        reference_gradient_norm=float(np.linalg.norm(at_solution.gradient)),
        smallest_curvature=at_solution.smallest,
        largest_curvature=at_solution.largest,
        estimator_curvature=at_y_T.smallest,
        finite_difference_error=finite_difference_error(problem, x, solution, reference, tol),
        damping=_damping(at_y_T, flat, scale, tol) if distance(flat, there) > tol else math.nan,
        grad=(),
        reference=jax.tree.map(np.asarray, ravel_pytree(x)[1](jnp.asarray(reference))),
    )


def _deviation(estimates: list[np.ndarray]) -> float:
    """The standard deviation of estimates around their mean; NaN of a single one."""
    if len(estimates) == 1:
        return math.nan
    deviations = [float(np.linalg.norm(each - np.mean(estimates, axis=0))) for each in estimates]
    return float(np.linalg.norm(deviations)) / math.sqrt(len(estimates) - 1)


def _damping(point: LocalModel, grad: np.ndarray, scale: float, tol: float) -> float:
    """The damping whose implicit hypergradient at this point is that estimate, to the tolerance; NaN where none is."""
    damping, left = fitted_damping(point, grad)
    return damping if left / scale < tol else math.nan
