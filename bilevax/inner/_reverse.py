"""Reverse-mode differentiation through the steps of the inner optimizer."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.carried import parameters
from bilevax.inner._optimizer_steps import (
    Begin,
    Initial,
    Optimizer,
    check_point,
    diverged,
    full_cotangent,
    optimizer_steps,
    step_keys,
    watch,
)
from bilevax.printing import as_called, by_text
from bilevax.problem import Calls, InnerSolver, Iterate, Loss, SolverInfo
from bilevax.sampling import Sample, full
from bilevax.typing import Key, PyTree

PureStep: TypeAlias = Callable[[PyTree, PyTree], PyTree]
"""`step(x, z) -> z`, with its batch inside; z is any pytree."""


class Loop(Protocol):
    """`loop(step, x, z, steps) -> z_T`, a function of yours or of this file."""

    def __call__(self, step: PureStep, x: PyTree, z: PyTree, steps: int, /) -> PyTree: ...


class Checkpoint(NamedTuple):
    """How a loop of steps is stored for its reverse pass.

    Attributes:
      loop: `loop(step, x, z, steps) -> z_T` for `step(x, z) -> z`, with z any pytree.
      evaluations: `evaluations(steps) -> number` of inner gradients in the forward and the reverse pass together.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx
        >>> names = [bx.inner.every_step, bx.inner.two_level, bx.inner.store_all, bx.inner.store_products(every=3)]
        >>> [checkpoint.evaluations(30) for checkpoint in names]
        [60, 90, 30, 50]
    """

    loop: Loop
    evaluations: Callable[[int], int]
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


def _loop(step: PureStep, x: PyTree, z: PyTree, steps: int) -> PyTree:
    return jax.lax.scan(lambda z, _: (step(x, z), None), z, length=steps)[0]


def _every_step(step: PureStep, x: PyTree, z: PyTree, steps: int) -> PyTree:
    return _loop(jax.checkpoint(step, prevent_cse=False), x, z, steps)


def _two_level(step: PureStep, x: PyTree, z: PyTree, steps: int) -> PyTree:
    size = max(1, math.isqrt(steps))
    block = jax.checkpoint(lambda x, z: _every_step(step, x, z, size), prevent_cse=False)
    z = _loop(block, x, z, steps // size)
    return jax.checkpoint(lambda x, z: _every_step(step, x, z, steps % size))(x, z)


store_all = Checkpoint(_loop, lambda steps: steps, "store_all")
every_step = Checkpoint(_every_step, lambda steps: 2 * steps, "every_step")
two_level = Checkpoint(_two_level, lambda steps: 3 * steps, "two_level")


@as_called
def store_products(every: int = 1) -> Checkpoint:
    """Keeps each z_t, and the results of all matrix products in one step of `every`.

    Between `every_step` and `store_all`: where the products are kept, what the reverse pass computes again is cheap.
    With every = 1 it is often as fast as `store_all`, which moves more memory; a larger one is nearer to `every_step`.

    Args:
      every: a whole number >= 1.

    Returns:
      A `Checkpoint` for `reverse`.

    Raises:
      ValueError: if every < 1.

    Cost: 2 T − ⌊T / every⌋ inner gradients for T steps; T copies of z and ⌊T / every⌋ times the products of a step.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> checkpoint = bx.inner.store_products(every=2)
        >>> loss = lambda x, y, batch: 0.5 * (y - x) ** 2
        >>> solve = bx.differentiable(bx.inner.reverse(loss, optax.sgd(0.5), steps=2, checkpoint=checkpoint))
        >>> float(jax.grad(solve)(1.0, 0.0, None))
        0.75
    """
    every = checks.count("every", every, minimum=1)

    def loop(step: PureStep, x: PyTree, z: PyTree, steps: int) -> PyTree:
        keep = jax.checkpoint(step, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
        z = _loop(lambda x, z: keep(x, _every_step(step, x, z, every - 1)), x, z, steps // every)
        return _every_step(step, x, z, steps % every)

    return Checkpoint(loop, lambda steps: 2 * steps - steps // every)


class ReverseResidual(NamedTuple):
    """The pull-back of all steps, and what the report is made from."""

    pull_back: Callable[[Iterate], tuple[PyTree, Iterate]]
    step_key: Key | None
    x: PyTree
    begin: Begin
    end: Iterate
    batch: PyTree


@as_called
def reverse(
    inner_loss: Loss,
    optimizer: Optimizer,
    steps: int,
    *,
    initial: Initial | None = None,
    sample: Sample = full,
    checkpoint: Checkpoint = every_step,
) -> InnerSolver:
    """Unrolls `steps` steps of the inner optimizer and differentiates through all of them.

        z_t = Φ(z_{t−1}, x),  t = 1..T          (x_bar, z0_bar) = [∂z_T/∂(x, z_0)]ᵀ z_bar

    This is the exact derivative of the program that runs, solved or not: momentum, moments and schedules included. (An
    optimizer with a line search, such as optax.lbfgs, loops an unknown number of times: JAX cannot reverse that.) For
    the last K of T steps only, write `chain(no_gradient(..., steps=T - K), reverse(..., steps=K))`.

    Adam and its kin are differentiated also where an entry of the gradient is exactly 0 (a layer that starts at zero, a
    row of an embedding that no batch reads). One so small that its square is rounded to 0 has no finite derivative:
    `info.breakdown` says so, and an `eps_root` > 0 of the optimizer helps.

    Args:
      inner_loss: g, a function (x, y, batch) -> scalar.
      optimizer: any optax transformation, or a function x ↦ transformation (learned step sizes and schedules). Of
        value, grad, value_fn, obj_fn and grad_fn it gets those that its `update` takes.
      steps: T >= 0.
      initial: y_0 as a function of x (MAML: `lambda x: x`); by default y_0 is the warm y.
      sample: how step t draws its batch from the data: `full`, `minibatch(size)`, `per_step`, or your own.
      checkpoint: what the reverse pass stores. `every_step` keeps each z_t and computes the step again; `two_level`
        keeps about 2√T of them and computes each step twice again; `store_all` keeps every intermediate array;
        `store_products(every)` keeps matrix products, the dear part, of one step in `every`.

    Returns:
      An `InnerSolver` without state.

    Raises:
      ValueError: if steps is negative, the optimizer is none, or its updates do not look like y.

    Cost: `checkpoint.evaluations(T)` gradients and T pull-backs (a Hessian and a cross product at once); T copies of z
    with `every_step`. The report adds one gradient.

    Reference: Maclaurin, Duvenaud, Adams, arXiv 1502.03492; Franceschi et al., arXiv 1703.01785, algorithm 1.

    Example:
        >>> import bilevax as bx, jax, optax
        >>> solve = bx.differentiable(bx.inner.reverse(lambda x, y, batch: 0.5 * (y - x) ** 2, optax.sgd(0.5), steps=2))
        >>> float(jax.grad(solve)(1.0, 0.0, None))  # 1 − (1 − 0.5)²
        0.75
    """
    steps = checks.count("steps", steps)
    checks.instance("checkpoint", checkpoint, Checkpoint, "Pass, say, bx.inner.every_step or two_level.")
    checks.function("checkpoint.loop", checkpoint.loop, "step", "x", "z", "steps")
    start, _, step, report = optimizer_steps(inner_loss, optimizer, initial, sample)
    calls = Calls(0, checkpoint.evaluations(steps) + 1, steps, steps)

    def init(x: PyTree, y: PyTree, batch: PyTree = None) -> tuple[()]:
        """No memory; x and y are checked."""
        check_point(x, y)
        return ()

    def forward(
        key: Key | None, state: tuple[()], x: PyTree, z: Iterate, batch: PyTree
    ) -> tuple[Iterate, ReverseResidual, tuple[()]]:
        """z_T, of the shapes of z, after all steps, with their pull-back."""
        step_key = step_keys(key).steps

        def unroll(x: PyTree, z: Iterate) -> tuple[Iterate, Begin]:
            z_T, begin = checkpoint.loop(lambda x, watched: step(step_key, batch, x, watched), x, watch(z), steps)
            return z_T, begin

        z_T, pull_back, begin = jax.vjp(unroll, x, z, has_aux=True)
        return z_T, ReverseResidual(pull_back, step_key, x, begin, z_T, batch), state

    def backward(
        residual: ReverseResidual, state: tuple[()], z_bar: Iterate
    ) -> tuple[tuple[PyTree, Iterate], tuple[()], SolverInfo]:
        """x_bar like x and z0_bar like z_0, moments and all, from a cotangent whose missing parts are zero."""
        pull_back, step_key, x, begin, z_T, batch = residual
        try:
            x_bar, z0_bar = pull_back(full_cotangent(z_bar, z_T))
        except ValueError as error:
            if "while_loop" not in str(error):
                raise
            raise ValueError(
                "optimizer of inner.reverse must have steps that JAX can reverse; got one with a loop of unknown "
                "length, such as the line search of optax.lbfgs (or such a loop in inner_loss). Pass it to "
                "inner.implicit or inner.forward_gradient, or switch the line search off: "
                "optax.lbfgs(0.1, linesearch=None)."
            ) from error
        value, norm = report(step_key, batch, x, z_T)
        breakdown = ~jnp.isfinite(value + norm) | diverged(begin, value, norm)
        z0_bar = z0_bar._replace(y=parameters(z0_bar.y))
        return (x_bar, z0_bar), state, SolverInfo(value, norm, breakdown, calls, ())

    return InnerSolver(init, start, forward, backward, fresh=initial is not None)
