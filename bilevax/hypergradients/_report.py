"""What the doctor says, as one page."""

import math
import textwrap
from typing import NamedTuple

from bilevax.typing import PyTree

EXACT, GOOD, WRONG, UNKNOWN = "exact", "good enough to descend", "wrong", "not known"
HEADS = {EXACT: "ok", WRONG: "WRONG", UNKNOWN: "NOT KNOWN"}


class HypergradientReport(NamedTuple):
    """What `check_hypergradient` found; `print` and a notebook show it as a short page.

    What was not measured is NaN: a distance to a reference that its own differences contradict, say.

    Attributes:
      ok: whether the hypergradient is right to the tolerance: whether the grade is "exact".
      grade: "exact"; "good enough to descend", where the cosine to the reference is at least 0.7 (an angle of 45°) and
        the length between a quarter and four times its own; "wrong"; or "not known", where the budget did not suffice.
      verdict: what is the matter, in plain words.
      remedy: what to do about it.
      note: what else is worth knowing.
      relative_error: ‖grad − reference‖ / ‖reference‖.
      cosine: of the angle between the two.
      inner_error: the part of the relative error that comes from the y of the estimator not being y*(x): the same ratio
        for the exact implicit hypergradient at that y.
      solver_error: the rest: ‖grad − exact implicit hypergradient at the same y‖ / ‖reference‖.
      noise: relative standard deviation of the estimates of eight keys; NaN without a key.
      gradient_norm: ‖∇_y g‖ at the y of the estimator.
      reference_gradient_norm: ‖∇_y g‖ at y*(x).
      smallest_curvature: smallest eigenvalue of ∇²_yy g at y*(x), of the directions that the hypergradient sees (by
        Lanczos above 1,000 unknowns).
      largest_curvature: the largest one.
      estimator_curvature: the smallest eigenvalue at the y of the estimator.
      flat_directions: how many directions of y have no curvature, and do not enter the hypergradient.
      finite_difference_error: relative distance of the implicit hypergradient from central differences of
        F(x) = f(x, y*(x)).
      own_error: relative distance of the estimate from central differences of f(x, y_T(x)), the run itself.
      damping: the damping of the Hessian that explains the estimate best, where that is tried.
      multiplier: that of a penalty which explains it, likewise.
      grad: the estimate that was checked, a pytree like x.
      reference: the exact hypergradient, a pytree like x of NumPy arrays in float64: the implicit one, or where the
        estimate is the derivative of its own run in float64, that.

    Example:
        >>> import bilevax as bx
        >>> f, g = lambda x, y, batch: (y - 1.0) ** 2, lambda x, y, batch: (y - x) ** 2
        >>> hypergrad = bx.hypergradient(f, bx.inner.implicit(g, ihvp=bx.ihvp.exact()))
        >>> bx.check_hypergradient(bx.BilevelProblem(f, g), 3.0, 3.0, bx.Batch(None, None), hypergrad)
        ... # doctest: +ELLIPSIS
        ok: the hypergradient is right to 0.01
          relative error      0   cosine 1.000000
            because of y      0   of the derivative at that y 0
          ‖∇_y g‖             0   at y* 0
          curvature at y*     2 to 2   condition 1
          differences         of F: the reference to ...e-...
        remedy: none needed
    """

    ok: bool
    grade: str
    verdict: str
    remedy: str
    note: str
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
    flat_directions: int
    finite_difference_error: float
    own_error: float
    damping: float
    multiplier: float
    grad: PyTree
    reference: PyTree

    @property
    def condition(self) -> float:
        """The ratio of the largest to the smallest curvature; infinite where the smallest is not positive."""
        return self.largest_curvature / self.smallest_curvature if not self.smallest_curvature <= 0 else math.inf

    def __repr__(self) -> str:
        """The page that `print` and a notebook show."""
        head = HEADS.get(self.grade, f"GOOD ENOUGH TO DESCEND (cosine {self.cosine:.3f})")
        lines = [f"{head}: {self.verdict}", *self._figures()]
        for name, text in (("note", self.note), ("remedy", self.remedy)):
            if text:
                lines.append(textwrap.fill(f"{name}: {text}", 100, break_on_hyphens=False))
        return "\n".join(lines)

    def _figures(self) -> list[str]:
        """Lines of numbers, without what was not measured."""
        noise = f"   of random draws {self.noise:.2g}" if math.isfinite(self.noise) else ""
        own = f"of the run itself: the estimate to {self.own_error:.2g}" if math.isfinite(self.own_error) else ""
        of_f = f"of F: the reference to {self.finite_difference_error:.2g}"
        of_f = of_f if math.isfinite(self.finite_difference_error) else ""
        rows = (
            (self.relative_error, f"  relative error      {self.relative_error:.2g}   cosine {self.cosine:.6f}"),
            (
                self.inner_error,
                f"    because of y      {self.inner_error:.2g}   of the derivative at that y {self.solver_error:.2g}"
                + noise,
            ),
            (self.gradient_norm, f"  ‖∇_y g‖             {self.gradient_norm:.2g}" + self._at_solution()),
            (
                self.largest_curvature,
                f"  curvature at y*     {self.smallest_curvature:.3g} to {self.largest_curvature:.3g}   "
                f"condition {self.condition:.3g}",
            ),
            (0.0 if of_f or own else math.nan, f"  differences         {'; '.join(filter(None, (of_f, own)))}"),
        )
        return [line for number, line in rows if math.isfinite(number)]

    def _at_solution(self) -> str:
        size = self.reference_gradient_norm
        return f"   at y* {size:.2g}" if math.isfinite(size) else ""
