"""The start, the step and the report that all first-order inner solvers share."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevax import checks
from bilevax.carried import Carried, carried_like, carrying, parameters, with_parameters
from bilevax.inner._extra_arguments import check_state, update_of
from bilevax.inner._smooth_roots import smooth_roots
from bilevax.meshes import on_mesh, zeros_like
from bilevax.problem import Iterate, Loss, Start, arrays, norm, wide_dtype
from bilevax.sampling import Sample, fold, split
from bilevax.typing import Array, Key, PyTree

GROWTH = 10  # of ‖∇_y g‖ over the inner steps: where g grows too, they diverge

Optimizer: TypeAlias = optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation]
Initial: TypeAlias = Callable[[PyTree], PyTree]


class Solve(Protocol):
    """`solve(x, y0, batch) -> y_T`, a function of yours, in place of the steps of an optimizer."""

    def __call__(self, x: PyTree, y0: PyTree, batch: PyTree, /) -> PyTree: ...


class StepKeys(NamedTuple):
    """What becomes of the key of `forward`; each of them is None where there is no key.

    Attributes:
      steps: for the batches of the inner steps: step t folds in t.
      ihvp: for `IHVP.prepare`.
      cross: for the batch of the cross derivative.

    Example:
        >>> import bilevax as bx
        >>> bx.inner.StepKeys(steps=None, ihvp=None, cross=None).steps is None
        True
    """

    steps: Key | None
    ihvp: Key | None
    cross: Key | None


def step_keys(key: Key | None) -> StepKeys:
    """The split that all solvers with steps share: from one key they make the same steps, whatever their derivative.

        steps, ihvp, cross = split(key, 3)          step t draws with fold(steps, t)

    Args:
      key: of `forward`, or None.

    Returns:
      `StepKeys(steps, ihvp, cross)`.

    Raises:
      ValueError: if the key is none of `jax.random.key`.

    Cost: one split.

    Example:
        >>> import bilevax as bx, jax
        >>> key = jax.random.key(0)
        >>> bool(bx.inner.step_keys(key).ihvp == jax.random.split(key, 3)[1])
        True
    """
    return StepKeys(*split(key, 3))


class Begin(NamedTuple):
    """What the first step of a solve saw, by which the last iterate is judged.

    Attributes:
      known: False until a step was taken.
      loss: g at z_0.
      gradient_norm: ‖∇_y g‖ at z_0.
    """

    known: Array
    loss: Array
    gradient_norm: Array


class Watched(NamedTuple):
    """An iterate on its way, and what its first step saw."""

    z: Iterate
    begin: Begin


class WatchedStep(Protocol):
    """One optimizer step, whose loss and gradient are kept where it is the first."""

    def __call__(self, key: Key | None, data: PyTree, x: PyTree, watched: Watched) -> Watched: ...


class InnerStep(Protocol):
    """One optimizer step on the batch drawn at z.t."""

    def __call__(self, key: Key | None, data: PyTree, x: PyTree, z: Iterate) -> Iterate: ...


class Report(Protocol):
    """g and ‖∇_y g‖ at z.y."""

    def __call__(self, key: Key | None, data: PyTree, x: PyTree, z: Iterate) -> tuple[Array, Array]: ...


class OptimizerSteps(NamedTuple):
    """Pure functions of one inner optimization.

    Attributes:
      start: `start(x, y) -> z`.
      step: `step(key, data, x, z) -> z`, one optimizer step on the batch drawn at z.t.
      watched_step: `watched_step(key, data, x, watched) -> watched`, the same from `watch(z)`: what the first step saw
        is kept, for `diverged`.
      report: `report(key, data, x, z) -> (g, ‖∇_y g‖)` at z.y, on the batch of the last step.
    """

    start: Start
    step: InnerStep
    watched_step: WatchedStep
    report: Report


def optimizer_steps(inner_loss: Loss, optimizer: Optimizer, initial: Initial | None, sample: Sample) -> OptimizerSteps:
    """Builds the functions from a loss, an optimizer (or a function x ↦ optimizer), a first point and a sampler."""
    loss = carrying("inner_loss", inner_loss)
    gradient_of = jax.value_and_grad(loss, argnums=1, has_aux=True)
    checks.function("sample", sample, "key", "t", "data")
    if initial is not None:
        checks.function("initial", initial, "x")

    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()

    def make(x: PyTree) -> optax.GradientTransformation:
        made = optimizer if isinstance(optimizer, optax.GradientTransformation) else optimizer(x)
        checks.instance("optimizer(x)", made, optax.GradientTransformation, "Return from it, say, optax.sgd(x).")
        return made

    # optax.sgd, not called, would take x for its learning rate.
    uncalled = inspect.isfunction(optimizer) and (optimizer.__module__ or "").startswith("optax.")
    if uncalled or not (isinstance(optimizer, optax.GradientTransformation) or callable(optimizer)):
        raise ValueError(
            f"optimizer must be an optax.GradientTransformation, or a function of x that returns one; got "
            f"{optimizer!r}. Pass, say, optax.sgd(0.1), or lambda x: optax.sgd(x)."
        )

    def draw(key: Key | None, data: PyTree, t: Array) -> PyTree:
        return sample(fold(key, t), t, data)

    def start(x: PyTree, y: PyTree) -> Iterate:
        """z_0: y like y (or `initial(x)`), a fresh optimizer state, and t = 0."""
        y0 = arrays(y if initial is None else initial(x))
        if initial is not None:
            checks.same_shapes("y under initial", y0, y, f"Return from initial(x) {_like_y(y)}.")
            checks.floating("y under initial", parameters(y0))
        y0 = with_parameters(y0, parameters(y0))
        opt_state = on_mesh(make(x).init)(parameters(y0))
        check_state(opt_state)
        return Iterate(y0, opt_state, jnp.zeros((), jnp.int32))

    def move(key: Key | None, data: PyTree, x: PyTree, z: Iterate) -> tuple[Iterate, Array, PyTree]:
        """z_t from z_{t−1}, of the same shapes, on the batch that the key and t − 1 draw; with g and ∇_y g there."""
        batch = draw(key, data, z.t)
        params = parameters(z.y)
        (value, y), gradient = gradient_of(x, params, z.y, batch)
        update = update_of(make(x), value, gradient, lambda p: loss(x, p, z.y, batch)[0])
        updates, opt_state = smooth_roots(update)(gradient, z.opt_state, params)
        fix = "Give the inner solver an optimizer whose updates look like y and whose state keeps its shapes."
        checks.same_shapes("y under the inner optimizer", updates, params, fix)
        checks.same_shapes("state of the inner optimizer", opt_state, z.opt_state, fix)
        return Iterate(with_parameters(y, optax.apply_updates(params, updates)), opt_state, z.t + 1), value, gradient

    def step(key: Key | None, data: PyTree, x: PyTree, z: Iterate) -> Iterate:
        """z_t from z_{t−1}."""
        return move(key, data, x, z)[0]

    def watched_step(key: Key | None, data: PyTree, x: PyTree, watched: Watched) -> Watched:
        """The same; of every step but the first, the loss and the gradient are forgotten."""
        z, begin = watched
        z, value, gradient = move(key, data, x, z)
        value, gradient = jax.lax.stop_gradient((value, gradient))

        def first() -> Begin:
            return Begin(jnp.asarray(True), value.astype(begin.loss.dtype), norm(gradient).astype(begin.loss.dtype))

        return Watched(z, jax.lax.cond(begin.known, lambda: begin, first))

    def report(key: Key | None, data: PyTree, x: PyTree, z: Iterate) -> tuple[Array, Array]:
        """Two scalars at z.y: the loss and the norm of its gradient, on the batch of the last step."""
        (value, _), gradient = gradient_of(x, parameters(z.y), z.y, draw(key, data, jnp.maximum(z.t - 1, 0)))
        return value, norm(gradient)

    return OptimizerSteps(start, step, watched_step, report)


def watch(z: Iterate) -> Watched:
    """Nothing is seen yet, before the first step from z."""
    leaves = [leaf for leaf in jax.tree.leaves(parameters(z.y)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    # like y, so that in a shard_map they vary over the devices where y does
    zero = jax.lax.stop_gradient(jnp.zeros_like(leaves[0], shape=(), dtype=wide_dtype(*leaves)))
    return Watched(z, Begin(zero > 0, zero, zero))


def run_watched(
    step: WatchedStep, key: Key | None, data: PyTree, x: PyTree, z: Iterate, steps: int
) -> tuple[Iterate, Begin]:
    """z_T after so many steps, and what the first of them saw."""
    return jax.lax.scan(lambda watched, _: (step(key, data, x, watched), None), watch(z), length=steps)[0]


def diverged(begin: Begin, value: Array, gradient_norm: Array) -> Array:
    """Whether the steps left y worse than they found it: g larger, beyond rounding, and ∇_y g more than tenfold."""
    value = value.astype(begin.loss.dtype)
    rounding = 8 * jnp.finfo(value.dtype).eps * (jnp.abs(value) + jnp.abs(begin.loss))
    return begin.known & (value > begin.loss + rounding) & (gradient_norm > GROWTH * begin.gradient_norm)


def zero_cotangent(tree: PyTree) -> PyTree:
    """Zeros of the cotangent type of every leaf: float0 for counts and keys."""

    def zero(leaf: Any) -> Any:
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return zeros_like(leaf)
        return np.zeros(jnp.shape(leaf), jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def full_cotangent(z_bar: Iterate, z: Iterate) -> Iterate:
    """Writes out the parts of a cotangent that stand for zero, and those of what y carries."""
    if isinstance(z.y, Carried) and z_bar.y is not None:
        z_bar = z_bar._replace(y=Carried(z_bar.y, zero_cotangent(z.y.carried)))
    parts = (zero_cotangent(part) if bar is None else bar for bar, part in zip(z_bar, z, strict=True))
    return Iterate(*parts)


def solution(y: PyTree, y0: PyTree, function: str = "solve", argument: str = "y0") -> PyTree:
    """What a function of somebody else returned for y0, in the dtypes of y0, if it looks like it."""
    fix = f"Return from {function}(x, {argument}, batch) {_like_y(y0, argument)}."
    checks.same_shapes(f"y under {function}", y, y0, fix)
    params = optax.tree.cast_like(arrays(parameters(y)), parameters(y0))
    if not isinstance(y0, Carried):
        return params
    return Carried(params, carried_like(f"carried under {function}", y.carried, y0.carried, fix))


def _like_y(y: PyTree, name: str = "y") -> str:
    return f"bx.inner.Carried(params, carried), like {name}" if isinstance(y, Carried) else f"a pytree like {name}"


def check_point(x: PyTree, y: PyTree) -> None:
    """Raises ValueError unless x and y are nonempty pytrees of floating-point arrays, but for what y carries."""
    checks.floating("x", x)
    checks.floating("y.params" if isinstance(y, Carried) else "y", parameters(y))
