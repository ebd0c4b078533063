"""What an estimator is, what it may ask for, and the small steps that estimators share."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.printing import by_text
from bilevax.problem import Batch
from bilevax.sampling import Sample, fold, split
from bilevax.single_loop._levels import Levels, at, levels
from bilevax.typing import Array, Key, PyTree, Scalar


class Oracle(NamedTuple):
    """What an estimator may ask for.

    Attributes:
      evaluate: `evaluate(point, batch) -> Levels`: d_x, d_y and d_v of m stacked agents at a point with leaves [m,
        ...], on a `Batch` with leaves [m, ...]; None at the levels that are not moved now.
      gossip: the gossip of x, for the ids of the agents.
      group: the levels that are moved now, such as ("x", "y", "v").
      previous: the point where these levels were estimated last, for estimators that ask for it: with levels that move
        in turn, its x, y and v come from different iterations.
      problem: f_i and g_i, for estimators that read their structure.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> gossip, levels = bx.gossip(bx.topology.ring(4)), ("x", "y", "v")
        >>> oracle = bx.single_loop.estimator.Oracle(lambda point, batch: point, gossip, levels)  # d(s) = s
        >>> point = bx.Levels(jnp.ones(4), jnp.ones(4), jnp.zeros(4))
        >>> bx.single_loop.estimator.full().update(None, (), oracle, point, bx.Batch(None, None), 0)[2].tolist()
        [1, 1, 1, 1]
    """

    evaluate: Callable[[Levels[PyTree], Batch], Levels[PyTree]]
    gossip: Gossip
    group: tuple[str, ...]
    previous: Any = None
    problem: Any = None


class EstimatorInit(Protocol):
    """The first memory; batch is None where the method was started without one."""

    def __call__(self, oracle: Oracle, point: Levels[PyTree], batch: Batch | None) -> Any: ...


class EstimatorUpdate(Protocol):
    """The directions at a point, the memory, and the evaluations of each agent [n]."""

    def __call__(
        self, key: Key | None, state: Any, oracle: Oracle, point: Levels[PyTree], batch: Batch, k: Scalar
    ) -> tuple[Levels[PyTree], Any, Array]: ...


class Estimator(NamedTuple):
    """An estimator of the directions, as a pair of pure functions on stacked agents.

    Attributes:
      init: `init(oracle, point, batch) -> state`.
      update: `update(key, state, oracle, point, batch, k) -> (directions, state, evaluations [n])`, at iteration k,
        with the number of times that each agent evaluated its directions.
      remembers: True where it reads `oracle.previous`.
      text: what `print` shows.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.estimator.storm(0.1, sample=bx.sampling.full)
        storm(0.1, sample=full)
    """

    init: EstimatorInit
    update: EstimatorUpdate
    remembers: bool = False
    text: str = ""

    def __repr__(self) -> str:
        return by_text(self)


class Coins(Protocol):
    """Who refreshes: a scalar bool for all or none, a bool [n] of the agents held here, or int [m], global ids."""

    def __call__(self, key: Key | None, k: Scalar, gossip: Gossip, /) -> Array: ...


def where(chosen: Array, new: PyTree, old: PyTree) -> PyTree:
    """The new leaves [n, ...] of the chosen agents, the old ones of the others."""
    return jax.tree.map(lambda new, old: jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old), new, old)


def draw(key: Any, sample: Sample, k: Scalar, batch: Batch, agents: Array) -> Batch:
    """A sample of each agent's outer and inner data, drawn with keys that fold in the id of the agent.

    Args:
      key: of this iteration, or None where `sample` draws nothing.
      sample: `sample(key, t, data) -> batch` for the data of one agent.
      k: the iteration.
      batch: `Batch` with leaves [n, ...].
      agents: their global ids [n], `gossip.agents()`.

    Returns:
      `Batch` of samples, leaves [n, ...].

    Raises:
      ValueError: from `sample`, say if there is no key.

    Cost: two draws for each agent.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> data, agents = bx.Batch(jnp.ones((4, 2)), None), jnp.arange(4)
        >>> bx.single_loop.estimator.draw(None, bx.sampling.full, 0, data, agents).outer.shape
        (4, 2)
    """

    def one(agent: Array, data: Batch) -> Batch:
        outer, inner = split(fold(key, agent), 2)
        return Batch(sample(outer, k, data.outer), sample(inner, k, data.inner))

    return jax.vmap(one)(agents, batch)


def everybody(oracle: Oracle) -> Array:
    """One evaluation for each agent held here."""
    return jnp.ones_like(oracle.gossip.agents())


def zeros_like(oracle: Oracle, point: Levels[PyTree]) -> Levels[PyTree]:
    """Zero directions at the levels that are moved now, None at the others."""
    return Levels(*(optax.tree.zeros_like(s) if name in oracle.group else None for name, s in point._asdict().items()))


def rates_of(name: str, value: Any, zero: bool = False) -> Levels[PyTree]:
    """Reads a rate in (0, 1] (with `zero`: in [0, 1]) for each level: a number or a schedule."""
    rates = levels(name, value)
    for rate in rates:
        if callable(rate):
            checks.function(name, rate, "k")
        else:
            checks.scalar(name, rate)
            checks.fraction(name, rate, zero=zero)
    return rates


def from_one(rates: Levels[PyTree], k: Scalar) -> Levels[PyTree]:
    """The rates at iteration k; 1 at the first, where there is nothing to remember."""
    return Levels(*(jnp.where(k == 0, 1.0, at(k, rate)) for rate in rates))
