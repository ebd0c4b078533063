"""Reverse-mode differentiation through the steps of the inner optimizer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.inner.descent import Initial, Optimizer, check_point, descent, full_cotangent
from bilevax.problem import Calls, InnerSolver, Iterate, Loss, SolverInfo
from bilevax.sampling import Sample, full, split


class Checkpoint(NamedTuple):
    """How a loop of steps is stored for its reverse pass.

    Attributes:
      loop: `loop(step, x, z, steps) -> z_T` for `step(x, z) -> z`.
      evaluations: how often each step runs in the forward and the reverse pass together.

    Example:
        >>> import bilevax as bx
        >>> bx.inner.every_step.evaluations, bx.inner.two_level.evaluations, bx.inner.store_all.evaluations
        (2, 3, 1)
    """

    loop: Callable
    evaluations: int


def _loop(step: Callable, x: chex.ArrayTree, z: Iterate, steps: int) -> Iterate:
    return jax.lax.scan(lambda z, _: (step(x, z), None), z, length=steps)[0]


def _every_step(step: Callable, x: chex.ArrayTree, z: Iterate, steps: int) -> Iterate:
    return _loop(jax.checkpoint(step, prevent_cse=False), x, z, steps)


def _two_level(step: Callable, x: chex.ArrayTree, z: Iterate, steps: int) -> Iterate:
    size = max(1, math.isqrt(steps))
    block = jax.checkpoint(lambda x, z: _every_step(step, x, z, size), prevent_cse=False)
    z = _loop(block, x, z, steps // size)
    return jax.checkpoint(lambda x, z: _every_step(step, x, z, steps % size))(x, z)


store_all = Checkpoint(_loop, 1)
every_step = Checkpoint(_every_step, 2)
two_level = Checkpoint(_two_level, 3)


def reverse(
    inner_loss: Loss,
    optimizer: Optimizer,
    steps: int,
    initial: Initial | None = None,
    sample: Sample = full,
    checkpoint: Checkpoint = every_step,
) -> InnerSolver:
    """Unrolls `steps` steps of the inner optimizer and differentiates through all of them.

        z_t = Φ(z_{t−1}, x),  t = 1..T          (x_bar, z0_bar) = [∂z_T/∂(x, z_0)]ᵀ z_bar

    This is the exact derivative of the program that runs, solved or not: momentum, moments and schedules included. (An
    optimizer with a line search, such as optax.lbfgs, loops an unknown number of times: JAX cannot reverse that.) For
    the last K of T steps only, write `chain(no_gradient(..., steps=T - K), reverse(..., steps=K))`.

    Args:
      inner_loss: g, a function (x, y, batch) -> scalar.
      optimizer: any optax transformation, or a function x ↦ transformation (learned step sizes and schedules).
      steps: T >= 0.
      initial: y_0 as a function of x (MAML: `lambda x: x`); by default y_0 is the warm y.
      sample: how step t draws its batch from the data: `full`, `minibatch(size)`, `per_step`, or your own.
      checkpoint: what the reverse pass stores. `every_step` keeps each z_t and computes the step again; `two_level`
        keeps about 2√T of them and computes each step twice again; `store_all` keeps every intermediate array.

    Returns:
      An `InnerSolver` without state.

    Raises:
      ValueError: if steps is negative, the optimizer is none, or its updates do not look like y.

    Cost: T gradients forward; `checkpoint.evaluations − 1` times T gradients and T pull-backs (a Hessian and a cross
    product at once) in reverse; T copies of z with `every_step`. The report adds one gradient.

    Reference: Maclaurin, Duvenaud, Adams, arXiv 1502.03492; Franceschi et al., arXiv 1703.01785, algorithm 1.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> solve = bx.differentiable(bx.inner.reverse(lambda x, y, batch: 0.5 * (y - x) ** 2, optax.sgd(0.5), steps=2))
        >>> float(jax.grad(solve)(1.0, 0.0, None))  # 1 − (1 − 0.5)²
        0.75
    """
    steps = checks.count("steps", steps)
    checks.instance("checkpoint", checkpoint, Checkpoint, "Pass every_step, two_level or store_all of bx.inner.")
    start, step, report = descent(inner_loss, optimizer, initial, sample)
    calls = Calls(0, checkpoint.evaluations * steps + 1, steps, steps)

    def init(x: chex.ArrayTree, y: chex.ArrayTree, batch: Any = None) -> tuple:
        check_point(x, y)
        return ()

    def forward(key: chex.PRNGKey | None, state: tuple, x: chex.ArrayTree, z: Iterate, batch: Any) -> tuple:
        step_key, *_ = split(key, 3)

        def unroll(x: chex.ArrayTree, z: Iterate) -> Iterate:
            return checkpoint.loop(lambda x, z: step(step_key, batch, x, z), x, z, steps)

        z_T, pull_back = jax.vjp(unroll, x, z)
        return z_T, (pull_back, step_key, x, z_T, batch), state

    def backward(residual: tuple, state: tuple, z_bar: Iterate) -> tuple:
        pull_back, step_key, x, z_T, batch = residual
        x_bar, z0_bar = pull_back(full_cotangent(z_bar, z_T))
        value, norm = report(step_key, batch, x, z_T)
        return (x_bar, z0_bar), state, SolverInfo(value, norm, ~jnp.isfinite(value + norm), calls, ())

    return InnerSolver(init, start, forward, backward)
