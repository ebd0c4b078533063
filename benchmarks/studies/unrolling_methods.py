"""The inner solvers that the benchmark of growing T compares."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import bilevax as bx
from benchmarks.harness.plugin import Function
from benchmarks.tasks.estimators import MOMENTUM, Inner, implicit, no_gradient, truncated
from bilevax.typing import Array, PyTree, Scalar

DAMPING = 1e-2
LAST = 32  # steps that a truncated guess differentiates
EXAMPLES = 256  # entries of x


class Row(NamedTuple):
    """A method.

    Attributes:
      name: in lower case, also the name of its files.
      family: methods of one family have one colour in the picture.
      solver: builds the inner solver.
      least: smallest T that it is meant for.
      plain: whether its steps have no momentum.
    """

    name: str
    family: str
    solver: Callable[[Inner], bx.problem.InnerSolver]
    least: int = 1
    plain: bool = False


def reverse(name: str, checkpoint: bx.inner.Checkpoint) -> Row:
    """Differentiates all inner steps, and keeps what the checkpoint says."""

    def solver(inner: Inner) -> bx.problem.InnerSolver:
        return bx.inner.reverse(inner.loss, inner.optimizer, inner.steps, checkpoint=checkpoint)

    return Row(name, "reverse", solver)


def last(steps: int) -> Row:
    """Differentiates the last inner steps only."""
    return Row(f"truncated-{steps}", "truncated", lambda inner: truncated(inner, steps), least=steps + 1)


def inverse(name: str, ihvp: Callable[[Inner], bx.problem.IHVP]) -> Row:
    """Implicit differentiation."""
    return Row(name, "implicit", lambda inner: implicit(inner, ihvp(inner)))


def tail(inner: Inner) -> bx.problem.InnerSolver:
    """The last steps, and Kronecker factors for those before; its steps are plain ones of about the same length."""

    def kfac(damping: Scalar) -> bx.problem.IHVP:
        return bx.ihvp.kfac(damping=damping)

    return bx.inner.unroll_with_tail(
        inner.loss, inner.learning_rate / (1 - MOMENTUM), inner.steps, unrolled=LAST, ihvp=kfac
    )


def kfac_guess(inner: Inner) -> Any:
    """The implicit hypergradient by Kronecker factors, at y_T."""
    return bx.inner.guides.at_solution(bx.inner.implicit(inner.loss, ihvp=bx.ihvp.kfac(damping=DAMPING)))


def truncated_guess(inner: Inner) -> Any:
    """That of the last steps."""
    return bx.inner.guides.from_start(truncated(inner, LAST))


def forward(
    name: str, directions: int, family: str = "forward", guess: Callable | None = None, least: int = 1, **settings: Any
) -> Row:
    """Pushes random directions through all inner steps."""

    def solver(inner: Inner) -> bx.problem.InnerSolver:
        guide = None if guess is None else guess(inner)
        return bx.inner.forward_gradient(
            inner.loss, inner.optimizer, inner.steps, directions=directions, guide=guide, **settings
        )

    return Row(f"{name}-{directions}", family, solver, least)


def zeroth_order(inner: Inner, directions: int) -> bx.problem.InnerSolver:
    """Differences of whole solutions."""

    def solve(x: Array, y0: PyTree, batch: Any) -> PyTree:
        def step(carry: tuple, _: None) -> tuple:
            y, state = carry
            updates, state = inner.optimizer.update(jax.grad(inner.loss, argnums=1)(x, y, batch), state)
            return (optax.apply_updates(y, updates), state), None

        return jax.lax.scan(step, (y0, inner.optimizer.init(y0)), length=inner.steps)[0][0]

    return bx.inner.zeroth_order(solve, directions=directions, mu=1e-2, inner_loss=inner.loss)


def foreign(function: Function) -> Row:
    """The row of a function of a plugin."""
    return Row(function.name, "plugin", lambda inner: function.hypergradient(inner.given))


ROWS = (
    Row("no-gradient", "none", lambda inner: no_gradient(inner, inner.steps)),
    reverse("store-all", bx.inner.store_all),
    reverse("every-step", bx.inner.every_step),
    reverse("two-level", bx.inner.two_level),
    reverse("store-products", bx.inner.store_products()),
    last(LAST),
    Row(f"tail-{LAST}", "tail", tail, least=LAST + 1, plain=True),
    inverse("identity", lambda inner: bx.ihvp.identity(inner.learning_rate / (1 - MOMENTUM))),
    inverse("neumann-20", lambda inner: bx.ihvp.neumann(terms=20, step_size=0.3, curvature=inner.curvature)),
    inverse("cg-20", lambda inner: bx.ihvp.cg(maxiter=20, curvature=inner.curvature)),
    inverse(
        "sgd-20",
        lambda inner: bx.ihvp.sgd(steps=20, step_size=0.3, sample=bx.sampling.minibatch(64), curvature=inner.curvature),
    ),
    inverse("nystrom-20", lambda inner: bx.ihvp.nystrom(rank=20, damping=DAMPING, curvature=inner.curvature)),
    inverse("kfac", lambda inner: bx.ihvp.kfac(damping=DAMPING)),
    inverse("ekfac", lambda inner: bx.ihvp.ekfac(damping=DAMPING)),
    *(forward("forward", directions) for directions in (1, 4, 16)),
    forward("hadamard", EXAMPLES, sampler=bx.inner.random_directions.hadamard, chunk=16),
    forward("guided-kfac", 16, "guided", kfac_guess),
    forward(f"guided-last-{LAST}", 16, "guided", truncated_guess, least=LAST + 1),
    Row("zeroth-order-16", "zeroth order", functools.partial(zeroth_order, directions=16)),
)
