"""Corrections that correct nothing: plain descent with the neighbours, and without them."""

from typing import Any

import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.agents._gossip import Gossip
from bilevax.single_loop.correction.correction_type import Correction, CorrectionState, Move, damped, share
from bilevax.typing import PyTree, Scalar


def none(rate: Scalar = 1.0) -> Correction:
    """No correction: decentralized descent, adapt then combine.

        s⁺ = s + η (W (s − a d) − s)

    With a constant step and different local losses its limit is biased by O(a).

    Args:
      rate: η in (0, 1]; 1 switches it off.

    Returns:
      `Correction` with the memory ().

    Raises:
      ValueError: if a concrete `rate` is not in (0, 1].

    Cost: one vector in one round.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.none().rounds
        1
    """
    checks.scalar("rate", rate)
    checks.fraction("rate", rate)

    def init(gossip: Gossip, s: PyTree, move: Move) -> CorrectionState:
        return CorrectionState(gossip.init(s), move.init(s), ())

    def update(key: Any, state: CorrectionState, gossip: Gossip, s: Any, d: Any, move: Move) -> tuple:
        step, moved = move.apply(share(gossip, state.gossip, d), state.move, s)
        message = optax.apply_updates(s, step)
        new, mixing = gossip.mix(key, state.gossip, message)
        return damped(rate, s, new), CorrectionState(mixing, moved, ()), gossip.bytes(state.gossip, message)

    return Correction(init, update, rounds=1)


def local() -> Correction:
    """No communication: each agent descends alone, on a level of its own (a personalised lower level).

        s_i⁺ = s_i − a d_i

    Args:
      (none)

    Returns:
      `Correction` with the memory ().

    Raises:
      (nothing)

    Cost: nothing is sent, no round.

    Example:
        >>> import bilevax as bx
        >>> bx.single_loop.correction.local().rounds
        0
    """

    def init(gossip: Gossip, s: PyTree, move: Move) -> CorrectionState:
        return CorrectionState((), move.init(s), ())

    def update(key: Any, state: CorrectionState, gossip: Gossip, s: Any, d: Any, move: Move) -> tuple:
        step, moved = move.apply(d, state.move, s)
        return optax.apply_updates(s, step), state._replace(move=moved), jnp.zeros(gossip.agents().shape)

    return Correction(init, update, rounds=0)
