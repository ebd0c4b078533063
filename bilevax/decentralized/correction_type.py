"""What a correction is: how one level mixes, and how it moves along a corrected direction."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Move(NamedTuple):
    """How a corrected direction becomes a displacement: a step size, or an optax transformation for each agent.

    Attributes:
      init: `init(s) -> state`.
      apply: `apply(t, state, s) -> (displacement, state)`, −a t for a step size a.
      linear: True for a step size.

    Example:
        >>> import bilevax as bx
        >>> bx.correction.Move._fields
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
        >>> bx.correction.tracking().rounds, bx.correction.tracking_atc().rounds
        (1, 2)
    """

    init: Callable
    update: Callable
    rounds: int


class CorrectionState(NamedTuple):
    """What one level remembers: the states of its gossip and its move, and the memory of its correction."""

    gossip: Any
    move: Any
    memory: Any
