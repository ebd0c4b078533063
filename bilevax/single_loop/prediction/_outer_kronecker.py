"""Kronecker factors of the outer loss, by which d_v follows y."""

from typing import Any

import jax
import optax

from bilevax import checks
from bilevax.curvature.fisher import Fisher, exact
from bilevax.curvature.kronecker import product
from bilevax.curvature.model_loss import ModelLoss
from bilevax.printing import as_called
from bilevax.problem import Batch, BilevelProblem
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.prediction._kronecker import weighted_factors
from bilevax.single_loop.prediction.prediction_type import Prediction
from bilevax.typing import PyTree


@as_called
def outer_kronecker(outer_loss: ModelLoss, *, fisher: Fisher | None = None) -> Prediction:
    """The curvature of each agent's own outer loss by Kronecker factors: what d_v = ∇²g v − ∇f does as y moves.

        d̂_v = d_v − G (y − y_r)            G = blockdiag(A ⊗ B) of f at z_r

    The factors are those of `kronecker`, which has the change with v itself: chain the two. Where agents are very
    different they can be wrong, and steps that hold without them do not: `trusted(outer_kronecker(...))`, as the last
    link, takes them as far as they were right.

    Args:
      outer_loss: f, or what of it reads data, as a `bx.curvature.ModelLoss` of the outer batch.
      fisher: which pseudo-gradients B is made of, one that draws nothing; None for `bx.curvature.fisher.exact`.

    Returns:
      `Prediction` whose memory is the factors.

    Raises:
      ValueError: if `outer_loss` is no `ModelLoss`; from `init`, if a leaf of y is covered by no rule.

    Cost: as that of `kronecker`, with one product for each agent, layer and iteration in the place of two.

    Reference: own.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.ModelLoss(lambda y, a: a @ y, bx.curvature.squared_error, lambda x, batch: batch)
        >>> batch = bx.Batch((jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))), None)
        >>> start, end = (bx.Levels(jnp.zeros(()), *2 * [jnp.full((1, 1), s)]) for s in (0.0, 2.0))
        >>> model = bx.single_loop.prediction.outer_kronecker(loss)
        >>> memory = model.init(None, start, None, batch)
        >>> model.change(memory, None, start, end, batch).v.round(4).tolist()
        [[-10.0]]
    """
    checks.instance("outer_loss", outer_loss, ModelLoss, "Pass a bx.curvature.ModelLoss of the outer batch.")
    chosen = exact if fisher is None else fisher
    checks.function("fisher", chosen, "key", "loss", "outputs", "targets")

    def init(problem: BilevelProblem, point: Levels[PyTree], d: Levels[PyTree], batch: Batch) -> Any:
        return weighted_factors(outer_loss, point.x, point.y, batch.outer, chosen)

    def update(
        memory: Any,
        problem: BilevelProblem,
        start: Levels[PyTree],
        end: Levels[PyTree],
        change: Levels[PyTree],
        batch: Batch,
    ) -> Any:
        return init(problem, end, change, batch)

    def change(
        memory: Any, problem: BilevelProblem, start: Levels[PyTree], end: Levels[PyTree], batch: Batch
    ) -> Levels[PyTree]:
        if not jax.tree.leaves(end.v):
            return Levels(None, None, None)
        times = product(memory, outer_loss, start.x, start.y, batch.outer)
        return Levels(None, None, optax.tree.scale(-1, times(optax.tree.sub(end.y, start.y))))

    return Prediction(init, update, change)
