"""A prediction that is not believed further than the directions are long."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.printing import as_called
from bilevax.problem import Batch, BilevelProblem, norm
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.prediction.prediction_type import Prediction, added
from bilevax.typing import PyTree


@as_called
def bounded(predict: Prediction) -> Prediction:
    """A prediction whose changes of d_y and d_v are at most as long as these were at the last refresh.

        change = p · min(1, ‖D‖ / ‖p‖)          level by level; that of d_x as it is

    A linear model of the directions grows with the way that y and v go, and they go the farther the longer it is: where
    steps are long for the curvature of the last refresh, models diverge that the directions themselves, which bend,
    would hold. With bounded changes y and v are driven at most twice as hard as with frozen directions, and longer
    steps hold.

    Args:
      predict: the `Prediction`, whole: it is told the whole change, and so is no last link of a `chain`.

    Returns:
      `Prediction` whose memory is `(D, memory of predict)`.

    Raises:
      ValueError: if `predict` is no `Prediction`.

    Cost: that of `predict`, two norms for each agent and iteration, and a copy of the directions.

    Reference: own.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.prediction.bounded(bx.single_loop.prediction.secants(4))
        bounded(secants(4))
    """
    checks.instance("predict", predict, Prediction, "Pass, say, bx.single_loop.prediction.kronecker().")

    def init(problem: BilevelProblem, point: Levels[PyTree], d: Levels[PyTree], batch: Batch) -> Any:
        return d, predict.init(problem, point, d, batch)

    def update(
        memory: Any,
        problem: BilevelProblem,
        start: Levels[PyTree],
        end: Levels[PyTree],
        change: Levels[PyTree],
        batch: Batch,
    ) -> Any:
        d, known = memory
        return added(d, change), predict.update(known, problem, start, end, change, batch)

    def change(
        memory: Any, problem: BilevelProblem, start: Levels[PyTree], end: Levels[PyTree], batch: Batch
    ) -> Levels[PyTree]:
        (_, y, v), known = memory
        by = predict.change(known, problem, start, end, batch)
        return Levels(by.x, _within(by.y, y), _within(by.v, v))

    return Prediction(init, update, change)


def _within(change: PyTree, d: PyTree) -> PyTree:
    """The change, no longer than d; as it is where one of them is not there."""
    if change is None or d is None or not jax.tree.leaves(d):
        return change
    long = norm(change)
    share = jnp.minimum(1, norm(d) / jnp.where(long > 0, long, 1))
    return optax.tree.cast_like(jax.tree.map(lambda leaf: share * leaf, change), change)
