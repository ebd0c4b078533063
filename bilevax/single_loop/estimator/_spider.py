"""SPIDER and PAGE: recursive differences that start again from the exact directions."""

from collections.abc import Callable
from typing import Any

import jax

from bilevax import checks
from bilevax.printing import as_called
from bilevax.problem import Batch
from bilevax.sampling import Sample, needed, split
from bilevax.single_loop._levels import Levels
from bilevax.single_loop.estimator._storm import storm
from bilevax.single_loop.estimator.estimator_type import Estimator, Oracle
from bilevax.single_loop.estimator.sampled import full
from bilevax.typing import Array, Key, PyTree, Scalar


@as_called
def spider(*, every: int, sample: Sample) -> Estimator:
    """SPIDER: differences of directions on samples, summed onto the exact directions of every q-th iteration.

        u_k = d(s_k)                                            if k mod q = 0
        u_k = u_{k−1} + d(s_k; ξ_k) − d(s_{k−1}; ξ_k)           otherwise

    Args:
      every: q >= 1, iterations from one exact evaluation to the next.
      sample: `sample(key, t, data) -> batch` for the data of one agent.

    Returns:
      `Estimator` whose state is u; the method keeps the previous point.

    Raises:
      ValueError: if `every` < 1.

    Cost: one evaluation on all data in every q-th iteration, two on a sample in each other one.

    Reference: Fang et al., "SPIDER: near-optimal non-convex optimization via stochastic path integrated differential
    estimator", arXiv 1807.01695.

    Example:
        >>> import bilevax as bx
        >>> estimator = bx.single_loop.estimator.spider(every=50, sample=bx.sampling.minibatch(32))
    """
    every = checks.count("every", every, minimum=1)
    return _restarted(lambda key, k: k % every == 0, sample)


@as_called
def page(*, probability: Scalar, sample: Sample) -> Estimator:
    """PAGE: as SPIDER, with the exact directions at random iterations, by one coin for all agents.

        u_k = d(s_k)                                            with probability q, and at k = 0
        u_k = u_{k−1} + d(s_k; ξ_k) − d(s_{k−1}; ξ_k)           otherwise

    Args:
      probability: q in (0, 1].
      sample: `sample(key, t, data) -> batch` for the data of one agent.

    Returns:
      `Estimator` whose state is u; the method keeps the previous point.

    Raises:
      ValueError: if a concrete `probability` is not in (0, 1]; when it draws, if there is no key.

    Cost: one evaluation on all data with probability q, otherwise two on a sample.

    Reference: Li et al., "PAGE: a simple and optimal probabilistic gradient estimator for nonconvex optimization",
    arXiv 2008.10898.

    Example:
        >>> import bilevax as bx
        >>> estimator = bx.single_loop.estimator.page(probability=0.1, sample=bx.sampling.minibatch(32))
    """
    checks.fraction("probability", probability)

    def anew(key: Key | None, k: Scalar) -> Array:
        return (k == 0) | jax.random.bernoulli(needed(key, "a random choice"), probability)

    return _restarted(anew, sample)


def _restarted(restart: Callable[[Key | None, Scalar], Any], sample: Sample) -> Estimator:
    exact, recursive = full(), storm(0.0, sample=sample)

    def update(
        key: Key | None, state: Levels[PyTree], oracle: Oracle, point: Levels[PyTree], batch: Batch, k: Scalar
    ) -> tuple[Levels[PyTree], Levels[PyTree], Array]:
        coin_key, sample_key = split(key, 2)

        def restarted() -> tuple[Levels[PyTree], Levels[PyTree], Array]:
            u, _, evaluations = exact.update(None, (), oracle, point, batch, k)
            return u, u, evaluations

        def carried() -> tuple[Levels[PyTree], Levels[PyTree], Array]:
            return recursive.update(sample_key, state, oracle, point, batch, k)

        return jax.lax.cond(restart(coin_key, k), restarted, carried)

    return Estimator(recursive.init, update, remembers=True)
