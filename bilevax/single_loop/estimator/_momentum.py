"""A moving average of the directions."""

from typing import Any

from bilevax.printing import as_called
from bilevax.problem import Batch
from bilevax.sampling import Sample
from bilevax.sampling import full as all_data
from bilevax.single_loop._levels import Levels, PerLevel, Rate, each
from bilevax.single_loop.estimator.estimator_type import Estimator, Oracle, from_one, rates_of, zeros_like
from bilevax.single_loop.estimator.sampled import stochastic
from bilevax.typing import Array, Key, PyTree, Scalar


@as_called
def momentum(momentum: PerLevel[Rate], *, sample: Sample = all_data) -> Estimator:
    """A moving average of the directions, each taken where it was visited.

        u_k = (1 − a) u_{k−1} + a d(s_k; ξ_k),      u_0 = d(s_0; ξ_0)

    Args:
      momentum: a in [0, 1], weight of the new direction: a number, a schedule k -> number, or `Levels` of them.
      sample: `sample(key, t, data) -> batch` for the data of one agent.

    Returns:
      `Estimator` whose state is u.

    Raises:
      ValueError: if a concrete `momentum` is not in [0, 1].

    Cost: one evaluation of the directions for each agent and iteration; one more copy of each direction.

    Example:
        >>> import bilevax as bx
        >>> estimator = bx.single_loop.estimator.momentum(bx.Levels(x=0.1, y=1.0, v=1.0))
    """
    rates = rates_of("momentum", momentum, zero=True)
    plain = stochastic(sample)

    def update(
        key: Key | None, state: Any, oracle: Oracle, point: Levels[PyTree], batch: Batch, k: Scalar
    ) -> tuple[Levels[PyTree], Any, Array]:
        d, _, evaluations = plain.update(key, (), oracle, point, batch, k)
        u = each(lambda momentum, u, d: u + momentum * (d - u), from_one(rates, k), state, d)
        return u, u, evaluations

    return Estimator(lambda oracle, point, batch: zeros_like(oracle, point), update)
