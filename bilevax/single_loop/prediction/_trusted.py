"""A prediction that is believed as far as it was right."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import checks
from bilevax.printing import as_called
from bilevax.problem import Batch, BilevelProblem, wide_dtype
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.prediction.prediction_type import Prediction
from bilevax.typing import Array, PyTree, Scalar


class TrustedState(NamedTuple):
    """What a prediction remembers, and how right it was, one number for each of the three levels.

    Attributes:
      memory: of the prediction.
      agreement: running mean of ⟨p, c⟩ / ‖p‖‖c‖, [3], of changes c and what was predicted of them, p.
      size: the same of ‖p‖ / ‖c‖, [3].

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> point = bx.Levels(jnp.zeros(2), jnp.zeros(3), jnp.zeros(3))
        >>> model = bx.single_loop.prediction.trusted(bx.single_loop.prediction.secants(4))
        >>> model.init(None, point, point, None).agreement.tolist()
        [0.0, 0.0, 0.0]
    """

    memory: Any
    agreement: Array
    size: Array


@as_called
def trusted(predict: Prediction, *, rate: Scalar = 0.3) -> Prediction:
    """A prediction times the factor by which it would have been best at the last refreshes.

        change = θ p        θ = mean [⟨p, c⟩ / ‖p‖‖c‖] / mean [‖p‖ / ‖c‖], within [0, 1]

    At each refresh what was predicted, p, is compared with what the directions did change, c, level by level; the means
    run over the agent's refreshes. A model that is wrong is believed no longer, θ = 0: the directions stay as they are,
    as without a prediction.

    Args:
      predict: the `Prediction`; of the last link of a `chain`, c is what the first leaves.
      rate: weight of the last refresh in the running means, in (0, 1]. They start at 0: nothing is believed before it
        was right once.

    Returns:
      `Prediction` whose memory is `TrustedState`.

    Raises:
      ValueError: if `predict` is none, or a concrete `rate` is not in (0, 1].

    Cost: that of `predict`, and one more `change` and three inner products for each level and refresh.

    Reference: own.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.prediction.trusted(bx.single_loop.prediction.secants(4))
        trusted(secants(4))
    """
    checks.instance("predict", predict, Prediction, "Pass, say, bx.single_loop.prediction.secants(4).")
    checks.scalar("rate", rate)
    checks.fraction("rate", rate)

    def init(problem: BilevelProblem, point: Levels[PyTree], d: Levels[PyTree], batch: Batch) -> TrustedState:
        zeros = jnp.zeros(len(point), wide_dtype(*jax.tree.leaves(point)))
        return TrustedState(predict.init(problem, point, d, batch), zeros, zeros)

    def update(
        memory: TrustedState,
        problem: BilevelProblem,
        start: Levels[PyTree],
        end: Levels[PyTree],
        change: Levels[PyTree],
        batch: Batch,
    ) -> TrustedState:
        guess = predict.change(memory.memory, problem, start, end, batch)
        lengths = [jnp.sqrt(_products(one, one)) for one in (guess, change)]
        seen = jnp.minimum(*lengths) > 0
        long, true = (jnp.where(seen, length, 1) for length in lengths)
        agreement, size = (
            jnp.where(seen, old + rate * (new - old), old).astype(old.dtype)
            for old, new in (
                (memory.agreement, _products(guess, change) / long / true),
                (memory.size, long / true),
            )
        )
        return TrustedState(predict.update(memory.memory, problem, start, end, change, batch), agreement, size)

    def believed(
        memory: TrustedState, problem: BilevelProblem, start: Levels[PyTree], end: Levels[PyTree], batch: Batch
    ) -> Levels[PyTree]:
        some = memory.size > 0
        trust = jnp.where(some, jnp.clip(memory.agreement / jnp.where(some, memory.size, 1), 0, 1), 0)
        guess = predict.change(memory.memory, problem, start, end, batch)
        return Levels(*(jax.tree.map(lambda leaf, by=by: by * leaf, one) for one, by in zip(guess, trust, strict=True)))

    return Prediction(init, update, believed)


def _products(one: Levels[PyTree], other: Levels[PyTree]) -> Array:
    """Inner products level by level, [3]; 0 at levels that one of them has not."""

    def product(a: PyTree, b: PyTree) -> Any:
        if a is None or b is None:
            return 0.0
        return sum(jnp.sum(x * y, dtype=wide_dtype(x)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    return jnp.stack([jnp.asarray(product(*each)) for each in zip(one, other, strict=True)])
