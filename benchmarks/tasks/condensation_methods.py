"""The hypergradients that data condensation compares: how each differentiates the training on the learnt images."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

import bilevax as bx
from benchmarks.harness.plugin import Function, InnerProblem


class Training(NamedTuple):
    """How a network is trained on the learnt images.

    Attributes:
      loss: g.
      optimizer: of the network.
      steps: T.
      step_size: the first one.
      directions: b, of the methods that draw directions.
      chunk: of them, pushed at once; None for all.
    """

    loss: bx.curvature.ModelLoss
    optimizer: optax.GradientTransformation
    steps: int
    step_size: float
    directions: int
    chunk: int | None = None


def no_gradient(training: Training) -> bx.problem.InnerSolver:
    """Trains, and differentiates nothing."""
    return bx.inner.no_gradient(training.loss, training.optimizer, training.steps)


def implicit(training: Training, ihvp: Callable[..., bx.problem.IHVP], **settings: Any) -> bx.problem.InnerSolver:
    """Takes y_T for a minimum. A new network has nothing in common with the last one: v starts from zero."""
    return bx.inner.implicit(training.loss, training.optimizer, training.steps, ihvp=ihvp(**settings), warm_start=False)


def reverse(training: Training) -> bx.problem.InnerSolver:
    """The exact gradient, with two levels of checkpoints."""
    return bx.inner.reverse(training.loss, training.optimizer, training.steps, checkpoint=bx.inner.two_level)


def truncated(training: Training, tail: int) -> bx.problem.InnerSolver:
    """Differentiates through the last steps only."""
    last = min(tail, training.steps)
    return bx.inner.chain(
        no_gradient(training._replace(steps=training.steps - last)),
        bx.inner.reverse(training.loss, training.optimizer, last),
    )


def forward(training: Training, **choices: Any) -> bx.problem.InnerSolver:
    """Forward gradients: unbiased, in a memory that does not grow with T."""
    return bx.inner.forward_gradient(
        training.loss,
        training.optimizer,
        training.steps,
        directions=training.directions,
        chunk=training.chunk,
        **choices,
    )


def guided(training: Training, ihvp: Callable[..., bx.problem.IHVP], **settings: Any) -> bx.problem.InnerSolver:
    """Forward gradients along the implicit gradient with this product, and at random."""
    guess = bx.inner.implicit(training.loss, ihvp=ihvp(**settings), warm_start=False)
    return forward(training, guide=bx.inner.guides.at_solution(guess))


def hadamard(training: Training) -> bx.problem.InnerSolver:
    """Forward gradients along distinct rows of a Hadamard matrix."""
    return forward(training, sampler=bx.inner.random_directions.hadamard)


class Row(NamedTuple):
    """A method, here and in the learning of schedules.

    Attributes:
      name: in lower case.
      solver: `solver(training, **settings)` builds the inner solver.
      settings: what it is built with.
    """

    name: str
    solver: Callable[..., bx.problem.InnerSolver]
    settings: Mapping[str, Any] = {}


def foreign(function: Function) -> Row:
    """The row of a function of a plugin."""

    def solver(training: Training) -> Any:
        curvature = bx.curvature.gauss_newton
        problem = InnerProblem(training.loss, training.optimizer, training.steps, training.step_size, curvature)
        return function.hypergradient(problem._replace(warm_start=False))

    return Row(function.name, solver)


# A network fits its ten images: their curvature at y_T is small, and so is the damping that does not drown it, chosen
# by the cosine with the exact gradient, on digits. A Fisher matrix of sampled labels is noise for so few images.
cg = functools.partial(bx.ihvp.cg, curvature=bx.curvature.gauss_newton)
kfac = functools.partial(bx.ihvp.kfac, fisher=bx.curvature.fisher.exact)
CG = {"maxiter": 20, "damping": 3e-4}
KFAC = {"damping": 1e-4}
ROWS = (
    Row("identity", functools.partial(implicit, ihvp=bx.ihvp.identity), {"scale": 0.1}),
    Row("neumann", functools.partial(implicit, ihvp=bx.ihvp.neumann), {"terms": 20, "step_size": 0.01}),
    Row("cg", functools.partial(implicit, ihvp=cg), CG),
    Row("kfac", functools.partial(implicit, ihvp=kfac), KFAC),
    Row("truncated", truncated, {"tail": 10}),
    Row("forward-gradient", forward),
    Row("guided-kfac", functools.partial(guided, ihvp=kfac), KFAC),
    Row("guided-cg", functools.partial(guided, ihvp=cg), CG),
    Row("hadamard", hadamard),
    Row("reverse", reverse),
)
