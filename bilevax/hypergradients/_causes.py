"""The doctor's table of causes: when each applies, its verdict and its remedy, read in order."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from bilevax.hypergradients._penalty import PenaltyDetail
from bilevax.hypergradients._reference import FLAT
from bilevax.hypergradients._report import EXACT, GOOD, UNKNOWN, WRONG, HypergradientReport
from bilevax.problem import IHVPInfo
from bilevax.typing import PyTree

COSINE, LENGTH = 0.7, 4.0  # of an estimate that is good enough to descend: at least, and at most (or one over it)


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
    lost: str = ""  # what is not finite first, of the losses and their gradients
    zeros: int = 0  # entries of ∇_y g that are exactly zero
    finite: bool = True  # whether the estimate is
    broken: bool = False  # whether a solver reports a breakdown
    diverged: bool = False  # whether the inner steps leave g larger, and its gradient much longer
    uphill: bool = False  # whether they may lead uphill: away from y* also where g is flattest
    stops: bool = False  # whether they come to rest
    bottomless: bool = False  # whether g falls for ever
    in_time: bool = True  # whether the inner problem was given all the time that it takes
    unread: tuple[str, ...] = ()  # leaves of x that g does not contain, and that the run depends on all the same
    same_memory_error: float = math.nan  # relative error with v and the optimizer afresh, at the same y
    cold_error: float = math.nan  # the same from the y that was passed, instead of that of the state

    @property
    def believed(self) -> bool:
        """Whether the implicit reference is one: y* is a minimum, and differences of F confirm it."""
        figures = self.figures
        solved = figures.reference_gradient_norm <= self.solved
        return (
            solved
            and not figures.smallest_curvature <= self.least_curvature
            and not figures.finite_difference_error > self.tol
        )

    @property
    def close(self) -> bool:
        """Whether the estimate is right, as far as the reference is."""
        return self.believed and self.figures.relative_error <= self.tol

    @property
    def own(self) -> bool:
        """Whether it is the derivative of the steps that run."""
        return self.figures.own_error <= self.tol

    @property
    def descends(self) -> bool:
        """Whether it is near enough to the reference for a descent."""
        length = _norm(self.figures.grad) / (_norm(self.figures.reference) or 1.0)
        return self.believed and self.figures.cosine >= COSINE and 1 / LENGTH <= length <= LENGTH

    @property
    def least_curvature(self) -> float:
        """What the smallest curvature has to exceed, for y*(x) to be unique."""
        return FLAT * self.figures.largest_curvature

    @property
    def step_limit(self) -> str:
        """The step size below which gradient descent on g, and a series for H⁻¹, converge; with where it comes from."""
        largest = self.figures.largest_curvature
        return f"2 / {largest:.2g} = {2 / largest:.2g}" if largest > 0 else "2 / L, where L is the largest curvature"

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
        return self.figures.cosine**2 > 1 - 1e-6 and sum(map(np.size, jax.tree.leaves(self.figures.reference))) >= 3

    @property
    def memory(self) -> str:
        """What is kept beside y."""
        return "v, or the state of the optimizer," if self.solves else "state of the optimizer"

    @property
    def multipliers(self) -> str:
        """The multiplier of a penalty: what it reports, and what the estimate looks like."""
        reported = [f"multiplier is {float(detail.multiplier):.3g}" for detail in self.penalties]
        fitted = self.figures.multiplier
        like = [f"the estimate is that of a multiplier of {fitted:.2g}"] if math.isfinite(fitted) else []
        return ", ".join(reported + like)


def _norm(tree: PyTree) -> float:
    return float(np.linalg.norm([np.linalg.norm(np.ravel(np.asarray(leaf, float))) for leaf in jax.tree.leaves(tree)]))


class Cause(NamedTuple):
    """One row of the table: functions of the findings."""

    applies: Callable[[Findings], bool]
    verdict: Callable[[Findings], str]
    remedy: Callable[[Findings], str]
    trusted: bool = False  # whether an estimate that is close to the reference counts as right
    known: bool = True  # whether there is a verdict at all


CAUSES = (  # what is not finite, the loss and the problem, then success, then the larger part of the error
    Cause(
        applies=lambda found: bool(found.lost),
        verdict=lambda found: f"{found.lost} is not finite",
        remedy=lambda found: (
            "Nothing that comes after it can be. Look there for roots, logarithms and divisions (jnp.where hides a NaN "
            "from the value alone, not from the gradient: put it around their argument too), and for numbers that are "
            "too large; start y elsewhere, or with a smaller step."
        ),
    ),
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
        applies=lambda found: found.diverged and found.uphill,
        verdict=lambda found: "the inner steps diverge: too large, or uphill",
        remedy=lambda found: (
            f"They leave g larger than they found it, and ‖∇_y g‖ is {found.figures.gradient_norm:.2g}. Lower the step "
            f"size: gradient descent takes one below {found.step_limit}. If it is smaller than that, look at the "
            f"sign: the optimizer should subtract the gradient (optax.sgd of a positive number, or "
            f"optax.scale of a negative one)."
        ),
    ),
    Cause(
        applies=lambda found: found.diverged,
        verdict=lambda found: "the inner steps diverge: their step size is too large",
        remedy=lambda found: (
            f"They leave g larger than they found it, and ‖∇_y g‖ is {found.figures.gradient_norm:.2g}. Lower the step "
            f"size: gradient descent takes one below {found.step_limit}, with momentum or moments less."
        ),
    ),
    Cause(
        applies=lambda found: not found.finite and bool(found.solves),
        verdict=lambda found: "the estimate is not finite, though y is: v is lost first",
        remedy=lambda found: (
            f"The linear solve diverges. A step size of ihvp must be below {found.step_limit}. Look at "
            f"info.inner.detail, or take ihvp.cg."
        ),
    ),
    Cause(
        applies=lambda found: not found.finite,
        verdict=lambda found: (
            "the estimate is not finite, though y is: the derivative of the inner steps is lost first"
        ),
        remedy=lambda found: (
            f"{found.zeros} entries of ∇_y g are exactly 0. The square roots of adam, adamw, rmsprop and their like "
            f"have no derivative there: give the optimizer an eps_root, or look for such a root in a step of your own."
            if found.zeros
            else "Look for roots, logarithms and divisions in g and in the optimizer, and for a derivative that grows "
            "from step to step: take fewer or smaller steps."
        ),
    ),
    Cause(
        applies=lambda found: bool(found.unread),
        verdict=lambda found: (
            f"the derivative of {', '.join(found.unread)} is zero, because x enters the optimizer only, not g"
        ),
        remedy=lambda found: (
            "The implicit rule knows what g contains, and nothing of a learning rate, a schedule or a decoupled decay. "
            "Differentiate the steps: inner.reverse, or inner.forward_gradient for a handful of numbers; or put the "
            "decay into g."
        ),
    ),
    Cause(
        applies=lambda found: found.own,
        verdict=lambda found: (
            f"the hypergradient is right to {found.tol:g}: it is the derivative of the steps that run"
        ),
        remedy=lambda found: "none needed",
        trusted=True,
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
        applies=lambda found: found.stops,
        verdict=lambda found: (
            "the inner steps stop where ∇_y g is not 0: at a constraint, a kink, or for want of a step"
        ),
        remedy=lambda found: (
            f"‖∇_y g‖ is {found.figures.gradient_norm:.2g} where they come to rest, so that the implicit rule does not "
            f"hold there. For a projection, a proximal step or a decay of the optimizer take inner.fixed_point with "
            f"that step, for other equations inner.root, or differentiate the program that you run: inner.reverse. "
            f"Where a schedule has come to its end, let it last."
        ),
    ),
    Cause(
        applies=lambda found: found.bottomless,
        verdict=lambda found: "g is not bounded below: it has no minimum",
        remedy=lambda found: "It falls for ever along a ray. Look for a lost or a wrong sign in g.",
    ),
    Cause(
        applies=lambda found: not found.figures.reference_gradient_norm <= found.solved and not found.in_time,
        verdict=lambda found: "the budget was over before the inner problem was solved",
        remedy=lambda found: (
            "Give more seconds as budget=, start from a y that is nearly solved, or check a smaller instance of the "
            "problem."
        ),
        known=False,
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
            f"They differ by {found.figures.finite_difference_error:.2g}, so that there is no reference to compare "
            f"with. Check that f and g are smooth at y*, that g draws nothing at random, and that x enters g by no "
            f"stop_gradient, rounding or sorting."
        ),
    ),
    Cause(
        applies=lambda found: found.close,
        verdict=lambda found: f"the hypergradient is right to {found.tol:g}",
        remedy=lambda found: "none needed",
        trusted=True,
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
        applies=lambda found: found.same_memory_error <= max(found.tol, 0.5 * found.figures.relative_error),
        verdict=lambda found: f"the warm {found.memory} is stale: afresh the error is smaller",
        remedy=lambda found: (
            f"Afresh at the same y, the relative error is {found.same_memory_error:.2g} instead of "
            f"{found.figures.relative_error:.2g}. Where x or the data jump, call init(x, state.y) again, or pass "
            f"warm_start=False (restart_optimizer=True) to the solver (to hypergradient)."
        ),
    ),
    Cause(
        applies=lambda found: found.cold_error <= max(found.tol, 0.5 * found.figures.relative_error),
        verdict=lambda found: "the warm start is wrong: from the y that was passed the error is smaller",
        remedy=lambda found: (
            f"From there the relative error is {found.cold_error:.2g} instead of {found.figures.relative_error:.2g}. "
            f"The y of the state is that of another x, of other data, or of another minimum: call init(x, y) again."
        ),
    ),
    Cause(
        applies=lambda found: math.isnan(found.figures.inner_error),
        verdict=lambda found: (
            f"the inner problem is not solved (‖∇_y g‖ {found.figures.gradient_norm:.2g}); the budget was over before "
            f"other causes were looked for"
            if found.figures.gradient_norm > found.solved
            else "the hypergradient is not right, and the budget was over before the cause was found"
        ),
        remedy=lambda found: "Give more seconds as budget=, or check a smaller instance of the problem.",
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
        applies=lambda found: (
            (math.isfinite(found.figures.multiplier) or bool(found.penalties))
            and not found.figures.inner_error > found.figures.solver_error
        ),
        verdict=lambda found: "the penalty is biased",
        remedy=lambda found: (
            f"Its error is of order 1 / multiplier, and errors in y are multiplied by it: {found.multipliers}, ‖∇_y g‖ "
            f"is {found.figures.gradient_norm:.2g}. Raise it, and the steps with it."
        ),
    ),
    Cause(
        applies=lambda found: found.figures.inner_error > found.figures.solver_error,
        verdict=lambda found: "the inner problem is not solved",
        remedy=lambda found: (
            f"‖∇_y g‖ is {found.figures.gradient_norm:.2g}. Take more inner steps, keep y warm over the outer steps, "
            f"or take larger ones where they are small: for plain gradient descent the bound is 2 / L = "
            f"{found.step_limit}; a rate of Adam has no such bound."
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
    ok = cause.trusted and (found.close or found.own)
    grade = EXACT if ok else GOOD if found.descends and not found.diverged else WRONG if cause.known else UNKNOWN
    figures = found.figures
    unseen = bool(found.unread) and grade == WRONG  # what matters of x is not in the reference
    if unseen or not (found.believed or found.own):  # no distance to a reference that is none
        figures = figures._replace(
            relative_error=math.nan, cosine=math.nan, inner_error=math.nan, solver_error=math.nan
        )
    if found.bottomless:  # there is no y*
        figures = figures._replace(
            reference_gradient_norm=math.nan,
            smallest_curvature=math.nan,
            largest_curvature=math.nan,
            finite_difference_error=math.nan,
        )
    return figures._replace(ok=ok, grade=grade, verdict=cause.verdict(found), remedy=cause.remedy(found))
