"""What the losses say without data, such as a penalty, at the present point."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.curvature.model_loss import ModelLoss
from bilevax.printing import as_called
from bilevax.problem import Batch, BilevelProblem, directions, inner_gradient
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.prediction.prediction_type import Prediction, added
from bilevax.typing import Array, PyTree

NO_DATA = Batch(None, None)


@as_called
def data_free(problem: BilevelProblem | None = None) -> Prediction:
    """The part of the directions that reads no data, evaluated at the present point.

        d̂(z) = d(z_r) + r(z) − r(z_r)          r = the directions of the losses without data

    Args:
      problem: what of f and g reads no data, as losses of one signature `loss(x, y, batch)` that are given None for
        their batch; 0.0 for a loss without such a part. None for an inner loss that is a `bx.curvature.ModelLoss`,
        whose penalty ½ Σ l2 (y − center)² is such a part, and for none of f.

    Returns:
      `Prediction` without a memory.

    Raises:
      ValueError: if `problem` is none; from `init`, if it is left out and the inner loss is no `ModelLoss`, or its
        losses cannot be evaluated without a batch.

    Cost: for each agent and iteration two ∇f, ∇_y g and pull-backs of these parts alone, which `Info.calls` does not
    count: no pass over the data. Of directions that differ from `second_order()` it predicts what it can: without v
    those of y alone.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> decay = bx.BilevelProblem(lambda x, y, _: 0.0, lambda x, y, _: 0.5 * jnp.exp(x) * jnp.sum(y**2))
        >>> model = bx.single_loop.prediction.data_free(decay)
        >>> start, end = bx.Levels(0.0, jnp.zeros(2), jnp.ones(2)), bx.Levels(0.0, jnp.ones(2), jnp.ones(2))
        >>> change = model.change((), None, start, end, None)
        >>> float(change.x), change.y.tolist(), change.v.tolist()
        (-2.0, [1.0, 1.0], [0.0, 0.0])
    """
    if problem is not None:
        fix = "Pass bx.BilevelProblem(outer_loss, inner_loss), functions (x, y, batch) that read no batch."
        checks.instance("problem", problem, BilevelProblem, fix)
        checks.function("problem.outer_loss", problem.outer_loss, "x", "y", "batch")
        checks.function("problem.inner_loss", problem.inner_loss, "x", "y", "batch")

    def init(whole: BilevelProblem, point: Levels[PyTree], d: Levels[PyTree], batch: Batch) -> Any:
        if problem is None:
            _penalty(whole)
        else:
            _check_reads_no_data(problem, point)
        return ()

    def update(memory: Any, *refreshed: Any) -> Any:
        return memory

    def change(
        memory: Any, whole: BilevelProblem, start: Levels[PyTree], end: Levels[PyTree], batch: Batch
    ) -> Levels[PyTree]:
        known = _penalty(whole) if problem is None else problem
        return added(_directions(known, end), _directions(known, start), sign=-1)

    return Prediction(init, update, change)


def _directions(problem: BilevelProblem, point: Levels[PyTree]) -> Levels[PyTree]:
    if not jax.tree.leaves(point.v):  # a method without v
        return Levels(None, inner_gradient(problem.inner_loss, point.x, point.y, None).gradient, None)
    return Levels(*directions(problem, *point, NO_DATA))


def _check_reads_no_data(problem: BilevelProblem, point: Levels[PyTree]) -> None:
    """Raises ValueError where the losses are not to be had without a batch."""
    for name, loss in zip(("outer_loss", "inner_loss"), problem, strict=True):
        try:
            jax.eval_shape(lambda x, y, loss=loss: loss(x, y, None), point.x, point.y)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"problem.{name} must be the part of a loss that reads no data: it is given None for its batch; got "
                f"{type(error).__name__}: {error!s:.200}. Leave out what reads the batch, or return 0.0."
            ) from error


def _penalty(problem: BilevelProblem) -> BilevelProblem:
    """The penalty of a `ModelLoss`, which reads no data."""
    inner_loss = problem.inner_loss
    if not isinstance(inner_loss, ModelLoss):
        raise ValueError(
            f"problem must say what of the losses reads no data, unless the inner loss is a bx.curvature.ModelLoss; "
            f"got None beside {inner_loss!r:.80}. Pass, say, data_free(bx.BilevelProblem(lambda x, y, _: 0.0, lambda "
            f"x, y, _: penalty(x, y)))."
        )

    def no_outer_loss(x: PyTree, y: PyTree, batch: Any) -> Array:
        return jnp.zeros(())

    def penalty(x: PyTree, y: PyTree, batch: Any) -> Array:
        return inner_loss.penalty_value(x, y)

    return BilevelProblem(no_outer_loss, penalty)
