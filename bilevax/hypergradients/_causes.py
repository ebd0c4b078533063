"""The doctor's table of causes: when each applies, its verdict and its remedy, read in order."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax.hypergradients._penalty import PenaltyDetail
from bilevax.hypergradients._report import HypergradientReport
from bilevax.problem import IHVPInfo

FLAT = 1e-10  # a smaller ratio of the curvatures is no minimum that is unique


class Findings(NamedTuple):
    """What was found of an estimate, by which the causes are told apart."""

    figures: HypergradientReport  # as yet without a verdict
    tol: float  # relative error up to which the hypergradient counts as right
    solved: float  # ‖∇_y g‖ up to which the inner problem counts as solved
    values: list[float]  # f and g in the numbers of the user
    wide_values: list[float]  # f and g in float64
    same_values: bool  # whether these agree
    stuck: list[str]  # leaves of y that do not move, though their gradient is not zero
    solves: list[IHVPInfo]  # what the IHVPs of the estimate report
    penalties: list[PenaltyDetail]  # what a penalty reports

    @property
    def close(self) -> bool:
        """Whether the estimate is right, as far as the reference is."""
        return self.figures.relative_error <= self.tol

    @property
    def finite(self) -> bool:
        """Whether the estimate is."""
        return math.isfinite(self.figures.relative_error)

    @property
    def least_curvature(self) -> float:
        """What the smallest curvature has to exceed, for y*(x) to be unique."""
        return FLAT * self.figures.largest_curvature

    @property
    def step_limit(self) -> str:
        """The step size below which gradient descent on g, and a series for H⁻¹, converge; with where it comes from."""
        return f"2 / {self.figures.largest_curvature:.2g} = {2 / self.figures.largest_curvature:.2g}"

    @property
    def residual(self) -> float:
        """Of the linear system; NaN where the IHVP measures none."""
        residual = self.solves[0].residual
        return math.nan if residual is None else float(residual)

    @property
    def cg_iterations(self) -> float:
        """Conjugate gradients reach `tol` within so many, whatever the spectrum; NaN where its ends are not known."""
        root = math.sqrt(self.figures.condition)
        return float(np.ceil(root / 2 * math.log(2 * root / self.tol)))

    @property
    def parallel(self) -> bool:
        """Whether the estimate is a multiple of the reference; of one or two numbers that says nothing."""
        return self.figures.cosine**2 > 1 - 1e-6 and np.size(ravel_pytree(self.figures.reference)[0]) >= 3


class Cause(NamedTuple):
    """One row of the table: functions of the findings."""

    applies: Callable[[Findings], bool]
    verdict: Callable[[Findings], str]
    remedy: Callable[[Findings], str]
    trusted: bool = False  # whether an estimate that is close to the reference counts as right


CAUSES = (  # the loss and the problem first, then success, then the larger part of the error
    Cause(
        applies=lambda found: not found.same_values,
        verdict=lambda found: "a loss is another function in float64, so that the reference is not its own",
        remedy=lambda found: (
            f"f and g are {found.values[0]:.6g} and {found.values[1]:.6g} in your numbers, "
            f"{found.wide_values[0]:.6g} and {found.wide_values[1]:.6g} in float64. Draw random numbers with "
            f"dtype=jnp.float32 (jax.random.bernoulli and uniform draw others in float64), and check a float32 copy of "
            f"a model that computes in half precision."
        ),
        trusted=True,
    ),
    Cause(
        applies=lambda found: not found.figures.reference_gradient_norm <= found.solved,
        verdict=lambda found: "the inner problem has no minimum that could be found",
        remedy=lambda found: (
            f"‖∇_y g‖ is still {found.figures.reference_gradient_norm:.2g} after a trust-region method in float64. "
            f"Check that g is bounded below and smooth in y (not computed in half precision), and add a penalty such "
            f"as l2 / 2 · ‖y‖²."
        ),
    ),
    Cause(
        applies=lambda found: found.figures.smallest_curvature < -found.least_curvature,
        verdict=lambda found: "the curvature is indefinite at a stationary point: y is at a saddle",
        remedy=lambda found: (
            f"The smallest curvature is {found.figures.smallest_curvature:.2g}. Start y elsewhere (not where units are "
            f"equal or zero) and solve on."
        ),
    ),
    Cause(
        applies=lambda found: found.figures.smallest_curvature <= found.least_curvature,
        verdict=lambda found: (
            "the curvature is flat: y*(x) is not unique, and F has no gradient that does not depend on the start"
        ),
        remedy=lambda found: (
            f"The smallest curvature is {found.figures.smallest_curvature:.2g}, the largest "
            f"{found.figures.largest_curvature:.2g}. Add a penalty such as l2 / 2 · ‖y‖² to g, or differentiate the "
            f"program that you run: inner.reverse."
        ),
    ),
    Cause(
        applies=lambda found: found.figures.finite_difference_error > found.tol,
        verdict=lambda found: "the implicit hypergradient and a finite difference of F do not agree",
        remedy=lambda found: (
            "Check that f and g are smooth at y*, that g draws nothing at random, and that x enters g by no "
            "stop_gradient, rounding or sorting."
        ),
    ),
    Cause(
        applies=lambda found: found.close,
        verdict=lambda found: f"the hypergradient is right to {found.tol:g}",
        remedy=lambda found: "none needed",
        trusted=True,
    ),
    Cause(
        applies=lambda found: not found.finite and math.isfinite(found.figures.gradient_norm),
        verdict=lambda found: "the estimate is not finite, though y is",
        remedy=lambda found: (
            f"The linear solve diverges, or f is not finite. A step size of ihvp must be below {found.step_limit}. "
            f"Look at info.inner.detail, or take ihvp.cg."
        ),
    ),
    Cause(
        applies=lambda found: not found.finite,
        verdict=lambda found: "the estimate is not finite",
        remedy=lambda found: (
            f"The inner steps diverge, or a loss is not finite: take a step size below {found.step_limit} for plain "
            f"gradient descent, and look at info.inner."
        ),
    ),
    Cause(
        applies=lambda found: bool(found.solves) and found.figures.estimator_curvature < 0,
        verdict=lambda found: "the curvature is indefinite where the estimator stands",
        remedy=lambda found: (
            f"The smallest curvature there is {found.figures.estimator_curvature:.2g}, at y* "
            f"{found.figures.smallest_curvature:.2g}: solve the inner problem further, or take "
            f"cg(curvature=bx.curvature.gauss_newton) or a damping above {-found.figures.estimator_curvature:.2g}."
        ),
    ),
    Cause(
        applies=lambda found: found.figures.noise > 0.5 * found.figures.relative_error,
        verdict=lambda found: "the noise of random draws is most of the error",
        remedy=lambda found: (
            "Draw larger batches (sample= of the inner steps and of the IHVP, cross_sample=), take smaller inner "
            "steps, more directions of a forward gradient or a guide for them, or average: a small outer step size "
            "does that too."
        ),
    ),
    Cause(
        applies=lambda found: bool(found.stuck),
        verdict=lambda found: f"{', '.join(found.stuck)} does not move, but g depends on it",
        remedy=lambda found: (
            "The implicit rule takes all of y for solved. Leave frozen parts out of y (docs/recipes.md), or "
            "differentiate the program that you run: inner.reverse."
        ),
    ),
    Cause(
        applies=lambda found: bool(found.penalties) and found.figures.inner_error <= found.figures.solver_error,
        verdict=lambda found: "the penalty is biased",
        remedy=lambda found: (
            f"Its error is of order 1 / multiplier, and errors in y are multiplied by it: multiplier is "
            f"{float(found.penalties[0].multiplier):.3g}, ‖∇_y g‖ {found.figures.gradient_norm:.2g}. Raise it, and the "
            f"steps with it."
        ),
    ),
    Cause(
        applies=lambda found: found.figures.inner_error > found.figures.solver_error,
        verdict=lambda found: "the inner problem is not solved",
        remedy=lambda found: (
            f"‖∇_y g‖ is {found.figures.gradient_norm:.2g}. Take more inner steps, keep y warm over the outer steps, "
            f"or raise the step size: plain gradient descent takes up to {found.step_limit}."
        ),
    ),
    Cause(
        applies=lambda found: not found.solves,
        verdict=lambda found: "the unroll is too short",
        remedy=lambda found: (
            f"The derivative passes through too few steps for a condition number of {found.figures.condition:.2g}. "
            f"Take more steps, or put a tail behind them: chain(implicit(...), reverse(...))."
        ),
    ),
    # From here on an IHVP was at work: `solves` is not empty.
    Cause(
        applies=lambda found: bool(found.solves[0].breakdown),
        verdict=lambda found: "the linear solver broke down",
        remedy=lambda found: (
            f"The residual is {found.residual:.2g}. A step size of ihvp must be below {found.step_limit}; ihvp.cg "
            f"needs none."
        ),
    ),
    Cause(
        applies=lambda found: found.residual > found.tol / 2,
        verdict=lambda found: "the linear system is not solved: too few iterations",
        remedy=lambda found: (
            f"The residual is {found.residual:.2g} after {float(found.solves[0].iterations):.0f}. A condition number "
            f"of {found.figures.condition:.2g} takes cg at most {found.cg_iterations:.0f} iterations; give it more, or "
            f"a preconditioner."
        ),
    ),
    Cause(
        applies=lambda found: math.isnan(found.residual),
        verdict=lambda found: "the inverse Hessian is replaced by a crude approximation",
        remedy=lambda found: "It solves no linear system. Take ihvp.cg, and this one as its preconditioner=.",
    ),
    Cause(
        applies=lambda found: found.parallel,
        verdict=lambda found: "the estimate is a multiple of the hypergradient",
        remedy=lambda found: (
            "Its direction is right, its length or its sign is not: look for a lost factor between the losses of the "
            "estimator and these, such as a sum for a mean."
        ),
    ),
    Cause(
        applies=lambda found: math.isfinite(found.figures.damping),
        verdict=lambda found: "another system was solved: the damping is too large",
        remedy=lambda found: (
            f"The estimate is that of a damping of about {found.figures.damping:.2g}, where the smallest curvature is "
            f"{found.figures.smallest_curvature:.2g}. Take a damping well below that."
        ),
    ),
    Cause(
        applies=lambda found: True,
        verdict=lambda found: "another system was solved: the curvature is not the Hessian",
        remedy=lambda found: (
            f"The residual is small, {found.residual:.2g}, but of a different matrix: a Gauss–Newton curvature, a "
            f"batch of its own, or a damping. Take curvature=bx.curvature.hessian at a solved inner problem."
        ),
    ),
)


def diagnosed(found: Findings) -> HypergradientReport:
    """The figures with the verdict and the remedy of the first cause that applies."""
    cause = next(cause for cause in CAUSES if cause.applies(found))
    return found.figures._replace(
        ok=cause.trusted and found.close, verdict=cause.verdict(found), remedy=cause.remedy(found)
    )
