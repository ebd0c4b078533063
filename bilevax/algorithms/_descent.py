"""A whole method out of a hypergradient: one estimate and one outer step in each iteration."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.carried import parameters
from bilevax.hypergradients._checked import check_hypergrad, estimated
from bilevax.hypergradients._hypergradient import HypergradientInfo
from bilevax.printing import as_called, by_shape
from bilevax.problem import (
    Algorithm,
    Batch,
    BilevelProblem,
    Calls,
    Hypergradient,
    InnerSolver,
    Iterate,
    SolverInfo,
    arrays,
    norm,
    owned,
)
from bilevax.sampling import Sample, check_key, fold, full, split
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.step_sizes import StepSizes, check_schedule, check_step_size, outer_step, read_steps
from bilevax.typing import Array, Key, PyTree, Scalar


class DescentState(NamedTuple):
    """The state of a method that descends along a hypergradient.

    Attributes:
      k: iterations so far; scalar.
      x: outer variable.
      estimator: the memory of the hypergradient, with y in it.
      optimizer: the state of the outer optimizer; () for a number or a schedule.

    Example:
        >>> import bilevax as bx
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> state = bx.algorithms.stocbio(problem, 0.1, sample=bx.sampling.full).init(1.0, 2.0)
        >>> state.k.item(), state.x.item(), state.y.item()
        (0, 1.0, 2.0)
    """

    k: Array
    x: PyTree
    estimator: Any
    optimizer: Any

    @property
    def y(self) -> PyTree:
        """The inner variable."""
        return self.estimator.y

    def __repr__(self) -> str:
        return by_shape(self)


class DescentInfo(NamedTuple):
    """What one iteration reports; scalars.

    Attributes:
      moves: `Levels` of ‖s⁺ − s‖; () for the v of a hypergradient.
      breakdown: True where the estimate cannot be trusted, or x or y is not finite.
      calls: `Calls` of the iteration.
      outer_loss: f at the x before the step and at its y, on the outer batch of the iteration; None in `vrbo`.
      inner_loss: g there, on a batch of the hypergradient; None where it has none.

    Example:
        >>> import bilevax as bx, jax
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> method = bx.algorithms.stocbio(problem, 0.1, sample=bx.sampling.full, steps=10)
        >>> _, info = jax.jit(method.step)(None, method.init(1.0, 1.0), bx.Batch(None, None))
        >>> info.outer_loss.item(), int(info.calls.hessian_products)
        (1.0, 10)
    """

    moves: Levels[PyTree]
    breakdown: Array
    calls: Calls
    outer_loss: Array | None
    inner_loss: Array | None

    def __repr__(self) -> str:
        return by_shape(self)


@as_called
def descent(
    hypergrad: Hypergradient | Callable[[Array], Hypergradient],
    step_size: Any,
    *,
    outer_sample: Sample = full,
    inner_data: Sample = full,
) -> Algorithm:
    """Descends along a hypergradient: the bridge from an estimate to a method that one `lax.scan` drives.

        d ≈ ∇F(x) from the hypergradient of iteration k,      x ← x − a d

    Args:
      hypergrad: a `Hypergradient`, or a function k -> `Hypergradient` for step sizes or penalties that change with the
        iteration; k is traced, and the state must look the same for all k.
      step_size: a number, a schedule k -> number, or an optax transformation.
      outer_sample: `sample(key, t, data) -> batch` for the data of f; all by default. The hypergradient draws its
        batches of g itself.
      inner_data: `sample(key, t, data)`, what the hypergradient takes for the data of g in iteration k.

    Returns:
      `Algorithm(init, step)` with `DescentState` and `DescentInfo`.

    Raises:
      ValueError: if an argument is of another kind; as the hypergradient; if its info is no `HypergradientInfo`.

    Cost: that of the hypergradient.

    Example:
        >>> import bilevax as bx, jax
        >>> problem = bx.BilevelProblem(lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2)
        >>> solver = bx.inner.implicit(problem.inner_loss, ihvp=bx.ihvp.exact())
        >>> method = bx.algorithms.descent(bx.hypergradient(problem.outer_loss, solver), 0.25)
        >>> state, info = jax.jit(method.step)(None, method.init(1.0, 1.0), bx.Batch(None, None))
        >>> float(state.x), float(state.y)
        (0.5, 1.0)
    """
    check_step_size("step_size", step_size)
    for name, sample in (("outer_sample", outer_sample), ("inner_data", inner_data)):
        checks.function(name, sample, "key", "t", "data")
    if not isinstance(hypergrad, Hypergradient) and not callable(hypergrad):
        raise ValueError(
            f"hypergrad must be a Hypergradient, or a function k -> Hypergradient; got {hypergrad!r:.80}. Pass, say, "
            f"bx.hypergradient(outer_loss, solver)."
        )
    if isinstance(hypergrad, Hypergradient):
        check_hypergrad("hypergrad", hypergrad)
    else:
        checks.function("hypergrad", hypergrad, "k")

    def at_iteration(k: Array) -> Hypergradient:
        if isinstance(hypergrad, Hypergradient):
            return hypergrad
        made = hypergrad(k)
        check_hypergrad("hypergrad(k)", made, "Return bx.hypergradient(outer_loss, solver) from it.")
        return made

    def init(x: PyTree, y: PyTree, batch: Batch | None = None) -> DescentState:
        """The first state, with the warm y in that of the hypergradient, which says whether it reads the batch."""
        x, k = arrays(x), jnp.zeros((), jnp.int32)
        optimizer = step_size.init(x) if isinstance(step_size, optax.GradientTransformation) else ()
        memory = at_iteration(k).init(x, y, batch)
        checks.has_y("hypergrad", memory)
        return owned(DescentState(k, x, memory, optimizer))

    def step(key: Key | None, state: DescentState, batch: Batch) -> tuple[DescentState, DescentInfo]:
        """One estimate and one step on x: (state, info); the key may be None where nothing is drawn."""
        checks.instance("state", state, DescentState, "Pass step(key, state, batch) the state of init or of a step.")
        checks.instance("batch", batch, Batch, "Pass bx.Batch(outer=..., inner=...).")
        check_key(key)
        estimate_key, outer_key, inner_key = split(fold(key, state.k), 3)
        outer = outer_sample(outer_key, state.k, batch.outer)
        data = Batch(outer, inner_data(inner_key, state.k, batch.inner))
        parts = at_iteration(state.k).estimate(estimate_key, state.estimator, state.x, data)
        grad, memory, info = estimated(parts, state.x, state.estimator)
        checks.instance("info of hypergrad.estimate", info, HypergradientInfo, "Take one that is made of one solver.")
        x, optimizer = outer_step(step_size, state.k, grad, state.optimizer, state.x, info.outer_loss)
        moves: Levels[Any] = Levels(
            norm(optax.tree.sub(x, state.x)), norm(optax.tree.sub(parameters(memory.y), parameters(state.y))), ()
        )
        breakdown = info.inner.breakdown | ~jnp.isfinite(moves.x + moves.y)
        info = DescentInfo(moves, breakdown, info.inner.calls, info.outer_loss, info.inner.inner_loss)
        return DescentState(state.k + 1, x, memory, optimizer), info

    return Algorithm(init, step)


def check_levels(
    problem: Any, step_sizes: StepSizes, sample: Any, names: tuple[str, ...] = Levels._fields
) -> Levels[Any]:
    """Reads the step sizes of x and y, which may be optax transformations, and of v, which may not."""
    checks.instance("problem", problem, BilevelProblem, "Pass bx.BilevelProblem(outer_loss, inner_loss).")
    checks.function("sample", sample, "key", "t", "data")
    sizes = read_steps(step_sizes, names)
    if "v" in names:
        check_schedule("step_sizes.v", sizes.v)
    return sizes


def counting(solver: InnerSolver, inner_gradients: Scalar) -> InnerSolver:
    """The solver with so many evaluations of ∇_y g more in its report."""

    def backward(residual: Any, state: Any, z_bar: Iterate) -> tuple[tuple[PyTree, Iterate], Any, SolverInfo]:
        bars, state, info = solver.backward(residual, state, z_bar)
        calls = info.calls._replace(inner_gradients=info.calls.inner_gradients + inner_gradients)
        return bars, state, info._replace(calls=calls)

    return solver._replace(backward=backward)


def stepped(tree: PyTree, scale: Scalar, direction: PyTree) -> PyTree:
    """`tree` + scale · direction, in the dtypes of `tree`."""
    return optax.tree.cast_like(optax.tree.add_scale(tree, scale, direction), tree)
