"""The methods that the benchmark of hypergradients compares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import bilevax as bx
from benchmarks.harness.plugin import InnerProblem
from bilevax.typing import Scalar

DAMPING = 1e-3  # of the inverses that need one
Make = Callable[["Inner"], bx.problem.IHVP]


class Inner(NamedTuple):
    """The inner problem: the loss g, gradient descent with its step size and number of steps, and its batches."""

    loss: bx.curvature.ModelLoss
    step_size: float
    steps: int
    sample: Callable = bx.sampling.full

    @property
    def given(self) -> InnerProblem:
        """The same for a function of a plugin."""
        given = InnerProblem(self.loss, self.optimizer, self.steps, self.step_size, bx.curvature.hessian)
        own = self.sample
        return given._replace(sample=own, ihvp_sample=own, cross_sample=own, warm_start=False)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Makes the inner steps."""
        return optax.sgd(self.step_size)


class Row(NamedTuple):
    """A method.

    Attributes:
      name: in lower case, also the name of its files.
      family: methods that differ in a number only are one family, with one colour in the picture.
      solver: builds the inner solver.
      unrolled: inner steps that it differentiates before it ends at the y of the comparison.
    """

    name: str
    family: str
    solver: Callable[[Inner], bx.problem.InnerSolver]
    unrolled: int = 0


def implicit(name: str, ihvp: Make, family: str | None = None) -> Row:
    """Implicit differentiation, with no first guess of v."""

    def solver(inner: Inner) -> bx.problem.InnerSolver:
        return bx.inner.implicit(
            inner.loss,
            inner.optimizer,
            inner.steps,
            ihvp=ihvp(inner),
            sample=inner.sample,
            cross_sample=inner.sample,
            warm_start=False,
        )

    return Row(name, family or name, solver)


def neumann(steps: int) -> Row:
    """A truncated Neumann series."""
    return implicit(
        f"neumann-{steps}",
        lambda inner: bx.ihvp.neumann(terms=steps, step_size=inner.step_size, sample=inner.sample),
        "neumann",
    )


def cg(maxiter: int, curvature: Callable = bx.curvature.hessian, preconditioner: Make | None = None) -> Row:
    """So many iterations of conjugate gradients."""
    family = "cg" if preconditioner is None else "pcg"
    if curvature is bx.curvature.gauss_newton:
        family += "-gn"

    def ihvp(inner: Inner) -> bx.problem.IHVP:
        first = None if preconditioner is None else preconditioner(inner)
        return bx.ihvp.cg(maxiter=maxiter, tol=0.0, curvature=curvature, preconditioner=first, sample=inner.sample)

    return implicit(f"{family}-{maxiter}", ihvp, family)


def nystrom(rank: int) -> Row:
    """A randomized low-rank inverse of the Gauss–Newton matrix."""

    def ihvp(inner: Inner) -> bx.problem.IHVP:
        return bx.ihvp.nystrom(rank=rank, damping=DAMPING, curvature=bx.curvature.gauss_newton, sample=inner.sample)

    return implicit(f"nystrom-{rank}", ihvp, "nystrom")


def kfac(**settings: Any) -> Make:
    """The inverse of Kronecker factors."""
    return lambda inner: bx.ihvp.kfac(damping=DAMPING, sample=inner.sample, **settings)


def ekfac(**settings: Any) -> Make:
    """The same with corrected eigenvalues."""
    return lambda inner: bx.ihvp.ekfac(damping=DAMPING, sample=inner.sample, **settings)


def reverse(steps: int) -> Row:
    """Differentiates the last inner steps."""
    return Row(
        f"reverse-{steps}",
        "reverse",
        lambda inner: bx.inner.reverse(inner.loss, inner.optimizer, inner.steps, sample=inner.sample),
        steps,
    )


def tail(steps: int) -> Row:
    """The same, with the inverse of Kronecker factors for all that was before."""

    def solver(inner: Inner) -> bx.problem.InnerSolver:
        def kfac(damping: Scalar) -> bx.problem.IHVP:
            return bx.ihvp.kfac(damping=damping, sample=inner.sample)

        samples = {"sample": inner.sample, "cross_sample": inner.sample}
        return bx.inner.unroll_with_tail(
            inner.loss, inner.step_size, inner.steps, unrolled=inner.steps, ihvp=kfac, **samples
        )

    return Row(f"tail-{steps}", "tail", solver, steps)


GAUSS_NEWTON = bx.curvature.gauss_newton
END_TO_END = (  # by default
    *("identity", "diagonal", "neumann-5", "cg-gn-3", "cg-gn-5", "nystrom-10", "reverse-10", "tail-10"),
    *("kfac", "kfac-every-10", "kfac-ema", "kfac-exact", "ekfac", "pcg-gn-3"),
)
BUDGETS = (3, 5, 10)  # iterations of conjugate gradients
ROWS = (
    implicit("identity", lambda inner: bx.ihvp.identity(inner.step_size)),
    implicit("diagonal", lambda inner: bx.ihvp.diagonal(scale=inner.step_size, sample=inner.sample)),
    *map(neumann, (1, 5, 10)),
    *map(cg, BUDGETS),
    *(cg(maxiter, GAUSS_NEWTON) for maxiter in BUDGETS),
    *map(nystrom, (10, 30)),
    *map(reverse, (5, 10)),
    *map(tail, (5, 10)),
    implicit("kfac", kfac()),
    implicit("kfac-every-10", kfac(inverse_every=10)),
    implicit("kfac-ema", kfac(ema=0.9)),
    implicit("kfac-exact", kfac(fisher=bx.curvature.fisher.exact)),
    implicit("kfac-rank-16", kfac(inverse=bx.curvature.kronecker.low_rank(16))),
    implicit("kfac-factored", kfac(inverse=bx.curvature.kronecker.factored)),
    implicit("kfac-rescaled", lambda inner: bx.ihvp.rescaled(kfac()(inner), damping=DAMPING, sample=inner.sample)),
    implicit("ekfac", ekfac()),
    implicit("ekfac-exact", ekfac(fisher=bx.curvature.fisher.exact)),
    *(cg(maxiter, GAUSS_NEWTON, kfac()) for maxiter in BUDGETS),
    *(cg(maxiter, bx.curvature.hessian, kfac()) for maxiter in BUDGETS),
)
