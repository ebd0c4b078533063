"""The hypergradients that the tasks on images compare: how each solves the inner problem and differentiates it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

import bilevax as bx
from benchmarks.harness.plugin import Function, InnerProblem

MOMENTUM = 0.9


class Inner(NamedTuple):
    """The inner problem and how it is solved: the loss g, its curvature, and SGD with momentum.

    Attributes:
      loss: g.
      curvature: for the methods that take products.
      learning_rate: of SGD.
      steps: its number in an outer step.
      minibatch: images of each; None for all.
      cross: how many times as many the cross term takes.
    """

    loss: bx.curvature.ModelLoss
    curvature: Callable[..., Any]
    learning_rate: float
    steps: int
    minibatch: int | None = None
    cross: int = 5

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Makes the inner steps."""
        return optax.sgd(self.learning_rate, MOMENTUM)

    @property
    def sample(self) -> Callable:
        """Draws the images of a step."""
        return bx.sampling.full if self.minibatch is None else bx.sampling.minibatch(self.minibatch)

    @property
    def cross_sample(self) -> Callable:
        """Draws the images of the cross term: by default as many as five steps see."""
        return bx.sampling.full if self.minibatch is None else bx.sampling.minibatch(self.cross * self.minibatch)

    @property
    def given(self) -> InnerProblem:
        """The same for a function of a plugin."""
        return InnerProblem(
            self.loss,
            self.optimizer,
            self.steps,
            self.learning_rate,
            self.curvature,
            sample=self.sample,
            ihvp_sample=self.sample,
            cross_sample=self.cross_sample,
        )


class Estimator(NamedTuple):
    """A hypergradient.

    Attributes:
      name: in lower case.
      solver: `solver(inner, **settings)` builds the inner solver.
      settings: `settings(inner)`, what it is built with.
    """

    name: str
    solver: Callable[..., bx.problem.InnerSolver]
    settings: Callable[[Inner], Mapping[str, Any]]


def implicit(inner: Inner, ihvp: bx.problem.IHVP) -> bx.problem.InnerSolver:
    """Implicit differentiation with this inverse-Hessian-vector product."""
    return bx.inner.implicit(
        inner.loss, inner.optimizer, inner.steps, ihvp=ihvp, sample=inner.sample, cross_sample=inner.cross_sample
    )


def identity(inner: Inner, scale: float) -> bx.problem.InnerSolver:
    """Takes the Hessian for a multiple of the identity."""
    return implicit(inner, bx.ihvp.identity(scale))


def by(ihvp: Callable[..., bx.problem.IHVP], inner: Inner, **settings: Any) -> bx.problem.InnerSolver:
    """Implicit differentiation with an inverse-Hessian-vector product of these settings, on a batch of its own."""
    return implicit(inner, ihvp(**settings, sample=inner.sample))


def reverse(inner: Inner, steps: int) -> bx.problem.InnerSolver:
    """Differentiates through all inner steps."""
    return bx.inner.reverse(inner.loss, inner.optimizer, steps, sample=inner.sample)


def no_gradient(inner: Inner, steps: int) -> bx.problem.InnerSolver:
    """Makes the inner steps, and differentiates none of them."""
    return bx.inner.no_gradient(inner.loss, inner.optimizer, steps, sample=inner.sample)


def truncated(inner: Inner, steps: int) -> bx.problem.InnerSolver:
    """Differentiates through the last of the inner steps."""
    return bx.inner.chain(no_gradient(inner, inner.steps - steps), reverse(inner, steps))


def preconditioned(inner: Inner, maxiter: int, **settings: Any) -> bx.problem.InnerSolver:
    """Conjugate gradients on the Gauss–Newton matrix, with Kronecker factors of these settings as preconditioner."""
    kfac = bx.ihvp.kfac(**settings, sample=inner.sample)
    curvature = bx.curvature.gauss_newton
    return implicit(inner, bx.ihvp.cg(maxiter=maxiter, curvature=curvature, preconditioner=kfac, sample=inner.sample))


# Decompositions dominate the cost of Kronecker factors on a CPU.
FACTORS = {"damping": 1e-3, "inverse_every": 10}
ESTIMATORS = (
    Estimator("identity", identity, lambda inner: {"scale": inner.learning_rate}),
    Estimator(
        "neumann",
        functools.partial(by, bx.ihvp.neumann),
        lambda inner: {"terms": 10, "step_size": inner.learning_rate, "curvature": inner.curvature},
    ),
    Estimator("cg", functools.partial(by, bx.ihvp.cg), lambda inner: {"maxiter": 5, "curvature": inner.curvature}),
    Estimator("kfac", functools.partial(by, bx.ihvp.kfac), lambda inner: FACTORS),
    Estimator("ekfac", functools.partial(by, bx.ihvp.ekfac), lambda inner: FACTORS),
    Estimator("pcg-kfac", preconditioned, lambda inner: {"maxiter": 2, **FACTORS}),
    Estimator("truncated", truncated, lambda inner: {"steps": 5}),
    Estimator("reverse", reverse, lambda inner: {"steps": inner.steps}),
)


def foreign(function: Function) -> Estimator:
    """The row of a function of a plugin."""
    return Estimator(function.name, lambda inner: function.hypergradient(inner.given), lambda inner: {})


PLAIN = Estimator("", no_gradient, lambda inner: {"steps": inner.steps})  # plain training
