"""The directions themselves: on all data, or on a fresh sample."""

from typing import Any

from bilevax import checks
from bilevax.printing import as_called
from bilevax.problem import Batch
from bilevax.sampling import Sample
from bilevax.sampling import full as all_data
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.estimator.estimator_type import Estimator, Oracle, draw, everybody
from bilevax.typing import Array, Key, PyTree, Scalar


@as_called
def full() -> Estimator:
    """The exact local directions on all local data.

        u_k = d(s_k)

    Returns:
      `Estimator` without a state.

    Raises:
      ValueError: never; an oracle that does not fit the data raises its own.

    Cost: one evaluation of the directions for each agent and iteration.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.estimator.full().init(None, None, None)
        ()
    """
    return stochastic(all_data)


@as_called
def stochastic(sample: Sample) -> Estimator:
    """The directions on a fresh sample of the local data, drawn independently for each agent.

        u_k = d(s_k; ξ_k)

    Args:
      sample: `sample(key, t, data) -> batch` for the data of one agent, such as `bx.sampling.minibatch(32)`. The outer
        and the inner data are drawn apart.

    Returns:
      `Estimator` without a state.

    Raises:
      ValueError: if `sample` is not such a function; when it draws, if there is no key.

    Cost: one evaluation of the directions on a sample for each agent and iteration.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.estimator.stochastic(bx.sampling.minibatch(32)).init(None, None, None)
        ()
    """
    checks.function("sample", sample, "key", "t", "data")

    def update(
        key: Key | None, state: Any, oracle: Oracle, point: Levels[PyTree], batch: Batch, k: Scalar
    ) -> tuple[Levels[PyTree], Any, Array]:
        drawn = draw(key, sample, k, batch, oracle.gossip.agents())
        return oracle.evaluate(point, drawn), state, everybody(oracle)

    return Estimator(lambda oracle, point, batch: (), update)
