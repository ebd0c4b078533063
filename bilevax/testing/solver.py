"""What every inner solver keeps, beside what every estimator keeps that is made of it."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevax import checks
from bilevax.hypergradients._differentiable import differentiable
from bilevax.hypergradients._hypergradient import hypergradient
from bilevax.problem import BilevelProblem, Hypergradient, InnerSolver, Iterate, Loss, SolverInfo
from bilevax.sampling import Sample, full
from bilevax.testing import ground, points
from bilevax.testing import hypergradient as hypergradient_contracts
from bilevax.testing._contract import Contract, contract, hold_all, name_of
from bilevax.testing.hypergradient_subject import RATE, HypergradientSubject
from bilevax.testing.trees import close, differ, same_form, scalars, truth
from bilevax.typing import Array, PyTree, Scalar

__all__ = [
    "CONTRACTS",
    "check_solver",
    "differentiable_is_the_first_estimate",
    "forward_and_backward_return_what_they_say",
    "solver_subject",
]


def __dir__() -> list[str]:
    return __all__


class MakeSolver(Protocol):
    """A solver of an inner loss, a function of yours; it may leave optimizer and sampler aside."""

    def __call__(self, inner_loss: Loss, optimizer: optax.GradientTransformation, sample: Sample, /) -> InnerSolver: ...


def solver_subject(make: MakeSolver, **declared: Any) -> HypergradientSubject:
    """An inner solver on trial, in an estimator that is made of it.

    Args:
      make: `make(inner_loss, optimizer, sample) -> InnerSolver`; it may leave optimizer and sampler aside.
      declared: `steps`, `unrolls` and the other properties of a `HypergradientSubject`.

    Returns:
      A `HypergradientSubject`, for the contracts of solvers and of estimators.

    Raises:
      TypeError: if there is no such property.
      ValueError: if `make` takes other arguments; when it is used, if it returns no `InnerSolver`.

    Cost: none before a contract asks for a program.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> make = lambda loss, optimizer, sample: bx.inner.reverse(loss, optimizer, 4, sample=sample)
        >>> testing.solver_subject(make, steps=4).steps
        4
    """
    checks.function("make", make, "inner_loss", "optimizer", "sample")

    def make_solver(*arguments: Any) -> InnerSolver:
        solver = make(*arguments)
        fix = "Return InnerSolver(init, start, forward, backward)."
        checks.instance("make(inner_loss, optimizer, sample)", solver, InnerSolver, fix)
        return solver

    def make_hypergradient(
        problem: BilevelProblem, optimizer: optax.GradientTransformation, sample: Sample
    ) -> Hypergradient:
        return hypergradient(problem.outer_loss, make_solver(problem.inner_loss, optimizer, sample))

    return HypergradientSubject(make_hypergradient, **declared, make_solver=make_solver)


@contract(
    "Return (z_T, residual, state) from forward, ((x_bar, z0_bar), state, SolverInfo) from backward, a tangent like y."
)
def forward_and_backward_return_what_they_say(subject: HypergradientSubject) -> None:
    """At a point with everything in it, for a cotangent of y alone, and for a tangent of x where the solver has one."""
    (x, y), batch = points.everything(), points.make_batch().inner
    solver = _solver(subject, points.PROBLEM.inner_loss)

    def run(
        state: Any, x: PyTree, y: PyTree
    ) -> tuple[Iterate, Iterate, tuple[tuple[PyTree, Iterate], Any, SolverInfo]]:
        z = solver.start(x, y)
        z_T, residual, state = solver.forward(jax.random.key(0), state, x, z, batch)
        return z, z_T, solver.backward(residual, state, Iterate(z_T.y))

    state = jax.eval_shape(solver.init, x, y, batch)
    z, z_T, ((x_bar, z0_bar), after, info) = jax.eval_shape(run, state, x, y)
    for name, got in {"start(x, y)": z, "z_T": z_T, "z0_bar": z0_bar}.items():
        truth(isinstance(got, Iterate), f"{name} is a {type(got).__name__}; an Iterate is meant")
    truth(isinstance(info, SolverInfo), f"backward reports a {type(info).__name__}; a SolverInfo is meant")
    scalars("info", info)
    same_form("the y of start(x, y)", z.y, "y", y)
    same_form("z_T", z_T, "z_0", z)
    same_form("x_bar", x_bar, "x", x)
    same_form("z0_bar.y", z0_bar.y, "y", y)
    same_form("the state after both", after, "the state of init", state)
    if solver.tangent is not None:
        y_dot = jax.eval_shape(solver.tangent, jax.random.key(0), x, z_T.y, batch, x)
        same_form("y_dot of tangent", y_dot, "y", y)


@contract("Take what depends on x from the arguments, and start cold in init: bx.differentiable does so at each call.")
def differentiable_is_the_first_estimate(subject: HypergradientSubject) -> None:
    """The derivative of one pure function, for two traced learning rates at once."""
    key, _, x, batch = subject.trials["plain"]
    y = ground.make_point()[1]

    @jax.jit
    @jax.vmap
    def gradient(rate: Array) -> Array:
        solve = differentiable(_solver(subject, ground.PROBLEM.inner_loss, rate))

        def outer(x: Array) -> Array:
            return ground.PROBLEM.outer_loss(x, solve(x, y, batch.inner, key), batch.outer)

        return jax.grad(outer)(x)

    rates = RATE, RATE / 2
    got = gradient(jnp.asarray(np.asarray(rates)))
    for one, rate in zip(got, rates, strict=True):
        close(f"the derivative at learning rate {rate}", one, subject.estimate(rate=rate, key=key)[0])
    if subject.steps:
        differ("the derivative with two learning rates", got[0], got[1], rtol=1e-3)


def _solver(subject: HypergradientSubject, loss: Loss, rate: Scalar = RATE) -> InnerSolver:
    if subject.make_solver is None:
        raise ValueError("subject must be one of an inner solver; got one without make_solver. Call solver_subject.")
    return subject.make_solver(loss, optax.sgd(rate), full)


CONTRACTS: tuple[Contract, ...] = (
    forward_and_backward_return_what_they_say,
    differentiable_is_the_first_estimate,
    *hypergradient_contracts.CONTRACTS,
)


def check_solver(make: MakeSolver, contracts: Sequence[Contract] = CONTRACTS, **declared: Any) -> None:
    """Holds an inner solver to the contracts of solvers, and to those of the estimators that are made of it.

    The contract `declared_calls_are_compiled_calls` is left out with JAX before 0.10, which prints
    its programs in another form.

    Args:
      make: `make(inner_loss, optimizer, sample) -> InnerSolver`; it may leave optimizer and sampler aside.
      contracts: those to be checked, of `bilevax.testing.solver.CONTRACTS`.
      declared: `steps`, `unrolls` and the other properties of a `HypergradientSubject`.

    Raises:
      ContractError: with the name of the first contract that is broken, what was seen, and what to do.
      ValueError: if make takes other arguments, or returns no InnerSolver; or contracts are none, or those of
        something else.
      TypeError: if there is no such property.

    Cost: some ten compiled programs, and about a hundred tiny ones for the comparison with an eager call.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> def mine(loss, optimizer, sample):
        ...     return bx.inner.reverse(loss, optimizer, steps=3, sample=sample)
        >>> testing.check_solver(mine, steps=4)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        bilevax.testing._contract.ContractError: mine breaks the contract `y_is_that_of_a_loop_by_hand`.
    """
    subject = solver_subject(make, **declared)
    hold_all(contracts, name_of(make), subject, lambda: subject.at(ground.PROBLEM))
