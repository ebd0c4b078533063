"""STORM: recursive momentum."""

from bilevax import checks
from bilevax.printing import as_called
from bilevax.problem import Batch
from bilevax.sampling import Sample
from bilevax.sampling import full as all_data
from bilevax.single_loop._levels import Levels, PerLevel, Rate, each
from bilevax.single_loop.estimator.estimator_type import (
    Estimator,
    Oracle,
    draw,
    everybody,
    from_one,
    rates_of,
    zeros_like,
)
from bilevax.typing import Array, Key, PyTree, Scalar


@as_called
def storm(momentum: PerLevel[Rate], *, sample: Sample = all_data) -> Estimator:
    """Recursive momentum (STORM): the past estimate is carried to the present point by one sample at both points.

        u_k = (1 − a) (u_{k−1} − d(s_{k−1}; ξ_k)) + d(s_k; ξ_k),      u_0 = d(s_0; ξ_0)

    The previous point is the one at which u_{k−1} was estimated: with levels that move in turn its x, y and v need not
    belong to one iteration.

    Args:
      momentum: a in [0, 1] (1: plain sampling; 0: SARAH without restart): a number, a schedule k -> number, or
        `Levels`.
      sample: `sample(key, t, data) -> batch` for the data of one agent.

    Returns:
      `Estimator` whose state is u; the method keeps the previous point.

    Raises:
      ValueError: if a concrete `momentum` is not in [0, 1].

    Cost: two evaluations of the directions for each agent and iteration, on one sample.

    Reference: Cutkosky and Orabona, "Momentum-based variance reduction in non-convex SGD", arXiv 1905.10018.

    Example:
        >>> import bilevax as bx
        >>> estimator = bx.single_loop.estimator.storm(0.1, sample=bx.sampling.minibatch(32))
    """
    rates = rates_of("momentum", momentum, zero=True)
    checks.function("sample", sample, "key", "t", "data")

    def update(
        key: Key | None, state: Levels[PyTree], oracle: Oracle, point: Levels[PyTree], batch: Batch, k: Scalar
    ) -> tuple[Levels[PyTree], Levels[PyTree], Array]:
        drawn = draw(key, sample, k, batch, oracle.gossip.agents())
        then, now = oracle.evaluate(oracle.previous, drawn), oracle.evaluate(point, drawn)
        u = each(lambda momentum, u, then, now: (1 - momentum) * (u - then) + now, from_one(rates, k), state, then, now)
        return u, u, 2 * everybody(oracle)

    return Estimator(lambda oracle, point, batch: zeros_like(oracle, point), update, remembers=True)
