"""The doctor: is this hypergradient right, and if not, why not?"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.carried import carrying, parameters, with_parameters
from bilevax.hypergradients._causes import diagnosed
from bilevax.hypergradients._checked import check_hypergrad, estimated
from bilevax.hypergradients._examination import examined
from bilevax.hypergradients._patient import Clock, Patient
from bilevax.hypergradients._report import HypergradientReport
from bilevax.problem import Batch, BilevelProblem, Hypergradient
from bilevax.typing import Array, Key, PyTree


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
    budget: float = 300.0,
    progress: Callable[[str], Any] | None = None,
) -> HypergradientReport:
    """Compares an estimate with the exact hypergradient, and tells what makes the difference.

        reference = ∇_x f − ∇²_xy g [∇²_yy g]⁻¹ ∇_y f  at y*(x)          error = (grad − reference) / ‖reference‖
                  = what is due to y ≠ y*(x)  +  what is due to the derivative at that y

    What `jax.test_util.check_grads` is to gradients: the first thing to run when a bilevel loop does not learn. In
    float64, whatever your numbers are, it solves the inner problem by a trust-region method from the y of the
    estimator, solves the linear system directly (above 1,000 inner unknowns by conjugate gradients), and confirms the
    result by central differences of F(x) = f(x, y*(x)). An estimate may be right in its own way: it is also compared
    with central differences of f(x, y_T(x)), the run itself, of which an unroll is the exact derivative, whether it
    stops early (MAML) or at a constraint. Where neither fits, it looks for the cause: what is not finite first, steps
    that diverge, an inner problem that is not solved, an indefinite or flat curvature, too few iterations, a damping or
    another curvature, an unroll that is too short, a penalty that is too weak, a stale memory, noise of random draws.
    Differences have the last word: there is no relative error to a reference that they contradict.

    It is meant for a small instance of your problem: no jit around it. A loss must be the same function in float64: one
    that draws random numbers without a dtype, or computes in bfloat16, is not.

    Args:
      problem: f and g, functions (x, y, batch) -> scalar.
      x: outer variable.
      y: inner variable where the estimator starts, without a `state`.
      batch: `Batch(outer, inner)`: all the data; what `hypergrad` draws from it is its own affair.
      hypergrad: the estimator to check, of the same losses.
      key: passed to `estimate`; with a key, eight estimates tell the noise.
      state: a state of `hypergrad` from your own loop, with its warm y, v and optimizer; by default
        `init(x, y, batch)`.
      tol: relative error up to which the hypergradient counts as right.
      budget: seconds after which no further part is begun, so that the last one may overrun it; what is left out is NaN
        in the report.
      progress: called with a line about each part before it begins: `print`.

    Returns:
      A `HypergradientReport`: `print` it, or assert its `ok`.

    Raises:
      ValueError: if problem is no `BilevelProblem`, a loss is not scalar, x or y is empty or not floating-point, the
        batch is no `Batch`, hypergrad is no `Hypergradient`, tol or budget is not positive, or progress cannot be
        called.

    Cost: some ten compiled programs, some tens of runs of the inner steps, two dense Hessians; for large y some
    thousand products.

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
    checks.positive("budget", budget)
    if progress is not None:
        checks.function("progress", progress, "text")
    checks.floating("x", x)
    checks.floating("y", parameters(y))
    outer_loss = checks.scalar_loss("outer_loss", problem.outer_loss)
    inner_loss = carrying("inner_loss", problem.inner_loss)
    clock = Clock(time.monotonic(), budget, progress)
    given = state is not None
    state = state if given else hypergrad.init(x, y, batch)
    checks.has_y("hypergrad", state)
    clock.waiting("the estimate")
    estimate = jax.jit(hypergrad.estimate)
    grad, after, info = estimated(estimate(key, state, x, batch), x, state)
    keys = [] if key is None else [jax.random.fold_in(key, number) for number in range(7)]
    others = [estimate(key, state, x, batch)[0] for key in keys]

    @jax.jit
    def losses(x: PyTree, y: PyTree, batch: Batch) -> tuple[Array, Array]:
        return outer_loss(x, y, batch.outer), inner_loss(x, parameters(y), y, batch.inner)[0]

    start = with_parameters(after.y, parameters(state.y))  # with what y carries as it is afterwards
    values = [float(value) for value in losses(x, start, batch)]
    wide = jnp.zeros(()).dtype == "float64"
    patient = Patient(estimate, hypergrad, key, x, y, batch, state, given, grad, after, info, others, wide)
    with jax.enable_x64(True):
        found = examined(problem, patient, values, tol, clock)
    return diagnosed(found)
