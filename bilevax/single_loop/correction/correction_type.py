"""What a correction is: how one level mixes, and how it moves along a corrected direction."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bilevax.agents._gossip import Gossip, per_agent
from bilevax.typing import PyTree, Scalar


class Move(NamedTuple):
    """How a corrected direction becomes a displacement: a step size, or an optax transformation for each agent.

    Attributes:
      init: `init(s) -> state`.
      apply: `apply(t, state, s) -> (displacement, state)`, −a t for a step size a.
      linear: True for a step size.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.Move._fields
        ('init', 'apply', 'linear')
    """

    init: Callable
    apply: Callable
    linear: bool


class Correction(NamedTuple):
    """How one level mixes and moves, as a pair of pure functions.

    Attributes:
      init: `init(gossip, s, move) -> state`.
      update: `update(key, state, gossip, s, d, move) -> (s⁺, state, bytes [n])`.
      rounds: rounds of communication in one update.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.tracking().rounds, bx.single_loop.correction.tracking_atc().rounds
        (1, 2)
    """

    init: Callable
    update: Callable
    rounds: int


class CorrectionState(NamedTuple):
    """What one level remembers: the states of its gossip and its move, and the memory of its correction.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> gossip, move = bx.gossip(bx.topology.ring(4)), bx.single_loop.correction.Move(lambda s: (), None, True)
        >>> bx.single_loop.correction.tracking().init(gossip, jnp.zeros(4), move).memory.last.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    gossip: Any
    move: Any
    memory: Any


def share(gossip: Gossip, state: Any, d: PyTree) -> PyTree:
    """Divides a direction by the push-sum weights ω, as every correction must, so that directed graphs may be used.

    Args:
      gossip: that of the level.
      state: its state.
      d: a direction, leaves [n, ...].

    Returns:
      d / ω; d itself where W is doubly stochastic.

    Raises:
      (nothing)

    Cost: one division of each entry.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> bx.single_loop.correction.share(bx.gossip(bx.topology.ring(4)), (), jnp.ones(4)).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    weights = gossip.weights(state)
    return d if isinstance(weights, float) else per_agent(lambda w, leaf: leaf / w, weights, d)


def damped(rate: Scalar, s: PyTree, new: PyTree) -> PyTree:
    """S + η (s⁺ − s); s⁺ itself where η is the number 1."""
    if isinstance(rate, float | int) and rate == 1:
        return new
    return jax.tree.map(lambda s, new: (s + rate * (new - s)).astype(s.dtype), s, new)
