"""The reader of step sizes: a number, a schedule k -> number or an optax transformation, for each level or for one."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevax import checks
from bilevax.single_loop._levels import Levels, PerLevel, Rate, Schedule, at, levels
from bilevax.single_loop._preconditioned import Place, Preconditioned, preconditioned_move
from bilevax.single_loop.correction.correction_type import Move
from bilevax.typing import Array, PyTree, Scalar

StepSize: TypeAlias = Rate | optax.GradientTransformation | Preconditioned
StepSizes: TypeAlias = PerLevel[StepSize]


def decay(start: Scalar, power: Scalar) -> Schedule:
    """A step size that falls as a power of the iteration.

        a_k = start / (k + 1)^power

    Args:
      start: a_0 >= 0.
      power: >= 0.

    Returns:
      A schedule k -> a_k.

    Raises:
      ValueError: if `start` or `power` is negative.

    Cost: none.

    Example:
        >>> import bilevax as bx
        >>> float(bx.single_loop.decay(0.5, 1.0)(3))  # at the fourth iteration
        0.125
    """
    for name, value in (("start", start), ("power", power)):
        checks.scalar(name, value)
        checks.nonnegative(name, value)
    return lambda k: start / (jnp.asarray(k, float) + 1.0) ** power


def read_steps(step_sizes: Any, names: tuple[str, ...] = Levels._fields) -> Levels[Any]:
    """Reads the step size of each of these levels: a number, a schedule, a transformation, or `preconditioned`.

    Raises:
      ValueError: if one is something else or missing, or if there is one for a level that the method does not have.
    """
    steps, for_all = levels("step_sizes", step_sizes), type(step_sizes) not in (Levels, tuple, list)
    for name, step in steps._asdict().items():
        if name not in names:
            if step is not None and not for_all:
                raise ValueError(
                    f"step_sizes must hold no {name}, which this method does not have; got {step!r:.80}. Pass, say, "
                    f"bx.Levels(x=0.01, y=0.1)."
                )
        elif isinstance(step, Preconditioned):
            if name == "x":
                raise ValueError(
                    "step_sizes.x must be a number, a schedule or an optax transformation; got preconditioned(...), "
                    "which has the curvature of y. Precondition y and v."
                )
        elif isinstance(step, tuple | list | dict | str) or hasattr(step, "gradient_transformation") or step is None:
            if not isinstance(step, optax.GradientTransformation):
                raise ValueError(
                    f"step_sizes must hold a number, a schedule or an optax transformation for each level; got "
                    f"{step!r:.80} for {name}. Pass, say, bx.Levels(x=0.01, y=0.1, v=0.1); of optax.MultiSteps its "
                    f"gradient_transformation()."
                )
        else:
            check_step_size(f"step_sizes.{name}", step)
    return Levels(*(step if name in names else None for name, step in steps._asdict().items()))


def check_step_size(name: str, step: Any) -> None:
    """Raises ValueError unless it is a number >= 0, a schedule, or an optax transformation."""
    if isinstance(step, optax.GradientTransformation):
        return
    if isinstance(step, float | jax.Array) and not isinstance(step, jax.core.Tracer) and np.isnan(step).any():
        raise ValueError(
            f"{name} must be a finite number >= 0; got nan, which bx.single_loop.suggest_step_sizes returns where its "
            f"search found none: look at its breakdown, and pass it more pilots, or {name}=0.1 of your own."
        )
    check_schedule(name, step)


def check_schedule(name: str, step: Any) -> None:
    """Raises ValueError unless it is a number >= 0 or a schedule."""
    if isinstance(step, optax.GradientTransformation):
        raise ValueError(
            f"{name} must be a number or a schedule k -> number; got an optax transformation. Pass, say, {name}=0.1."
        )
    if callable(step):
        checks.function(name, step, "k")
        return
    checks.scalar(name, step)
    checks.nonnegative(name, step)


def check_series(step: Any) -> None:
    """Raises ValueError unless the step size of v, which scales a series, is a number > 0 or a schedule."""
    if not callable(step):
        checks.positive("step_sizes.v", step)


def move(step: StepSize, k: Scalar, place: Place) -> Move:
    """How a level moves along a corrected direction, for the step size of that level at iteration k."""
    if isinstance(step, Preconditioned):
        return preconditioned_move(step, at(k, step.step_size), place)
    if isinstance(step, optax.GradientTransformation):
        return Move(jax.vmap(step.init), jax.vmap(step.update), linear=False)

    def apply(t: PyTree, state: Any, s: PyTree) -> tuple[PyTree, Any]:
        a = at(k, step)
        return jax.tree.map(lambda leaf: (-a * leaf).astype(leaf.dtype), t), state

    return Move(lambda s: (), apply, linear=True)


def inner_optimizer(step_size: Any, k: Array) -> optax.GradientTransformation:
    """Gradient descent with the step size of iteration k, unless it is an optimizer already."""
    return step_size if isinstance(step_size, optax.GradientTransformation) else optax.sgd(at(k, step_size))


def outer_step(
    step_size: Any, k: Array, grad: PyTree, state: Any, x: PyTree, value: Array | None = None
) -> tuple[PyTree, Any]:
    """The next x, and the next state of its optimizer, which is offered the value and the gradient at x."""
    if isinstance(step_size, optax.GradientTransformation):
        extra = {} if value is None else checks.taken(step_size.update, {"value": value, "grad": grad})
        update, state = step_size.update(grad, state, x, **extra)
    else:
        update = optax.tree.scale(-at(k, step_size), grad)
    return optax.apply_updates(x, update), state
