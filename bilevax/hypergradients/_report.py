"""What the doctor says, as one page."""

import math
import textwrap
from typing import NamedTuple

from bilevax.typing import PyTree


class HypergradientReport(NamedTuple):
    """What `check_hypergradient` found; `print` and a notebook show it as a short page.

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
        >>> f, g = lambda x, y, batch: (y - 1.0) ** 2, lambda x, y, batch: (y - x) ** 2
        >>> hypergrad = bx.hypergradient(f, bx.inner.implicit(g, ihvp=bx.ihvp.exact()))
        >>> bx.check_hypergradient(bx.BilevelProblem(f, g), 3.0, 3.0, bx.Batch(None, None), hypergrad)
        ... # doctest: +ELLIPSIS
        ok: the hypergradient is right to 0.01
          relative error      0   cosine 1.000000
            because of y      0   of the derivative at that y 0
          ‖∇_y g‖             0   at y* 0
          curvature at y*     2 to 2   condition 1
          finite differences  agree with the reference to ...e-...
        remedy: none needed
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
    grad: PyTree
    reference: PyTree

    @property
    def condition(self) -> float:
        """The ratio of the largest to the smallest curvature; infinite where the smallest is not positive."""
        return self.largest_curvature / self.smallest_curvature if not self.smallest_curvature <= 0 else math.inf

    def __repr__(self) -> str:
        """The page that `print` and a notebook show."""
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
